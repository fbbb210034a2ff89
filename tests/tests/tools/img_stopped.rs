//! Files that a command has created are removed if a signal stops the copy or the creation fails.

use std::fs;

use oxblk_tests::program::{Program, oxblk};

/// Starts a command that creates `target`, and sends the signal when the target exists. The command must end and remove the
/// target and its data file `data`.
fn stop(directory: &std::path::Path, arguments: &[&str], signal: &str) {
    let mut copy = Program::oxblk().arg("img").args(arguments).directory(directory).start();
    let target = directory.join("target");
    copy.wait_for("the target", || target.exists());
    copy.signal(signal);
    assert_eq!(copy.wait().code(), Some(130), "{arguments:?}, {signal}");
    assert!(!target.exists(), "{arguments:?}, {signal}");
    assert!(!directory.join("data").exists(), "{arguments:?}, {signal}");
}

#[test]
fn a_stopped_copy_removes_its_target_and_does_not_wait_for_its_rate() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    fs::write(directory.join("source"), vec![7; 32 << 20]).expect("a file");
    fs::File::create(directory.join("holes")).and_then(|f| f.set_len(1 << 40)).expect("a file");
    for signal in ["TERM", "INT", "HUP"] {
        // At this rate, the second request would begin after half an hour.
        stop(directory, &["convert", "-r", "1k", "-O", "qcow2", "source", "target"], signal);
        // `dd` writes every byte, so this copy takes longer than the test.
        stop(directory, &["dd", "-O", "raw", "bs=1M", "if=holes", "of=target"], signal);
    }
    let with_data = "data_file=data";
    stop(
        directory,
        &["convert", "-r", "1k", "-O", "qcow2", "-o", with_data, "source", "target"],
        "TERM",
    );
    fs::write(directory.join("mine"), "old").expect("a file");
    let mut copy = Program::oxblk()
        .args(["img", "dd", "-O", "raw", "bs=1M", "if=holes", "of=mine"])
        .directory(directory)
        .start();
    let mine = directory.join("mine");
    copy.wait_for("the copy", || fs::metadata(&mine).is_ok_and(|file| file.len() != 3));
    copy.signal("TERM");
    assert_eq!(copy.wait().code(), Some(130));
    assert!(mine.exists(), "a file that existed before is kept");
}

#[test]
fn a_stop_does_not_wait_for_requests_in_a_throttle_group() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    fs::write(directory.join("source"), vec![7; 4 << 20]).expect("a file");
    fs::write(directory.join("same"), vec![7; 4 << 20]).expect("a file");
    // At this rate, the requests would wait for more than an hour.
    let group = "throttle-group,id=g,x-bps-total=1000";
    let source = "driver=throttle,throttle-group=g,file.driver=raw,file.file.filename=source";
    for options in [&["-O", "raw"][..], &["-O", "qcow2", "-c"], &["-W", "-O", "qcow2"], &["-p"]] {
        let copy = ["convert", "--object", group, "--image-opts", source, "target"];
        stop(directory, &[&copy, options].concat(), "TERM");
    }
    let input = format!("if={source}");
    stop(directory, &["dd", "--object", group, "--image-opts", &input, "of=target"], "INT");
    let same = "driver=raw,file.filename=same";
    let mut compare = Program::oxblk()
        .args(["img", "compare", "-p", "--object", group, "--image-opts", source, same])
        .directory(directory)
        .start();
    let pid = compare.pid();
    compare.wait_for("the signal handlers", || catches_term(pid));
    compare.signal("TERM");
    assert_eq!(compare.wait().code(), Some(130));
}

/// Whether a process has a handler for SIGTERM.
fn catches_term(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << 14) != 0)
}

#[test]
fn a_stopped_creation_removes_its_files() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    fs::File::create(directory.join("holes")).and_then(|f| f.set_len(1 << 40)).expect("a file");
    // The creations would write 1 TiB.
    let full = "preallocation=full";
    let with_data = "preallocation=full,data_file=data";
    stop(directory, &["create", "-f", "raw", "-o", full, "target", "1T"], "TERM");
    stop(directory, &["create", "-f", "qcow2", "-o", with_data, "target", "1T"], "INT");
    stop(directory, &["convert", "-O", "qcow2", "-o", full, "holes", "target"], "TERM");
    fs::write(directory.join("mine"), "old").expect("a file");
    let mut creation = Program::oxblk()
        .args(["img", "create", "-f", "raw", "-o", full, "mine", "1T"])
        .directory(directory)
        .start();
    let mine = directory.join("mine");
    creation.wait_for("the creation", || fs::metadata(&mine).is_ok_and(|file| file.len() > 3));
    creation.signal("TERM");
    assert_eq!(creation.wait().code(), Some(130));
    assert!(mine.exists(), "a file that existed before is kept");
}

#[test]
fn a_failed_creation_removes_the_data_file_that_it_created() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let create = || {
        let command = "ulimit -f 100; \
             exec \"$0\" img create -f qcow2 -o data_file=data,preallocation=full image 100M";
        let sh = Program::new("sh").arg("-c").arg(command).arg(oxblk()).directory(scratch.path());
        assert_eq!(sh.run().code(), 1);
        assert!(!scratch.path().join("image").exists());
    };
    let data = scratch.path().join("data");
    create();
    assert!(!data.exists());
    fs::write(&data, "old").expect("a file");
    create();
    assert!(data.exists(), "a file that existed before is kept");
}

//! A signal stops `oxblk serve` or a copy cleanly: bitmaps are stored, and sockets are removed.

use crate::served::Served;
use oxblk_tests::program::{Program, Server, oxblk};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

/// Creates a qcow2 image with a persistent bitmap.
fn image(dir: &Path) {
    Program::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "d", "16M"])
        .directory(dir)
        .succeed();
    Program::new("qemu-img").args(["bitmap", "--add", "d", "b"]).directory(dir).succeed();
}

fn has_bitmap_in_use(dir: &Path) -> bool {
    let info = Program::new("qemu-img").args(["info", "d"]).directory(dir).succeed().out();
    assert!(info.contains("name: b"), "{info}");
    info.contains("in-use")
}

/// Starts `oxblk serve` on the image of [`image`]. `line` is a shell command line; `$SERVE` is the command that starts the
/// server.
fn started_by(dir: &Path, line: &str) -> Server {
    let serve = format!("{} serve d -f qcow2 --nbd ./s", oxblk().display());
    let line = line.replace("$SERVE", &serve);
    let mut server = Program::new("sh").arg("-c").arg(line).directory(dir).start();
    server.wait_for_socket(&dir.join("s"));
    server
}

#[test]
fn terminating_signals_store_the_bitmaps_and_remove_the_socket() {
    for signal in ["HUP", "INT", "QUIT", "TERM", "XCPU", "ALRM", "USR1", "USR2", "PROF"] {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        let mut server = started_by(dir.path(), "exec $SERVE");
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0), "SIG{signal}");
        assert!(!dir.path().join("s").exists(), "SIG{signal}");
        assert!(!has_bitmap_in_use(dir.path()), "SIG{signal}");
    }
}

#[test]
fn several_signals_in_quick_succession_count_as_one_stop_request() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let mut server = started_by(dir.path(), "exec $SERVE");
    let twice = format!("kill -TERM {0}; kill -INT {0}; kill -TERM {0}", server.pid());
    Program::new("sh").arg("-c").arg(twice).run();
    assert_eq!(server.wait().code(), Some(0));
    assert!(!dir.path().join("s").exists());
    assert!(!has_bitmap_in_use(dir.path()));
}

#[test]
fn a_hangup_that_nohup_ignores_does_not_end_the_server() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let server = started_by(dir.path(), "trap '' HUP; exec $SERVE");
    server.signal("HUP");
    // If SIGHUP had ended the server, this client would fail.
    Program::new("nbdinfo").arg("nbd+unix:///?socket=s").directory(dir.path()).succeed();
    server.stop();
    assert!(!has_bitmap_in_use(dir.path()));
}

#[test]
fn a_signal_while_the_server_starts_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    for round in 0..12 {
        let mut server = Program::oxblk()
            .args(["serve", "d", "-f", "qcow2", "--nbd", "./s"])
            .directory(dir.path())
            .start();
        std::thread::sleep(std::time::Duration::from_millis(round));
        server.signal("HUP");
        let status = server.wait();
        // A signal that arrives before the server installs its handlers kills the server. At that time, the server has not
        // opened any file.
        assert!(status.code() == Some(0) || status.signal() == Some(1), "{status}");
        assert!(!dir.path().join("s").exists(), "round {round}");
        assert!(!has_bitmap_in_use(dir.path()), "round {round}");
    }
}

#[test]
fn a_hangup_stops_a_copy_and_removes_the_target_that_it_made() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("source"), vec![7; 64 << 20]).unwrap();
    let convert = ["convert", "-f", "raw", "-O", "raw", "-r", "1M", "source", "target"];
    let mut copy = Program::oxblk().arg("img").args(convert).directory(dir.path()).start();
    let target = dir.path().join("target");
    copy.wait_for("data in the target", || target.metadata().is_ok_and(|file| file.blocks() > 8));
    copy.signal("HUP");
    assert_eq!(copy.wait().code(), Some(130));
    assert!(!target.exists());
}

#[test]
fn a_stopped_copy_keeps_a_target_that_existed_before() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("source"), vec![7; 64 << 20]).unwrap();
    std::fs::write(dir.path().join("target"), vec![8; 64 << 20]).unwrap();
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "-r", "1M", "source", "target"];
    let mut copy = Program::oxblk().arg("img").args(convert).directory(dir.path()).start();
    let target = dir.path().join("target");
    let begins_with = |byte| std::fs::read(&target).is_ok_and(|bytes| bytes.first() == Some(&byte));
    copy.wait_for("data in the target", || begins_with(7));
    copy.signal("HUP");
    assert_eq!(copy.wait().code(), Some(130));
    assert_eq!(target.metadata().unwrap().len(), 64 << 20);
}

/// Whether a process catches SIGINT.
fn catches_interrupts(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & 1 << 1 != 0
}

#[test]
fn a_signal_ends_a_copy_that_is_still_counting_its_data() {
    let dir = tempfile::tempdir().unwrap();
    // This disk has nearly the largest possible size, so counting its data takes hours.
    let disk = "driver=null-co,size=9223372035781033984";
    for signal in ["INT", "TERM", "HUP"] {
        let mut copy = Program::oxblk()
            .args(["img", "convert", "-p", "-n", "--image-opts", "--target-image-opts", disk, disk])
            .directory(dir.path())
            .start();
        let pid = copy.pid();
        copy.wait_for("a signal handler", || catches_interrupts(pid));
        copy.signal(signal);
        assert_eq!(copy.wait().code(), Some(130), "{signal}");
    }
}

#[test]
fn a_hangup_stops_the_server_without_an_error_for_a_writing_client() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(dir.path(), &["d", "-f", "qcow2", "--size", "64M"]);
    // Every write succeeds, or gets no reply because the connection has ended.
    let script = "
import signal
buffers = [nbd.Buffer(65536) for _ in range(64)]
PID = int(os.environ['PID'])
results = []
def done(error):
    results.append(error.value)
    return 1
for round in range(400):
    if round == 100:
        os.kill(PID, signal.SIGHUP)
    try:
        h.aio_pwrite(buffers[round % 64], (round % 1000) * 65536, completion=done)
        h.poll(0)
    except nbd.Error as error:
        assert error.errno in ('ENOTCONN', 'EINVAL', 'EPIPE', 'ECONNRESET', None), error
        break
while h.aio_in_flight() > 0:
    try:
        h.poll(-1)
    except nbd.Error:
        break
assert errno.ECANCELED not in results and errno.EIO not in results, results
";
    let pid = served.pid().to_string();
    let prelude = format!("import os\nos.environ['PID'] = '{pid}'\n");
    served.python(&(prelude + script));
    let mut server = served.into_server();
    assert_eq!(server.wait().code(), Some(0));
    Program::new("qemu-img").args(["check", "d"]).directory(dir.path()).succeed();
}

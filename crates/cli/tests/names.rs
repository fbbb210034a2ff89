//! The program itself, as it is installed. A test of this package has the program built along with all tests, and with
//! the same features, so that nothing is built twice.

use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_oxblk");

#[test]
fn the_program_tells_its_version() {
    let told = Command::new(PROGRAM).arg("--version").output().unwrap();
    assert!(told.status.success());
    let expected = format!("oxblk {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(told.stdout).unwrap(), expected);
}

#[test]
fn the_program_answers_to_the_names_of_qemus_tools() {
    let directory = tempfile::tempdir().unwrap();
    for (name, help) in [("qemu-img", "usage: qemu-img"), ("qemu-io", "Usage: qemu-io")] {
        let link = directory.path().join(name);
        std::os::unix::fs::symlink(PROGRAM, &link).unwrap();
        let told = Command::new(&link).arg("--help").output().unwrap();
        let text = String::from_utf8(told.stdout).unwrap().to_lowercase();
        assert!(told.status.success() && text.contains(&help.to_lowercase()), "{text}");
    }
}

#[test]
fn under_qemus_names_the_version_compares_with_qemus() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["qemu-img", "qemu-io"] {
        let link = directory.path().join(name);
        std::os::unix::fs::symlink(PROGRAM, &link).unwrap();
        let told = Command::new(&link).arg("--version").output().unwrap();
        let text = String::from_utf8(told.stdout).unwrap();
        let rest = text.strip_prefix(&format!("{name} version ")).unwrap();
        let major: u32 = rest.split('.').next().unwrap().parse().unwrap();
        assert!(major >= 10, "{text}");
    }
}

#[test]
fn progress_that_nobody_reads_stops_nothing_but_a_lost_result_is_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    std::fs::write(&source, vec![7; 1 << 20]).unwrap();
    let run = |words: &[&str]| {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("img").args(words).current_dir(directory.path()).stdout(full);
        command.status().unwrap().code()
    };
    assert_eq!(run(&["convert", "-p", "-f", "raw", "-O", "raw", "source", "copy"]), Some(0));
    assert_eq!(std::fs::read(directory.path().join("copy")).unwrap(), vec![7; 1 << 20]);
    assert_eq!(run(&["create", "-f", "raw", "new", "1M"]), Some(0));
    assert_eq!(run(&["info", "-f", "raw", "source"]), Some(1));
}

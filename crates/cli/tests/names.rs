//! Tests of the built program under its names. The tests are in this package so that the program is built with the same
//! features as the other packages, and only once.

use std::process::{Command, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_oxblk");

#[test]
fn the_program_prints_its_version() {
    let output = Command::new(PROGRAM).arg("--version").output().unwrap();
    assert!(output.status.success());
    let expected = format!("oxblk {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

#[test]
fn the_program_runs_as_qemus_tools_under_their_names() {
    let directory = tempfile::tempdir().unwrap();
    for (name, help) in [("qemu-img", "usage: qemu-img"), ("qemu-io", "Usage: qemu-io")] {
        let link = directory.path().join(name);
        std::os::unix::fs::symlink(PROGRAM, &link).unwrap();
        let output = Command::new(&link).arg("--help").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap().to_lowercase();
        assert!(output.status.success() && text.contains(&help.to_lowercase()), "{text}");
    }
}

#[test]
fn the_version_under_qemus_names_is_a_version_of_qemu() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["qemu-img", "qemu-io"] {
        let link = directory.path().join(name);
        std::os::unix::fs::symlink(PROGRAM, &link).unwrap();
        let output = Command::new(&link).arg("--version").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let rest = text.strip_prefix(&format!("{name} version ")).unwrap();
        let major: u32 = rest.split('.').next().unwrap().parse().unwrap();
        assert!(major >= 10, "{text}");
    }
}

#[test]
fn unwritable_progress_is_ignored_but_an_unwritable_result_is_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    std::fs::write(&source, vec![7; 1 << 20]).unwrap();
    let run = |words: &[&str]| {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("img").args(words).current_dir(directory.path()).stdout(full);
        let output = command.stderr(Stdio::piped()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let done = (Some(0), String::new());
    assert_eq!(run(&["convert", "-p", "-f", "raw", "-O", "raw", "source", "copy"]), done);
    assert_eq!(std::fs::read(directory.path().join("copy")).unwrap(), vec![7; 1 << 20]);
    assert_eq!(run(&["create", "-f", "raw", "new", "1M"]), done);
    let reason = "Could not write to standard output: No space left on device\n".to_owned();
    assert_eq!(run(&["info", "-f", "raw", "source"]), (Some(1), reason));
}

#[test]
fn the_help_of_qemu_img_begins_with_the_version_and_names_the_formats() {
    use std::os::unix::process::CommandExt as _;
    let output = Command::new(PROGRAM).arg0("qemu-img").arg("-h").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.starts_with("qemu-img version 10."), "{help}");
    assert!(help.contains("\nSupported formats:\n"), "{help}");
}

#[test]
fn help_of_a_command_is_that_of_its_help_option() {
    let help = |words: &[&str]| Command::new(PROGRAM).args(words).output().unwrap().stdout;
    assert_eq!(help(&["help", "img", "convert"]), help(&["img", "convert", "--help"]));
    assert_eq!(help(&["help", "serve"]), help(&["serve", "--help"]));
    assert_ne!(help(&["help", "serve"]), help(&["help"]));
}

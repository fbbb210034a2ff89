//! Tests of the texts that the program prints for other programs: completion scripts and manual pages.

#![expect(clippy::unwrap_used, reason = "a test that fails may panic anywhere")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_oxblk");

fn printed(arguments: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The completions of bash for the last of these words.
fn offered(directory: &Path, words: &[&str]) -> Vec<String> {
    const SCRIPT: &str = r#"
        . "$1"
        shift
        COMP_WORDS=("$@")
        COMP_CWORD=$(($# - 1))
        _oxblk
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-u", "-c", SCRIPT, "bash", "./script"]).args(words);
    let output = bash.current_dir(directory).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(errors, "", "{words:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_values_and_file_names() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    std::fs::write(directory.join("script"), printed(&["completions", "bash"])).unwrap();
    std::fs::write(directory.join("a disk.raw"), "").unwrap();
    for (words, expected) in [
        (&["oxblk", "im"][..], &["img"][..]),
        (&["oxblk", "img", "conv"], &["convert"]),
        (&["oxblk", "img", "map", "--max"], &["--max-length"]),
        (&["oxblk", "img", "info", "--output", ""], &["human", "json"]),
        (&["oxblk", "img", "info", "--output", "="], &["human", "json"]),
        (&["oxblk", "img", "info", "--output", "=", "j"], &["json"]),
        (&["oxblk", "img", "convert", "-q", "-T", "w"], &["writeback", "writethrough"]),
        (&["oxblk", "img", "convert", "-O", "q"], &["qcow2", "qed"]),
        (&["oxblk", "img", "convert", "-m", ""], &[]),
        (&["oxblk", "img", "convert", "-q", "a"], &["a disk.raw"]),
        (&["oxblk", "img", "create", "-b", "a"], &["a disk.raw"]),
        (&["oxblk", "img", "dd", "if", "=", "a"], &["a disk.raw"]),
        (&["oxblk", "serve", "--export"], &["--export-name"]),
        (&["oxblk", "completions", "z"], &["zsh"]),
        (&["oxblk", "img", "nonsense", ""], &["amend", "bench", "bitmap"]),
    ] {
        let offered = offered(directory, words);
        let offered: Vec<_> = offered.iter().map(String::as_str).take(3).collect();
        assert_eq!(offered, expected, "{words:?}");
    }
}

#[test]
fn each_command_has_a_manual_page_that_groff_formats_without_a_warning() {
    let has_groff = Command::new("groff").arg("--version").output().is_ok();
    let pages = printed(&["man", "--list"]);
    assert!(pages.lines().any(|page| page == "oxblk-img-convert"), "{pages}");
    for page in pages.lines() {
        let roff = printed(&["man", page]);
        assert!(roff.starts_with(&format!(".TH \"{}\" 1 ", page.to_uppercase())), "{roff}");
        if has_groff {
            assert_eq!(warnings_of_groff(&roff), "", "{page}");
        }
    }
    assert_eq!(printed(&["man", "img", "convert"]), printed(&["man", "oxblk-img-convert"]));
    assert_eq!(printed(&["man"]), printed(&["man", "oxblk"]));
}

fn warnings_of_groff(roff: &str) -> String {
    let mut groff = Command::new("groff");
    groff.args(["-man", "-ww", "-z", "-Tascii"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut groff = groff.spawn().unwrap();
    groff.stdin.take().unwrap().write_all(roff.as_bytes()).unwrap();
    String::from_utf8(groff.wait_with_output().unwrap().stderr).unwrap()
}

#[test]
fn each_command_prints_its_help() {
    for page in printed(&["man", "--list"]).lines() {
        let name = page.replace('-', " ");
        let mut words: Vec<_> = name.split(' ').skip(1).collect();
        words.push("--help");
        let help = printed(&words);
        assert!(help.starts_with(&format!("Usage: {name} ")), "{help}");
        assert!(help.contains("\nExit codes:\n"), "{help}");
    }
}

#[test]
fn an_unknown_page_or_shell_is_refused() {
    for (arguments, message) in [
        (&["man", "img", "dance"][..], "There is no manual page for 'img dance'"),
        (&["man", "--bogus"], "unrecognized option '--bogus'"),
        (&["completions", "tcsh"], "There are no completions for 'tcsh'"),
        (&["completions"], "Expecting one shell: bash, zsh or fish"),
    ] {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(errors.contains(message) && errors.contains("--help' for more info"), "{errors}");
    }
}

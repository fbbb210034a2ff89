//! Misspelt words. If oxblk is called by its own name, it suggests a similar word.

use oxblk_tests::program::Program;

fn refused(arguments: &[&str]) -> String {
    let reply = Program::oxblk().args(arguments).run();
    assert_eq!(reply.code(), 1, "{arguments:?}");
    reply.err()
}

#[test]
fn a_misspelt_command_gets_a_suggestion() {
    assert!(refused(&["img", "convret", "a", "b"]).contains("img convert'?\n"));
    assert!(refused(&["convert", "a", "b"]).contains("img convert'?\n"));
    assert!(refused(&["srve"]).contains("serve'?\n"));
    assert!(!refused(&["img", "dance"]).contains("Did you mean"));
}

#[test]
fn a_misspelt_option_gets_a_suggestion() {
    assert!(
        refused(&["img", "info", "--formt", "raw", "x"]).contains("Did you mean '--format'?\n")
    );
    assert!(!refused(&["img", "info", "--bogus", "x"]).contains("Did you mean"));
}

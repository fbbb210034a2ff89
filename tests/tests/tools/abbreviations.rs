//! Abbreviated options. Every abbreviation that qemu-img accepts is valid with oxblk too, although oxblk has more options.

use std::collections::BTreeSet;

use oxblk_tests::program::Program;

const COMMANDS: &[&str] = &[
    "amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info",
    "map", "measure", "rebase", "resize", "snapshot",
];

/// The long options in the help of a command of qemu-img, without `--`.
fn words(command: &str) -> BTreeSet<String> {
    let help = Program::new("qemu-img").args([command, "--help"]).succeed().out();
    let word = |c: char| c.is_ascii_lowercase() || c == '-';
    help.lines()
        .filter(|line| line.starts_with("  -"))
        .flat_map(|line| line.split("--").skip(1))
        .map(|rest| rest.chars().take_while(|c| word(*c)).collect())
        .collect()
}

/// The shortest prefix of `word` that is not a prefix of another word of `words`; the complete word if there is none.
fn abbreviation<'a>(word: &'a str, words: &BTreeSet<String>) -> &'a str {
    let only = |end: &usize| {
        let prefix = &word[..*end];
        words.iter().filter(|other| other.starts_with(prefix)).count() == 1
    };
    word.get(..(1..=word.len()).find(only).unwrap_or(word.len())).unwrap_or(word)
}

#[test]
fn every_abbreviation_of_qemu_is_accepted() {
    let refused = |reply: &str| reply.contains("unrecognized") || reply.contains("ambiguous");
    for command in COMMANDS {
        let words = words(command);
        assert!(words.len() > 3, "{command}: {words:?}");
        for word in &words {
            let option = format!("--{}", abbreviation(word, &words));
            // There is no operand, so the command ends with an error after the options.
            let ours = Program::oxblk().args(&["img", command, option.as_str()][..]).run().err();
            if refused(&ours) {
                let theirs =
                    Program::new("qemu-img").args(&[command, option.as_str()][..]).run().err();
                assert!(refused(&theirs), "{command} {option}: {ours}");
            }
        }
    }
}

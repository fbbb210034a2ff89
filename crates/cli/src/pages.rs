//! The descriptions of the program and of all its commands.

use crate::flags::page::{Example, Page};
use crate::flags::{Flag, shared};
use crate::{img, io, serve};

/// The arguments in front of the command. None of them has a value to keep.
pub(crate) struct General;

/// The options of the program.
pub(crate) const FLAGS: &[Flag<General>] = &[Flag::help(), Flag::version()];

/// The description of the program.
pub(crate) static PROGRAM: Page = Page {
    path: "",
    about: "create, inspect, convert and serve disk images",
    usage: "COMMAND [ARGUMENTS]",
    operands: &[],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[
        Example {
            about: "copy a raw disk into a qcow2 image",
            arguments: "img convert -p -O qcow2 disk.raw disk.qcow2",
        },
        Example { about: "serve an image over NBD", arguments: "serve disk.qcow2" },
    ],
};

/// All descriptions: the program, its commands, and the commands of its commands.
pub(crate) fn all() -> Vec<&'static Page> {
    let mut pages = vec![&PROGRAM, &img::PAGE, &io::PAGE, &serve::PAGE];
    pages.extend(img::pages());
    pages
}

/// The commands of the program itself.
pub(crate) fn commands() -> Vec<&'static Page> {
    all().into_iter().filter(|page| page.group() == Some("")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::help;

    #[test]
    fn every_option_is_in_the_help_of_its_command_with_all_spellings() {
        for page in all() {
            let help = help::text(page, "tool", &[]);
            let words: Vec<_> = help.split([' ', '\n', ',', ')', '(']).collect();
            for spec in page.flags.specs() {
                for spelling in spec.spellings() {
                    assert!(words.contains(&spelling.as_str()), "{}: {spelling}", page.path);
                }
                let value = spec.value.map_or("", |value| value.name);
                assert!(help.contains(&spec.label()) && help.contains(value), "{}", page.path);
            }
        }
    }

    #[test]
    fn every_command_has_help_in_lines_of_plain_ascii_that_fit_a_terminal() {
        for page in all() {
            let help = help::text(page, "oxblk img convert", &commands());
            assert!(help.is_ascii(), "{}", page.path);
            // Examples and usage lines are not broken, so that they can be copied.
            let text = help.lines().filter(|line| !line.contains("oxblk img"));
            for line in text {
                assert!(line.len() <= 80, "{}: {line}", page.path);
            }
        }
    }

    #[test]
    fn every_command_has_exit_codes_and_its_sentences_have_one_form() {
        for page in all() {
            assert!(page.exit_codes.len() > 1, "{}", page.path);
            assert!(page.group().is_none_or(|_| !page.name().is_empty()));
            let has_commands = all().iter().any(|other| other.group() == Some(page.path));
            assert!(has_commands || !page.examples.is_empty(), "{}", page.path);
            let specs = page.flags.specs();
            let examples = page.examples.iter().map(|example| example.about);
            for text in specs.iter().map(|spec| spec.about).chain(examples).chain([page.about]) {
                assert!(!text.is_empty() && !text.ends_with('.'), "{}: {text}", page.path);
            }
        }
    }

    #[test]
    fn no_spelling_is_declared_twice() {
        for page in all() {
            let mut spellings: Vec<_> =
                page.flags.specs().iter().flat_map(|spec| spec.spellings()).collect();
            spellings.sort();
            let all = spellings.len();
            spellings.dedup();
            assert_eq!(spellings.len(), all, "{}", page.path);
        }
    }

    #[test]
    fn examples_use_declared_options() {
        for page in all().into_iter().filter(|page| !page.path.is_empty()) {
            let specs = page.flags.specs();
            let spellings: Vec<_> = specs.iter().flat_map(|spec| spec.spellings()).collect();
            for example in page.examples {
                let quoted = example.arguments.split('\'').step_by(2);
                for word in quoted.flat_map(str::split_whitespace) {
                    let is_known = spellings.iter().any(|spelling| spelling == word);
                    assert!(!word.starts_with('-') || is_known, "{}: {word}", page.path);
                }
            }
        }
    }
}

//! The descriptions of the program and of all its commands.

use crate::flags::page::{Example, Page};
use crate::flags::{Flag, shared};
use crate::{completions, img, io, manual, serve};

/// The options before the command. The values of these options are not stored.
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

/// All descriptions: the program, its commands, and their subcommands.
pub(crate) fn all() -> Vec<&'static Page> {
    let mut pages = vec![&PROGRAM, &img::PAGE, &io::PAGE, &serve::PAGE];
    pages.extend([&manual::PAGE, &completions::PAGE]);
    pages.extend(img::pages());
    pages
}

/// The commands that `page` reads while it runs; empty for all commands except `io`.
pub(crate) fn inner(page: &Page) -> Vec<&'static Page> {
    if page.path == io::PAGE.path { io::command_pages() } else { Vec::new() }
}

/// The commands of the program itself.
pub(crate) fn commands() -> Vec<&'static Page> {
    all().into_iter().filter(|page| page.group() == Some("")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::spec::Spec;
    use crate::flags::{bash, fish, help, man, zsh};

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
                let command = example.arguments.split(['|', '>']).next().unwrap();
                let quoted = command.split('\'').step_by(2);
                for word in quoted.flat_map(str::split_whitespace) {
                    let is_known = spellings.iter().any(|spelling| spelling == word);
                    assert!(!word.starts_with('-') || is_known, "{}: {word}", page.path);
                }
            }
        }
    }

    #[test]
    fn every_option_is_in_the_manual_page_of_its_command() {
        for page in all() {
            let roff = man::text(page, &commands(), &inner(page));
            let plain = roff.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "");
            let words: Vec<_> = plain.split([' ', '\n', ',', ')', '(']).collect();
            let inner = inner(page);
            let pages = inner.iter().chain([&page]);
            for spelling in pages.flat_map(|page| page.flags.specs()).flat_map(Spec::spellings) {
                assert!(words.contains(&spelling.as_str()), "{}: {spelling}", page.path);
            }
            let sections: Vec<_> =
                roff.lines().filter_map(|line| line.strip_prefix(".SH ")).collect();
            assert_eq!(sections.first(), Some(&"NAME"));
            assert!(sections.contains(&"OPTIONS") && sections.contains(&"EXIT STATUS"));
        }
    }

    #[test]
    fn every_option_and_command_is_in_the_completions_of_each_shell() {
        let pages = all();
        let scripts = [bash::script(&pages), zsh::script(&pages), fish::script(&pages)];
        let [bash, zsh, fish] = scripts.each_ref().map(String::as_str);
        for page in pages {
            // Each script has one part for each command.
            let bash = bash.split("\n    '").find(|part| match page.path {
                "" => part.starts_with("')"),
                path => part.starts_with(&format!(" {path}')")),
            });
            let name = format!("\n_oxblk_{}() {{", page.path.replace(' ', "_"));
            let name = if page.path.is_empty() { "\n_oxblk() {" } else { &name };
            let zsh = zsh.split_once(name).and_then(|(_, rest)| rest.split("\n}\n").next());
            let condition = format!("-n '__oxblk_at {}'", page.path);
            let fish: Vec<_> = fish.lines().filter(|line| line.contains(&condition)).collect();
            let (bash, zsh, fish) = (bash.unwrap(), zsh.unwrap(), fish.join("\n"));
            for spec in page.flags.specs() {
                for spelling in spec.spellings() {
                    assert!(
                        has(bash, &spelling) && has(zsh, &spelling),
                        "{}: {spelling}",
                        page.path
                    );
                    let option = match spelling.strip_prefix("--") {
                        Some(word) => format!("-l {word}"),
                        None => format!("-s {}", spelling.trim_start_matches('-')),
                    };
                    assert!(has(&fish, &option), "{}: {spelling}", page.path);
                }
                for word in spec.value.map(|value| value.words()).unwrap_or_default() {
                    assert!(has(bash, word) && has(zsh, word) && has(&fish, word), "{word}");
                }
            }
            for other in all().into_iter().filter(|other| other.group() == Some(page.path)) {
                let name = other.name();
                assert!(has(bash, name) && has(zsh, name) && has(&fish, name), "{name}");
            }
        }
    }

    /// Whether a script contains `word` as a complete word.
    fn has(script: &str, word: &str) -> bool {
        let ends = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '-');
        script.match_indices(word).any(|(at, _)| {
            ends(script[..at].chars().next_back()) && ends(script[at + word.len()..].chars().next())
        })
    }
}

//! The output of `--help`.

use super::page::{Note, Page};
use super::spec::in_order;
use super::text::{SIZES, about_formats, wrap};

/// The maximum length of a line of text. Usage lines, examples and words may be longer.
const WIDTH: usize = 80;
/// The column of the texts about options.
const COLUMN: usize = 27;

/// The help of a command. `name` is the text that the user types to run the command. `commands` are the subcommands of
/// the command.
pub(crate) fn text(page: &Page, name: &str, commands: &[&Page]) -> String {
    let mut text = format!("Usage: {name} {}\n", page.usage);
    let mut about = page.about.to_owned();
    if let Some(first) = about.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text.push_str(&format!("{about}.\n"));
    if !commands.is_empty() {
        let entries = commands.iter().map(|page| (page.name().to_owned(), page.about.to_owned()));
        list(&mut text, "Commands", 14, entries);
    }
    let specs = in_order(page.flags.specs());
    list(&mut text, "Options", COLUMN, specs.iter().map(|spec| (spec.label(), spec.help())));
    for note in page.notes {
        match note {
            Note::Text(note) => paragraph(&mut text, note),
            Note::List(title, items) => {
                let entries = items.iter().map(|(term, text)| ((*term).into(), (*text).into()));
                list(&mut text, title, COLUMN, entries);
            }
        }
    }
    if page.takes_sizes() {
        paragraph(&mut text, SIZES);
    }
    if page.takes_formats() {
        paragraph(&mut text, &about_formats());
    }
    let codes = page.exit_codes.iter().map(|(code, text)| (code.to_string(), (*text).to_owned()));
    list(&mut text, "Exit codes", 7, codes);
    if !page.examples.is_empty() {
        text.push_str("\nExamples:\n");
    }
    for example in page.examples {
        text.push_str(&format!("  # {}\n  {name} {}\n", example.about, example.arguments));
    }
    if !commands.is_empty() {
        text.push_str(&format!("\n'{name} COMMAND --help' explains a command.\n"));
    }
    text
}

/// Breaks a paragraph into lines that begin with `spaces` spaces.
pub(crate) fn indented(paragraph: &str, spaces: usize) -> String {
    let lines = wrap(paragraph, WIDTH.saturating_sub(spaces)).into_iter();
    lines.map(|line| format!("{:spaces$}{line}\n", "")).collect()
}

fn paragraph(text: &mut String, paragraph: &str) {
    text.push('\n');
    text.push_str(&indented(paragraph, 0));
}

/// A title and a table of two columns. The second column begins at `column`. If the text of the first column is longer,
/// the second column begins on the next line.
fn list(
    text: &mut String,
    title: &str,
    column: usize,
    entries: impl Iterator<Item = (String, String)>,
) {
    text.push_str(&format!("\n{title}:\n"));
    for (term, about) in entries {
        let mut start = format!("  {term}");
        let mut lines = wrap(&about, WIDTH.saturating_sub(column)).into_iter();
        if start.len().saturating_add(2) <= column {
            let first = lines.next().unwrap_or_default();
            start = format!("{start:<column$}{first}");
        }
        text.push_str(start.trim_end());
        text.push('\n');
        for line in lines {
            text.push_str(&format!("{:column$}{line}\n", ""));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_term_has_a_line_of_its_own() {
        let mut text = String::new();
        let entries = [("-a", "one"), ("--abcdef", "two")];
        let entries = entries.map(|(term, about)| (term.to_owned(), about.to_owned()));
        list(&mut text, "T", 8, entries.into_iter());
        assert_eq!(text, "\nT:\n  -a    one\n  --abcdef\n        two\n");
    }
}

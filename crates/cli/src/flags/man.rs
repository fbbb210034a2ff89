//! Manual pages in the `man` macros of roff.

use super::page::{Note, Page};
use super::spec::{Spec, in_order};
use super::text::{SIZES, about_formats};

/// The name of the manual page of a command.
pub(crate) fn title(page: &Page) -> String {
    match page.path {
        "" => "oxblk".to_owned(),
        path => format!("oxblk-{}", path.replace(' ', "-")),
    }
}

/// The manual page of a command. `commands` are the subcommands of the command; `inner` are commands that the program
/// reads while it runs.
pub(crate) fn text(page: &Page, commands: &[&Page], inner: &[&Page]) -> String {
    let title = title(page);
    let name = if page.path.is_empty() { "oxblk".into() } else { format!("oxblk {}", page.path) };
    let version = crate::VERSION;
    let mut roff = format!(".TH \"{}\" 1 \"\" \"oxblk {version}\"\n", title.to_uppercase());
    roff.push_str(&format!(".SH NAME\n{} \\- {}\n", escaped(&title), escaped(page.about)));
    roff.push_str(&format!(".SH SYNOPSIS\n.B {}\n", escaped(&name)));
    line(&mut roff, page.usage);
    if !commands.is_empty() {
        roff.push_str(".SH COMMANDS\n");
        for command in commands {
            item(
                &mut roff,
                &format!("\\fB{}\\fR(1)", escaped(&self::title(command))),
                command.about,
            );
        }
    }
    roff.push_str(".SH OPTIONS\n");
    for spec in in_order(page.flags.specs()) {
        item(&mut roff, &label(spec), &spec.help());
    }
    if !inner.is_empty() {
        roff.push_str(".SH COMMANDS OF A SESSION\n");
    }
    for command in inner {
        inner_command(&mut roff, command);
    }
    notes(&mut roff, page);
    roff.push_str(".SH EXIT STATUS\n");
    for (code, text) in page.exit_codes {
        item(&mut roff, &format!("\\fB{code}\\fR"), text);
    }
    if !page.examples.is_empty() {
        roff.push_str(".SH EXAMPLES\n");
    }
    for example in page.examples {
        roff.push_str(".PP\n");
        line(&mut roff, &format!("{}:", example.about));
        roff.push_str(".PP\n.RS 4\n.nf\n");
        line(&mut roff, &format!("{name} {}", example.arguments));
        roff.push_str(".fi\n.RE\n");
    }
    if let Some(group) = page.group() {
        let group = if group.is_empty() { "oxblk".into() } else { format!("oxblk-{group}") };
        roff.push_str(&format!(".SH SEE ALSO\n.BR {} (1)\n", escaped(&group)));
    }
    roff
}

fn notes(roff: &mut String, page: &Page) {
    let sizes = page.takes_sizes().then(|| SIZES.to_owned());
    let formats = page.takes_formats().then(about_formats);
    let general: Vec<_> = sizes.into_iter().chain(formats).collect();
    if page.notes.is_empty() && general.is_empty() {
        return;
    }
    roff.push_str(".SH NOTES\n");
    for note in page.notes {
        match note {
            Note::Text(text) => paragraph(roff, text),
            Note::List(title, items) => {
                paragraph(roff, &format!("{title}:"));
                for (term, text) in *items {
                    item(roff, &format!("\\fI{}\\fR", escaped(term)), text);
                }
            }
        }
    }
    for text in general {
        paragraph(roff, &text);
    }
}

fn inner_command(roff: &mut String, command: &Page) {
    let usage = format!("\\fB{}\\fR {}", escaped(command.path), escaped(command.usage));
    item(roff, usage.trim_end(), command.about);
    let specs = command.flags.specs();
    if specs.is_empty() && command.notes.is_empty() {
        return;
    }
    roff.push_str(".RS\n");
    for note in command.notes {
        if let Note::Text(text) = note {
            paragraph(roff, text);
        }
    }
    for spec in specs {
        item(roff, &label(spec), &spec.help());
    }
    roff.push_str(".RE\n");
}

/// The spellings in bold and the name of the value in italics.
fn label(spec: &Spec) -> String {
    let label = spec.label();
    let (names, value) = match spec.value {
        Some(value) => (label.strip_suffix(value.name).unwrap_or(&label).trim_end(), value.name),
        None => (label.as_str(), ""),
    };
    let names: Vec<_> =
        names.split(", ").map(|name| format!("\\fB{}\\fR", escaped(name))).collect();
    let value =
        if value.is_empty() { value.into() } else { format!(" \\fI{}\\fR", escaped(value)) };
    format!("{}{value}", names.join(", "))
}

fn item(roff: &mut String, term: &str, text: &str) {
    roff.push_str(&format!(".TP\n{term}\n"));
    line(roff, text);
}

fn paragraph(roff: &mut String, text: &str) {
    roff.push_str(".PP\n");
    line(roff, text);
}

/// Adds one line of text. A dot or a quote at the start of the line is escaped, because roff would read the line as a
/// request.
fn line(roff: &mut String, text: &str) {
    if text.starts_with(['.', '\'']) {
        roff.push_str("\\&");
    }
    roff.push_str(&escaped(text));
    roff.push('\n');
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\(rs").replace('-', "\\-").replace('\'', "\\(aq")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_with_a_meaning_in_roff_are_escaped() {
        let mut roff = String::new();
        line(&mut roff, ".x \\ -o '");
        assert_eq!(roff, "\\&.x \\(rs \\-o \\(aq\n");
    }
}

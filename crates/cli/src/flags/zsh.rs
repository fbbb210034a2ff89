//! The completion script for zsh. Each command becomes a function that calls `_arguments`.

use super::page::Page;
use super::spec::{Kind, Spec, Value};

/// Returns the script for these commands.
pub(crate) fn script(pages: &[&Page]) -> String {
    let mut script = "#compdef oxblk\n# Completion of oxblk for zsh. 'oxblk completions zsh' prints this script.\n\n".to_owned();
    for page in pages {
        command(&mut script, page, pages);
    }
    script.push_str("if [[ $funcstack[1] == _oxblk ]]; then\n    _oxblk \"$@\"\nelse\n    compdef _oxblk oxblk\nfi\n");
    script
}

fn function(page: &Page) -> String {
    match page.path {
        "" => "_oxblk".to_owned(),
        path => format!("_oxblk_{}", path.replace(' ', "_")),
    }
}

fn command(script: &mut String, page: &Page, pages: &[&Page]) {
    let children: Vec<_> = pages.iter().filter(|other| other.group() == Some(page.path)).collect();
    script.push_str(&format!("{}() {{\n", function(page)));
    let mut arguments: Vec<String> = page.flags.specs().into_iter().flat_map(option).collect();
    if children.is_empty() {
        arguments.extend(operands(page.operands));
        script.push_str(&format!(
            "    _arguments -s -S \\\n        {}\n}}\n\n",
            arguments.join(" \\\n        ")
        ));
        return;
    }
    arguments.push("'1: :->command'".to_owned());
    arguments.push("'*:: :->arguments'".to_owned());
    script.push_str("    local context state state_descr line\n    typeset -A opt_args\n    local -a commands\n");
    script.push_str("    commands=(\n");
    for child in &children {
        script.push_str(&format!(
            "        {}\n",
            quoted(&format!("{}:{}", child.name(), child.about))
        ));
    }
    script.push_str("    )\n");
    script.push_str(&format!(
        "    _arguments -C -s \\\n        {}\n",
        arguments.join(" \\\n        ")
    ));
    script.push_str("    case $state in\n    command) _describe -t commands command commands ;;\n    arguments)\n        case $words[1] in\n");
    for child in &children {
        script.push_str(&format!("        {}) {} ;;\n", child.name(), function(child)));
    }
    script.push_str("        esac ;;\n    esac\n}\n\n");
}

/// The specifications of an option, one for each spelling. An option may be repeated.
fn option(spec: &Spec) -> Vec<String> {
    let about = spec.help().replace('\\', "\\\\").replace('[', "\\[").replace(']', "\\]");
    let one = |spelling: String| {
        let text = match spec.value {
            None => format!("*{spelling}[{about}]"),
            // `=` also accepts the value after an equals sign, `+` also directly behind the letter.
            Some(value) => {
                let joint = if spelling.starts_with("--") { '=' } else { '+' };
                format!("*{spelling}{joint}[{about}]:{}:{}", message(value), action(value))
            }
        };
        quoted(&text)
    };
    spec.spellings().into_iter().map(one).collect()
}

fn operands(operands: &[Value]) -> Vec<String> {
    operands
        .iter()
        .map(|value| quoted(&format!("*:{}:{}", message(*value), action(*value))))
        .take(1)
        .collect()
}

fn message(value: Value) -> String {
    value.name.replace(':', "\\:")
}

/// The completions of a value, as an action of `_arguments`.
fn action(value: Value) -> String {
    match value.kind {
        Kind::File => "_files".to_owned(),
        Kind::Choice(_) | Kind::Format => format!("({})", value.words().join(" ")),
        Kind::Size | Kind::Text => " ".to_owned(),
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

//! The completion script for bash.
//!
//! The script finds the command among the words before the cursor. Then it completes the value of the option in front of
//! the cursor, or an option, a command or a file name.

use super::page::Page;
use super::spec::{Kind, Spec, Value};

const HEAD: &str = "\
# Completion of oxblk for bash. 'oxblk completions bash' prints this script.

_oxblk() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local path='' options='' words='' files='' i
    COMPREPLY=()
    # Bash splits --option=value into three words.
    if [[ $cur == '=' ]]; then
        cur=''
    elif [[ $prev == '=' ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case \"$path ${COMP_WORDS[i]}\" in
";

const TAIL: &str = "\
    esac
    if [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- \"$cur\")
    else
        mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$cur\")
    fi
}
complete -F _oxblk oxblk
";

/// Returns the script for these commands.
pub(crate) fn script(pages: &[&Page]) -> String {
    let mut script = HEAD.to_owned();
    let paths: Vec<_> =
        pages.iter().filter(|page| !page.path.is_empty()).map(|page| page.path).collect();
    let patterns: Vec<_> = paths.iter().map(|path| format!("' {path}'")).collect();
    script.push_str(&format!(
        "            {}) path+=\" ${{COMP_WORDS[i]}}\" ;;\n",
        patterns.join("|")
    ));
    script.push_str("        esac\n    done\n    case \"$path\" in\n");
    for page in pages {
        command(&mut script, page, pages);
    }
    script.push_str(TAIL);
    script
}

fn command(script: &mut String, page: &Page, pages: &[&Page]) {
    let path = if page.path.is_empty() { String::new() } else { format!(" {}", page.path) };
    let specs = page.flags.specs();
    let options: Vec<_> = specs.iter().flat_map(|spec| spec.spellings()).collect();
    script.push_str(&format!("    '{path}')\n        options='{}'\n", options.join(" ")));
    script.push_str("        case \"$prev\" in\n");
    for spec in specs {
        if let Some(value) = spec.value {
            script.push_str(&format!("        {}) {} ;;\n", patterns(spec), offer(value)));
        }
    }
    let commands: Vec<_> = pages
        .iter()
        .filter(|other| other.group() == Some(page.path))
        .map(|page| page.name())
        .collect();
    let operands = if commands.is_empty() {
        operand_offer(page.operands)
    } else {
        format!("words='{}'", commands.join(" "))
    };
    script.push_str("        *)\n            if [[ $cur == -* ]]; then\n");
    script.push_str("                words=$options\n            else\n");
    script.push_str(&format!("                {operands}\n            fi ;;\n        esac ;;\n"));
}

/// The spellings of an option as a pattern of `case`.
fn patterns(spec: &Spec) -> String {
    spec.spellings().join("|")
}

/// Returns the shell code that sets the completions of a value.
fn offer(value: Value) -> String {
    match value.kind {
        Kind::File => "files=1".to_owned(),
        Kind::Choice(_) | Kind::Format => format!("words='{}'", value.words().join(" ")),
        Kind::Size | Kind::Text => ":".to_owned(),
    }
}

/// Returns the shell code that sets the completions of the operands. All operands of a command have the same
/// completions: files or, if no operand is a file, words.
fn operand_offer(operands: &[Value]) -> String {
    let files = operands.iter().any(|value| value.kind == Kind::File);
    let words: Vec<_> = operands.iter().flat_map(Value::words).collect();
    if files { "files=1".to_owned() } else { format!("words='{}'", words.join(" ")) }
}

//! The completion script for fish. Each line `complete … -n` adds an option, subcommands, values or file names to the
//! completions of one command.

use super::page::Page;
use super::spec::{Alias, Kind, Spec, Value};

const HEAD: &str = "\
# Completion of oxblk for fish. 'oxblk completions fish' prints this script.

# Whether the words before the cursor select the given command.
function __oxblk_at
    set -l path
    for word in (commandline -opc)[2..-1]
        if contains -- (string join -- ' ' $path $word) $__oxblk_paths
            set path $path $word
        end
    end
    test \"$path\" = \"$argv\"
end

complete -c oxblk -f
";

/// Returns the script for these commands.
pub(crate) fn script(pages: &[&Page]) -> String {
    let mut script = HEAD.to_owned();
    let paths: Vec<_> =
        pages.iter().filter(|page| !page.path.is_empty()).map(|page| quoted(page.path)).collect();
    script.push_str(&format!("set -g __oxblk_paths {}\n", paths.join(" ")));
    for page in pages {
        let line = format!("complete -c oxblk -n {}", quoted(&format!("__oxblk_at {}", page.path)));
        for other in pages.iter().filter(|other| other.group() == Some(page.path)) {
            script.push_str(&format!("{line} -a {} -d {}\n", other.name(), quoted(other.about)));
        }
        for spec in page.flags.specs() {
            script.push_str(&format!("{line}{}\n", option(spec)));
        }
        if page.operands.iter().any(|value| value.kind == Kind::File) {
            script.push_str(&format!("{line} -F\n"));
        }
        let words: Vec<_> = page.operands.iter().flat_map(Value::words).collect();
        if !words.is_empty() {
            script.push_str(&format!("{line} -a {}\n", quoted(&words.join(" "))));
        }
    }
    script
}

fn option(spec: &Spec) -> String {
    let mut text = String::new();
    let names = spec.names;
    let aliases = names.aliases.iter();
    let letters = names.short.into_iter().chain(aliases.clone().filter_map(|alias| match alias {
        Alias::Letter(letter) => Some(*letter),
        Alias::Word(_) | Alias::FullWord(_) => None,
    }));
    for letter in letters {
        text.push_str(&format!(" -s {letter}"));
    }
    let words = names.long.into_iter().chain(aliases.filter_map(|alias| match alias {
        Alias::Word(word) | Alias::FullWord(word) => Some(*word),
        Alias::Letter(_) => None,
    }));
    for word in words {
        text.push_str(&format!(" -l {word}"));
    }
    if let Some(value) = spec.value {
        text.push_str(&match value.kind {
            Kind::File => " -r -F".to_owned(),
            Kind::Choice(_) | Kind::Format => {
                format!(" -x -a {}", quoted(&value.words().join(" ")))
            }
            Kind::Size | Kind::Text => " -x".to_owned(),
        });
    }
    text.push_str(&format!(" -d {}", quoted(&spec.help())));
    text
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

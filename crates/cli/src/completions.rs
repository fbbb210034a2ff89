//! `oxblk completions`: prints the completion script for a shell. The script is generated from the declarations of the
//! commands.

use crate::flags::command::{misused, parse_or_end};
use crate::flags::page::{Example, Page};
use crate::flags::spec::Value;
use crate::flags::{Flag, Line, bash, fish, help, shared, zsh};
use crate::program::{Program, out};

/// The command has no option except `--help`.
struct Arguments;

const FLAGS: &[Flag<Arguments>] = &[Flag::help()];

/// The description of the command.
pub(crate) static PAGE: Page = Page {
    path: "completions",
    about: "print a completion script for a shell",
    usage: "bash|zsh|fish",
    operands: &[Value::choice("SHELL", &["bash", "zsh", "fish"])],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[
        Example {
            about: "install it for bash",
            arguments: "bash > ~/.local/share/bash-completion/completions/oxblk",
        },
        Example {
            about: "install it for zsh, in a folder of $fpath",
            arguments: "zsh > ~/.zfunc/_oxblk",
        },
        Example {
            about: "install it for fish",
            arguments: "fish > ~/.config/fish/completions/oxblk.fish",
        },
    ],
};

/// Runs the command.
pub(crate) fn run(program: &Program, words: Vec<String>, pages: &[&Page]) -> u8 {
    let name = program.called_as();
    let line = Line::new(name, words);
    let help = || help::text(&PAGE, program.name(), &[]);
    let operands = match parse_or_end(program, line, FLAGS, &mut Arguments, help) {
        Ok(operands) => operands,
        Err(code) => return code,
    };
    let script = match operands.as_slice() {
        [shell] if shell == "bash" => bash::script(pages),
        [shell] if shell == "zsh" => zsh::script(pages),
        [shell] if shell == "fish" => fish::script(pages),
        [other] => {
            let message = format_args!("There are no completions for '{other}'");
            return misused(program, name, message);
        }
        _ => return misused(program, name, "Expecting one shell: bash, zsh or fish"),
    };
    out(format_args!("{script}"));
    0
}

//! `oxblk man`: prints manual pages, which are generated from the declarations of the commands.

use crate::flags::command::{misused, parse_or_end};
use crate::flags::page::{Example, Page};
use crate::flags::spec::{Value, long};
use crate::flags::{Flag, Line, help, man, shared};
use crate::program::{Program, out};

#[derive(Default)]
struct Arguments {
    list: bool,
}

const FLAGS: &[Flag<Arguments>] =
    &[Flag::switch(long("list"), "list the names of all pages", |a| &mut a.list), Flag::help()];

/// The description of the command.
pub(crate) static PAGE: Page = Page {
    path: "man",
    about: "print a manual page in roff",
    usage: "[OPTIONS] [COMMAND]",
    operands: &[Value::text("COMMAND")],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[
        Example { about: "read a page", arguments: "img convert | man -l -" },
        Example {
            about: "install a page",
            arguments: "oxblk-img > ~/.local/share/man/man1/oxblk-img.1",
        },
    ],
};

/// Runs the command. `inner` returns the commands that `io` reads while it runs.
pub(crate) fn run(
    program: &Program,
    words: Vec<String>,
    pages: &[&'static Page],
    inner: fn(&Page) -> Vec<&'static Page>,
) -> u8 {
    let mut arguments = Arguments::default();
    let name = program.called_as();
    let line = Line::new(name, words);
    let help = || help::text(&PAGE, program.name(), &[]);
    let operands = match parse_or_end(program, line, FLAGS, &mut arguments, help) {
        Ok(operands) => operands,
        Err(code) => return code,
    };
    if arguments.list {
        for page in pages {
            out(format_args!("{}\n", man::title(page)));
        }
        return 0;
    }
    let wanted = operands.join(" ");
    let found = pages.iter().find(|page| page.path == wanted || man::title(page) == wanted);
    let Some(page) = found else {
        return misused(program, name, format_args!("There is no manual page for '{wanted}'"));
    };
    let commands: Vec<_> =
        pages.iter().copied().filter(|other| other.group() == Some(page.path)).collect();
    out(format_args!("{}", man::text(page, &commands, &inner(page))));
    0
}

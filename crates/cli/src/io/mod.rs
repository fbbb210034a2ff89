//! `io`: reads and writes an image step by step, with qemu-io's commands and output.
//!
//! Commands come from `-c`, or line by line from standard input. The [`table`] lists all commands, and each command is
//! a function in [`commands`]. [`session::Session`] owns the open image and the requests in flight.

mod commands;
mod data;
mod numbers;
mod report;
mod session;
mod table;

use std::io::BufRead;

use oxblk_core::names;

use crate::flags::page::{Example, Note, Page};
use crate::flags::spec::{Value, both};
use crate::flags::{self, Flag, Line, Stop, help, shared};
use crate::program::{Program, err, flush_out, out};
use session::{Opening, Session};

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    Flag::version(),
    Flag::value(
        both('c', "cmd"),
        Value::text("COMMAND"),
        "run COMMAND, which may be given several times; without it, commands are read from standard input",
        |a, command| {
            a.commands.push(command);
            Ok(())
        },
    ),
    Flag::text(both('f', "format"), Value::FORMAT, shared::FORMAT, |a| &mut a.opening.format),
    Flag::switch(both('r', "read-only"), "open the image read-only", |a| &mut a.opening.read_only),
    Flag::switch(
        both('s', "snapshot"),
        "write to a temporary overlay, which is deleted when the image is closed",
        |a| &mut a.opening.temporary,
    ),
    Flag::switch_with(both('n', "nocache"), "the same as -t none", |a| a.opening.set_direct()),
    Flag::switch(
        both('C', "copy-on-read"),
        "store data that is read from a backing file in the image",
        |a| &mut a.opening.copy_on_read,
    ),
    Flag::ignored(both('m', "misalign"), None),
    Flag::switch_with(both('k', "native-aio"), "the same as -i native", |a| {
        a.opening.set_aio("native")
    }),
    Flag::value(
        both('i', "aio"),
        Value::AIO.default("io_uring"),
        "how the host executes requests",
        |a, name| a.opening.set_aio(&name),
    ),
    Flag::value(
        both('t', "cache"),
        Value::CACHE.default("writethrough"),
        "cache mode",
        |a, name| a.opening.set_cache(&name),
    ),
    Flag::value(
        both('d', "discard"),
        Value::DISCARD.default("unmap"),
        "whether discards reach the host",
        |a, name| a.opening.set_discard(&name),
    ),
    // RUST_LOG controls the log.
    Flag::ignored(both('T', "trace"), Some(Value::text("SPEC"))),
    shared::force_share(|a| &mut a.opening.force_share),
    shared::object(),
    shared::image_opts(|a| &mut a.opening.is_options),
    shared::untrusted(),
];

/// The description of `io`.
pub(crate) static PAGE: Page = Page {
    path: "io",
    about: "read and write a disk image step by step",
    usage: "[OPTIONS]... [-c COMMAND]... [FILENAME]",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[Note::Text("The command 'help' lists the commands, and 'help COMMAND' explains one.")],
    exit_codes: &[(0, "success"), (1, "a command failed, or the image cannot be opened or closed")],
    examples: &[
        Example {
            about: "write a pattern, and read it",
            arguments: "-c 'write -P 7 0 64k' -c 'read -P 7 0 64k' disk.qcow2",
        },
        Example { about: "list the commands", arguments: "-c help" },
    ],
};

/// The descriptions of the commands.
pub(crate) fn command_pages() -> Vec<&'static Page> {
    table::COMMANDS.iter().map(|command| &command.page).collect()
}

/// The result of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Failed,
    Quit,
}

struct Arguments {
    commands: Vec<String>,
    opening: Opening,
    filename: Option<String>,
}

/// Runs `io`.
pub(crate) fn run(program: Program, arguments: Vec<String>) -> u8 {
    let arguments = match read(&program, arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let outcome = program.clone().run_to_end(async {
        let session = Session::new(program, arguments.opening.is_options);
        if let Some(filename) = &arguments.filename
            && !session.open(Some(filename), &arguments.opening).await
        {
            return 1;
        }
        let failed = if arguments.commands.is_empty() {
            read_commands(&session).await
        } else {
            run_commands(&session, &arguments.commands).await
        };
        let closed = session.close().await;
        u8::from(failed || !closed)
    });
    outcome.unwrap_or(1)
}

fn read(program: &Program, arguments: Vec<String>) -> Result<Arguments, u8> {
    let mut read = Arguments { commands: Vec::new(), opening: Opening::default(), filename: None };
    let line = Line::new(program.called_as(), arguments);
    let operands = flags::parse(line, FLAGS, &mut read).map_err(|stop| match stop {
        Stop::Help => {
            usage(program);
            0
        }
        Stop::Version => {
            program.print_version();
            0
        }
        Stop::Invalid(fault) => {
            err(format_args!("{fault}\n"));
            usage(program);
            1
        }
        Stop::Refused(refusal, code) => {
            program.refuse(&refusal);
            code
        }
    })?;
    match operands.as_slice() {
        [] => {}
        [filename] => read.filename = Some(filename.clone()),
        _ => {
            usage(program);
            return Err(1);
        }
    }
    if read.opening.is_options && read.opening.format.is_some() {
        program.error("--image-opts and -f are mutually exclusive");
        return Err(1);
    }
    Ok(read)
}

fn usage(program: &Program) {
    out(format_args!("{}", help::text(&PAGE, program.name(), &[])));
}

async fn run_commands(session: &Session, commands: &[String]) -> bool {
    let mut failed = false;
    for line in commands {
        match commands::run(session, line).await {
            Outcome::Done => {}
            Outcome::Failed => failed = true,
            Outcome::Quit => return failed,
        }
    }
    failed
}

async fn read_commands(session: &Session) -> bool {
    let mut failed = false;
    loop {
        out(format_args!("qemu-io> "));
        flush_out();
        // Read the line on another thread, so that requests in flight can complete while the user types.
        let line = oxblk_ring::offload(|| {
            let mut line = Vec::new();
            let read = std::io::stdin().lock().read_until(b'\n', &mut line);
            read.map(|read| (read, names::to_text(&line)))
        });
        match line.await {
            Ok((1.., line)) => match commands::run(session, line.trim_end_matches('\n')).await {
                Outcome::Done => {}
                Outcome::Failed => failed = true,
                Outcome::Quit => return failed,
            },
            _ => return failed,
        }
    }
}

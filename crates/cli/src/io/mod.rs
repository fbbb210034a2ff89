//! `io`: reads and writes an image step by step, with qemu-io's commands and output.
//!
//! Commands come from `-c`, or line by line from standard input. The [`table`] lists them, and each is a function in
//! [`commands`]. [`session::Session`] owns the open image and the requests that are in flight while the next command is
//! read.

mod commands;
mod data;
mod numbers;
mod report;
mod session;
mod table;

use std::io::BufRead;

use oxblk_core::names;

use crate::gate;
use crate::getopt::{Fault, Found, Operands, Opt, Parser, both, long};
use crate::program::{Program, err, flush_out, out};
use session::{Opening, Session};

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('V', "version", false),
    both('c', "cmd", true),
    both('f', "format", true),
    both('r', "read-only", false),
    both('s', "snapshot", false),
    both('n', "nocache", false),
    both('C', "copy-on-read", false),
    both('m', "misalign", false),
    both('k', "native-aio", false),
    both('i', "aio", true),
    both('t', "cache", true),
    both('d', "discard", true),
    both('T', "trace", true),
    both('U', "force-share", false),
    long('O', "object", true),
    long('I', "image-opts", false),
];

const HELP: &str =
    "  -c, --cmd COMMAND        run COMMAND; without it, commands are read from standard input
  -f, --format FORMAT      format of the image; without it, the format is probed
  --image-opts             the file name is a list of options (driver=…,file.filename=…)
  -r, --read-only          open read-only
  -s, --snapshot           forget what is written when the image is closed
  -n, --nocache            the same as -t none
  -t, --cache MODE         cache mode
  -d, --discard MODE       whether discards reach the host: unmap, ignore
  -i, --aio MODE           threads, native or io_uring
  -k, --native-aio         the same as -i native
  -m, --misalign           accepted; changes nothing
  -U, --force-share        do not mind that others write to it
  --untrusted              refuse images that name other files (backing file, data file)
  --object DEFINITION      a secret or other object that images refer to
  -h, --help               this text
  -V, --version            the version

'-c help' lists the commands.
";

/// How a command ended.
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
    let mut parser = Parser::new(program.called_as(), arguments, OPTIONS, Operands::Anywhere)
        .with_common(gate::OPTIONS);
    let mut read = Arguments { commands: Vec::new(), opening: Opening::default(), filename: None };
    loop {
        match parser.next() {
            Ok(Some(found)) => option(program, &mut read, found)?,
            Ok(None) => break,
            Err(Fault { text, .. }) => {
                err(format_args!("{text}\n"));
                usage(program);
                return Err(1);
            }
        }
    }
    let operands = parser.operands();
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

fn option(program: &Program, read: &mut Arguments, Found { id, value }: Found) -> Result<(), u8> {
    let opening = &mut read.opening;
    match id {
        gate::UNTRUSTED => gate::distrust(),
        'h' => {
            usage(program);
            return Err(0);
        }
        'V' => {
            out(format_args!("{} version {}\n", program.name(), crate::version_as(program.name())));
            return Err(0);
        }
        'c' => read.commands.push(value),
        'f' => opening.format = Some(value),
        'I' => opening.is_options = true,
        // No effect: buffers are always aligned, and RUST_LOG controls the log.
        'm' | 'T' => {}
        'O' => crate::objects::define(&value).map_err(|text| {
            program.error(text);
            1_u8
        })?,
        id => opening.letter(id, &value).map_err(|text| {
            program.error(text);
            1_u8
        })?,
    }
    Ok(())
}

fn usage(program: &Program) {
    out(format_args!(
        "Usage: {} [OPTIONS] [-c COMMAND]... [FILENAME]\nReads and writes a disk image step by step.\n\n{HELP}",
        program.name()
    ));
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

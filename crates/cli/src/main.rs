//! oxblk: one program for everything one does with disk images.
//!
//! It answers to QEMU's names: called `qemu-img` or `qemu-io` (by a symlink, say), it is that tool.
//! Under its own name, the first argument says which tool is meant. Either way options, output and
//! exit codes of a tool are the same; only the name before its messages is the one it was called by.
#![forbid(unsafe_code)]

mod cache;
mod gate;
mod getopt;
mod image;
mod img;
mod io;
mod log;
mod objects;
mod program;
mod serve;
mod signals;
mod text;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;

use oxblk_core::names;
use program::{Program, err, finish, out};

/// What `--version` prints.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The version of QEMU whose options and output the tools have.
const QEMU_VERSION: &str = "10.0.0";

/// What `--version` prints behind the name a tool was called by. Programs that call a tool by QEMU's name compare
/// the version with those of QEMU.
pub(crate) fn version_as(name: &str) -> String {
    if name.starts_with("qemu-") {
        format!("{QEMU_VERSION} (oxblk {VERSION})")
    } else {
        VERSION.to_owned()
    }
}

const HELP: &str = "\
Usage: oxblk COMMAND [ARGUMENTS]

  img      create, inspect, convert, compare and resize disk images (as qemu-img)
  io       read and write an image step by step (as qemu-io)
  serve    serve an image over NBD

oxblk COMMAND --help tells more. Called as qemu-img or qemu-io, oxblk is that tool.
";

/// The stack that the tools may need, in bytes: as much as the main thread usually has.
const STACK: usize = 8 << 20;
/// With this much, they run on the main thread.
const ENOUGH_STACK: u64 = 4 << 20;

fn main() -> ExitCode {
    if oxblk_ring::host::main_stack_limit().is_none_or(|limit| limit >= ENOUGH_STACK) {
        return run();
    }
    // `ulimit -s` applies to the main thread alone.
    match std::thread::Builder::new().stack_size(STACK).spawn(run).map(JoinHandle::join) {
        Ok(Ok(code)) => code,
        Ok(Err(panic)) => std::panic::resume_unwind(panic),
        Err(error) => {
            err(format_args!("oxblk: Cannot start a thread with a larger stack: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> ExitCode {
    oxblk_ring::perturb::start_from_environment();
    outlive_file_size_limit();
    // Where that is not allowed, what is allowed has to do.
    drop(oxblk_ring::host::raise_open_files_limit());
    oxblk_ring::host::limit_allocator_arenas();
    let mut arguments = std::env::args_os();
    let called_as = arguments.next().unwrap_or_else(|| OsString::from("oxblk"));
    let called_as = names::from_os(called_as);
    let name = called_as.rsplit('/').next().unwrap_or_default().to_owned();
    let code = match name.as_str() {
        "qemu-img" => tool(img::run, Program::new(name, called_as), arguments),
        "qemu-io" => tool(io::run, Program::new(name, called_as), arguments),
        _ => subcommand(&name, &called_as, arguments),
    };
    finish(code)
}

/// A write beyond `ulimit -f` fails with `EFBIG`, which the user is told, rather than end the process by a signal.
fn outlive_file_size_limit() {
    drop(signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()));
}

fn subcommand(
    name: &str,
    called_as: &str,
    mut arguments: impl Iterator<Item = OsString>,
) -> ExitCode {
    let first = arguments.next().unwrap_or_default();
    let word = names::from_os(first);
    let program = || Program::new(format!("{name} {word}"), format!("{called_as} {word}"));
    match word.as_str() {
        "img" => tool(img::run, program(), arguments),
        "io" => tool(io::run, program(), arguments),
        "serve" => serve::run(arguments),
        "-h" | "--help" | "help" => {
            out(format_args!("{HELP}"));
            ExitCode::SUCCESS
        }
        "-V" | "--version" => {
            out(format_args!("{name} {VERSION}\n"));
            ExitCode::SUCCESS
        }
        "" => {
            err(format_args!("{HELP}"));
            ExitCode::FAILURE
        }
        _ => {
            err(format_args!(
                "{name}: Command not found: {word}\nTry '{called_as} --help' for more info\n"
            ));
            ExitCode::FAILURE
        }
    }
}

/// Runs a tool. Arguments are names, or hold names, so they need not be UTF-8.
fn tool(
    run: fn(Program, Vec<String>) -> u8,
    program: Program,
    arguments: impl Iterator<Item = OsString>,
) -> ExitCode {
    program.be_the_one_that_runs();
    log::start_for_tool();
    ExitCode::from(run(program, arguments.map(names::from_os).collect()))
}

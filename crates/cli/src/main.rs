//! oxblk: one program with all tools for disk images.
//!
//! If the program is started as `qemu-img` or `qemu-io`, for example through a symlink, it runs that tool. Otherwise
//! the first argument selects the tool. The options and exit codes of a tool are the same in both cases. Messages begin with
//! the name of the tool. Under QEMU's name, a tool prints QEMU's version, and no suggestions for misspelt words.
#![forbid(unsafe_code)]

mod bar;
mod completions;
mod flags;
mod gate;
mod getopt;
mod image;
mod img;
mod io;
mod log;
mod manual;
mod objects;
mod pages;
mod program;
mod serve;
mod signals;
mod suggest;
mod text;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;

use flags::page::Page;
use flags::{Line, Stop, help};
use getopt::Operands;
use oxblk_core::names;
use program::{Program, err, finish, out};

/// The version of oxblk.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The version of QEMU whose options and output are the model for the tools.
const QEMU_VERSION: &str = "10.0.0";

/// The version that `--version` prints after `name`. Programs that start a tool under QEMU's name expect a version of
/// QEMU.
pub(crate) fn version_as(name: &str) -> String {
    if name.starts_with("qemu-") {
        format!("{QEMU_VERSION} (oxblk {VERSION})")
    } else {
        VERSION.to_owned()
    }
}

/// The stack size in bytes of the thread that runs the tools if the stack of the main thread is too small. The main thread
/// usually has a stack of this size.
const STACK: usize = 8 << 20;
/// The tools run on the main thread if its stack has at least this size, in bytes.
const ENOUGH_STACK: u64 = 4 << 20;

fn main() -> ExitCode {
    if oxblk_ring::host::main_stack_limit().is_none_or(|limit| limit >= ENOUGH_STACK) {
        return run();
    }
    // `ulimit -s` does not limit a thread with an explicit stack size.
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
    // If the limit cannot be raised, the program works with the lower limit.
    drop(oxblk_ring::host::raise_open_files_limit());
    oxblk_ring::host::limit_allocator_arenas();
    let mut arguments = std::env::args_os();
    let called_as = arguments.next().unwrap_or_else(|| OsString::from("oxblk"));
    let called_as = names::from_os(called_as);
    // Arguments may contain file names, which are not always UTF-8.
    let arguments: Vec<String> = arguments.map(names::from_os).collect();
    let name = called_as.rsplit('/').next().unwrap_or_default().to_owned();
    let code = match name.as_str() {
        "qemu-img" => tool(img::run, Program::new(name, called_as), arguments),
        "qemu-io" => tool(io::run, Program::new(name, called_as), arguments),
        _ => subcommand(&name, &called_as, arguments),
    };
    finish(code)
}

/// Makes a write past `ulimit -f` fail with `EFBIG`. The tool reports this error to the user. Without this setting, a signal
/// would end the process.
fn outlive_file_size_limit() {
    drop(signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()));
}

fn subcommand(name: &str, called_as: &str, arguments: Vec<String>) -> ExitCode {
    let line = Line { operands: Operands::EndOptions, ..Line::new(name, arguments) };
    let mut operands = match flags::parse(line, pages::FLAGS, &mut pages::General) {
        Ok(operands) => operands.into_iter(),
        Err(Stop::Version) => {
            out(format_args!("{name} {VERSION}\n"));
            return ExitCode::SUCCESS;
        }
        Err(Stop::Invalid(fault)) => {
            err(format_args!("{fault}\nTry '{called_as} --help' for more info\n"));
            return ExitCode::FAILURE;
        }
        Err(Stop::Help | Stop::Refused(..)) => {
            out(format_args!("{}", overview(name)));
            return ExitCode::SUCCESS;
        }
    };
    let mut word = operands.next().unwrap_or_default();
    let mut rest: Vec<String> = operands.collect();
    if word == "help" && !rest.is_empty() {
        // `help img convert` is `img convert --help`.
        word = rest.remove(0);
        rest.push("--help".to_owned());
    }
    let program = || Program::new(format!("{name} {word}"), format!("{called_as} {word}"));
    match word.as_str() {
        "img" => tool(img::run, program(), rest),
        "io" => tool(io::run, program(), rest),
        "serve" => serve::run(rest),
        "man" => ExitCode::from(manual::run(&program(), rest, &pages::all(), pages::inner)),
        "completions" => ExitCode::from(completions::run(&program(), rest, &pages::all())),
        "help" => {
            out(format_args!("{}", overview(name)));
            ExitCode::SUCCESS
        }
        "" => {
            err(format_args!("{}", overview(name)));
            ExitCode::FAILURE
        }
        _ => {
            err(format_args!("{name}: Command not found: {word}\n"));
            if img::has_command(&word) {
                err(format_args!("Did you mean '{called_as} img {word}'?\n"));
            } else {
                let commands = pages::commands().into_iter().map(Page::name);
                suggest::print(&program(), &word, commands, |word| format!("{called_as} {word}"));
            }
            err(format_args!("Try '{called_as} --help' for more info\n"));
            ExitCode::FAILURE
        }
    }
}

fn overview(name: &str) -> String {
    help::text(&pages::PROGRAM, name, &pages::commands())
}

/// Runs a tool.
fn tool(run: fn(Program, Vec<String>) -> u8, program: Program, arguments: Vec<String>) -> ExitCode {
    program.set_running();
    log::start_for_tool();
    ExitCode::from(run(program, arguments))
}

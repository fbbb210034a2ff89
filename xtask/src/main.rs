//! Development tasks, run as `cargo xtask TASK`.
//!
//! - `soak` builds the test harnesses for a long run, optimised but with checks enabled, and starts them.
//! - `differential` runs generated command lines with QEMU's tools and with oxblk, and compares the results.
//! - `fresh-machine` creates a minimal Debian root if it does not exist, and runs a command in it, by default both commands
//!   of the README (`scripts/fresh-machine`).

use std::process::{Command, ExitCode};

const USAGE: &str = "\
Usage: cargo xtask soak|differential [OPTIONS]   (--help lists them)
       cargo xtask fresh-machine RELEASE DIRECTORY [COMMAND ...]";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some(name @ ("soak" | "differential")) => harness(name, args),
        Some("fresh-machine") => run(Command::new("scripts/fresh-machine").args(args)),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn harness(name: &str, args: impl Iterator<Item = String>) -> ExitCode {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let program = ["--package", "oxblk-tests", "--bin", name, "--"];
    run(Command::new(cargo).args(["run", "--quiet", "--profile", "soak"]).args(program).args(args))
}

/// Runs a command in the workspace's root directory.
fn run(command: &mut Command) -> ExitCode {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    match command.current_dir(workspace).status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: cannot run {}: {error}", command.get_program().display());
            ExitCode::FAILURE
        }
    }
}

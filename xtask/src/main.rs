//! Development tasks, run as `cargo xtask TASK`.
//!
//! `soak` builds the long run of the test harnesses, optimised but with checks on, and starts it; `differential`
//! runs generated command lines through QEMU's tools and oxblk.

use std::process::{Command, ExitCode};

const USAGE: &str = "Usage: cargo xtask soak|differential [OPTIONS]   (--help lists them)";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some(name @ ("soak" | "differential")) => harness(name, args),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn harness(name: &str, args: impl Iterator<Item = String>) -> ExitCode {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "run",
            "--quiet",
            "--profile",
            "soak",
            "--package",
            "oxblk-tests",
            "--bin",
            name,
            "--",
        ])
        .args(args)
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: cannot run cargo: {error}");
            ExitCode::FAILURE
        }
    }
}

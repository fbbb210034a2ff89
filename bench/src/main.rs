//! Comparisons of oxblk with its peers: `cargo run --release -p oxblk-bench -- CASE [OPTION…]`.
//!
//! A case is a module with a `run` function and one line in [`CASES`]. The contenders of a case run alternately on
//! the same data in one run of the program, because the machine's speed drifts. [`report`] prints medians and ratios
//! as a table and as JSON.

mod engine;
mod filters;
mod metadata;
mod nbd;
mod options;
mod random;
mod report;
mod tools;

use std::process::ExitCode;

/// The result of a case. If the case cannot run, the error is the message to print.
type CaseResult = Result<(), String>;

/// The name of a case, the subject of its comparison, and its function. The function receives the remaining arguments.
type Case = (&'static str, &'static str, fn(&[String]) -> CaseResult);

const CASES: &[Case] = &[
    ("engine", "4 KiB random reads at depth 32: the engine, a bare ring, compio, fio", engine::run),
    ("filters", "4 KiB requests at depth 32 through idle filters; O_DIRECT", filters::run),
    ("metadata", "check and snapshots of a disk of 1 TiB: oxblk img, qemu-img", metadata::run),
    ("nbd", "fio over NBD: oxblk serve, qemu-nbd", nbd::run),
    ("tools", "convert, bench, compare and their memory: oxblk img, qemu-img", tools::run),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = args.split_first() else { return usage() };
    let Some((_, _, run)) = CASES.iter().find(|(case, _, _)| case == name) else { return usage() };
    match run(rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("oxblk-bench {name}: {message}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: oxblk-bench CASE [OPTION...]");
    for (name, about, _) in CASES {
        eprintln!("  {name:<10} {about}");
    }
    ExitCode::FAILURE
}

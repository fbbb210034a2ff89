//! Runs generated command lines with QEMU's tools and with oxblk, and compares the results. `cargo xtask differential` builds
//! and starts this program.

use std::process::ExitCode;

use oxblk_tests::differential::generator::{Case, run};

const USAGE: &str = "\
Usage: cargo xtask differential [--count N] [--seed N] [--jobs N] [--list]

Runs --count (5000) command lines from --seed (1) on through both tools and reports every difference in
text, exit code or resulting bytes. --list prints the command lines alone.";

fn main() -> ExitCode {
    let (mut count, mut seed, mut jobs) =
        (5000, 1, std::thread::available_parallelism().map_or(1, usize::from));
    let mut list = false;
    let mut args = std::env::args().skip(1);
    while let Some(option) = args.next() {
        let mut number = || args.next().and_then(|value| value.parse::<u64>().ok());
        match option.as_str() {
            "--list" => list = true,
            "--count" => count = number().unwrap_or(count),
            "--seed" => seed = number().unwrap_or(seed),
            "--jobs" => jobs = number().and_then(|n| usize::try_from(n).ok()).unwrap_or(jobs),
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    if list {
        for seed in seed..seed + count {
            println!("{seed}: {}", Case::new(seed).line());
        }
        return ExitCode::SUCCESS;
    }
    let outcome = run(seed, count, jobs);
    for difference in &outcome.differences {
        println!("=== seed {}\n$ {}\n{}", difference.seed, difference.line, difference.text);
    }
    println!(
        "{} command lines compared ({} of them succeed), {} differ; QEMU crashed on {} more",
        outcome.compared,
        outcome.succeeded,
        outcome.differences.len(),
        outcome.crashed
    );
    if outcome.differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

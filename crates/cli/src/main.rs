//! oxblk: one program for everything one does with disk images.
#![forbid(unsafe_code)]

mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(word) if word == "serve" => serve::run(arguments),
        _ => ExitCode::FAILURE,
    }
}

//! Images that are damaged or made to do harm.
//!
//! A [`Case`] is a name, a way to spoil a good image and what must come of it ([`Expect`]). Each case
//! goes through every tool of the program, under a bound on time and memory ([`through_the_program`]):
//! whatever is expected, a tool must end by itself, with an exit code, without a panic and in one
//! line. A new format brings a table of cases; the rest is here.

pub mod image;
pub mod mutate;
pub mod qcow2;
pub mod qcow2_tables;

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use crate::program::{Program, Reply};
use image::Image;

/// The most address space that a tool may take for a small image, in bytes: thread stacks and
/// allocator arenas are counted here, so it is far more than is ever touched.
const ADDRESS_SPACE: u64 = 3 << 30;

/// The longest that a tool may take over a small image.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// What must come of a spoiled image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// No tool opens it; the error has this text.
    Refused(&'static str),
    /// `check` finds errors (exit code 2), and its output has this text. Reads and writes may work or
    /// fail.
    Damaged(&'static str),
    /// As [`Expect::Damaged`], and a write fails rather than spoil more.
    NotWritable(&'static str),
    /// `check` finds leaks alone (exit code 3).
    Leaking,
    /// It opens, reads and checks clean after all.
    Harmless,
    /// It opens and checks clean, but cannot be opened for writing; the error has this text.
    ReadOnly(&'static str),
    /// Nothing but to end without a crash.
    Survives,
}

/// One spoiled image.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Says what is wrong with it.
    pub name: &'static str,
    /// Spoils a good image.
    pub spoil: fn(&mut Image),
    /// What must come of it.
    pub expect: Expect,
}

/// What the tools said of an image.
struct Verdict {
    info: Reply,
    check: Reply,
    read: Reply,
    write: Reply,
}

/// Runs oxblk in a directory under the bounds; it must end as a program should.
///
/// # Panics
/// When it is killed, panics, or fails without saying why.
pub fn bounded(directory: &Path, args: &[&str]) -> Reply {
    let reply = Program::oxblk()
        .args(args)
        .directory(directory)
        .time_limit(TIME_LIMIT)
        .address_space(ADDRESS_SPACE)
        .run();
    let line = args.join(" ");
    let said = reply.err();
    assert!(reply.status.code().is_some(), "oxblk {line} was killed ({}): {said}", reply.code());
    assert!(!said.contains("panicked"), "oxblk {line} panicked: {said}");
    assert!(
        reply.code() == 0 || !reply.stdout.is_empty() || !said.is_empty(),
        "oxblk {line} failed without a word"
    );
    reply
}

/// Takes every case through the program, each in a fresh directory, and reports all that went wrong.
///
/// # Panics
/// When any case did not come out as expected.
pub fn through_the_program(format: &str, good: &Image, cases: &[Case]) {
    let mut wrong = Vec::new();
    for case in cases {
        let mut image = good.clone();
        (case.spoil)(&mut image);
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let outcome =
            std::panic::catch_unwind(|| judge(format, scratch.path(), &image, case.expect));
        let message = match outcome {
            Ok(Ok(())) => continue,
            Ok(Err(message)) => message,
            Err(panic) => crate::panic_text(&*panic),
        };
        wrong.push(format!("{}: {message}", case.name));
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn judge(format: &str, directory: &Path, image: &Image, expect: Expect) -> Result<(), String> {
    const NAME: &str = "image";
    std::fs::write(directory.join(NAME), image.bytes()).expect("the image's file");
    let run = |args: &[&str]| bounded(directory, args);
    let info = run(&["img", "info", "-f", format, NAME]);
    let check = run(&["img", "check", "-f", format, NAME]);
    // What walks the whole image: it may fail, but must end.
    run(&["img", "map", "-f", format, NAME]);
    run(&["img", "measure", "-f", format, "-O", "qcow2", NAME]);
    let read = run(&["io", "-r", "-f", format, "-c", "read 0 320k", NAME]);
    let write = run(&["io", "-f", format, "-c", "write -P 9 0 64k", "-c", "write 1M 64k", NAME]);
    verdict(&Verdict { info, check, read, write }, expect)?;
    if head(&directory.join(NAME)) != image.bytes().get(..8).unwrap_or(image.bytes()) {
        return Err("the write went over the header".to_owned());
    }
    Ok(())
}

/// The first 8 bytes of a file, or all of a shorter one: a write through a spoiled table may have made
/// it too long to read.
fn head(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).expect("the image's file");
    file.take(8).read_to_end(&mut bytes).expect("the image's file");
    bytes
}

fn verdict(tools: &Verdict, expect: Expect) -> Result<(), String> {
    let refused = |what: &str, reply: &Reply, text: &str| {
        if reply.code() == 1 && reply.err().contains(text) {
            return Ok(());
        }
        Err(format!("{what} should fail with {text:?}, got {}: {}", reply.code(), reply.err()))
    };
    let code = |what: &str, reply: &Reply, expected: i32| {
        if reply.code() == expected {
            return Ok(());
        }
        Err(format!(
            "{what} should end with {expected}, got {}: {}{}",
            reply.code(),
            reply.out(),
            reply.err()
        ))
    };
    let said = |reply: &Reply, text: &str| {
        let all = reply.out() + &reply.err();
        if all.contains(text) { Ok(()) } else { Err(format!("check does not say {text:?}: {all}")) }
    };
    match expect {
        Expect::Refused(text) => {
            refused("check", &tools.check, text)?;
            refused("info", &tools.info, text)?;
            refused("read", &tools.read, text)?;
            refused("write", &tools.write, text)
        }
        Expect::Damaged(text) => {
            code("check", &tools.check, 2)?;
            said(&tools.check, text)
        }
        Expect::NotWritable(text) => {
            code("check", &tools.check, 2)?;
            said(&tools.check, text)?;
            code("write", &tools.write, 1)
        }
        Expect::Leaking => {
            code("check", &tools.check, 3)?;
            code("read", &tools.read, 0)
        }
        Expect::Harmless => {
            code("info", &tools.info, 0)?;
            code("check", &tools.check, 0)?;
            code("read", &tools.read, 0)
        }
        Expect::ReadOnly(text) => {
            code("check", &tools.check, 0)?;
            code("read", &tools.read, 0)?;
            refused("write", &tools.write, text)
        }
        Expect::Survives => Ok(()),
    }
}

//! qcow2 images with every pair of creation options. Each tool creates images, uses the images of the other tool, and checks
//! all images.
//!
//! [`pairs`] makes a table that contains each allowed pair of values of two options. oxblk refuses the same combinations as
//! `qemu-img`, with the same messages.

mod pairs;

use std::path::{Path, PathBuf};

use oxblk_tests::differential::Differential;
use oxblk_tests::differential::normalise::Rules;
use oxblk_tests::program::Tool::{Img, Io};
use oxblk_tests::program::{Program, Tool};
use serde_json::Value;

use pairs::{Row, rows};

const SECRET: &str = "secret,id=key,data=a passphrase";

/// Returns the words that choose an image of a row on a command line.
fn named(row: &Row, name: &str) -> Vec<String> {
    let words: &[&str] = match row.encryption() {
        None => &["-f", "qcow2", name],
        Some(_) => &[
            "--object",
            SECRET,
            "--image-opts",
            &format!("driver=qcow2,file.filename={name},encrypt.key-secret=key"),
        ],
    };
    words.iter().map(ToString::to_string).collect()
}

/// Returns a command line: the words before the image and the words that choose the image.
fn command(row: &Row, first: &[&str], name: &str) -> Vec<String> {
    first.iter().map(ToString::to_string).chain(named(row, name)).collect()
}

/// Returns the output of `info` without the fields in which two sound images may differ.
fn info(program: Program, row: &Row, directory: &Path) -> Value {
    let reply = program.args(command(row, &["info", "--output=json"], "disk")).directory(directory);
    let mut info = serde_json::from_slice(&reply.succeed().stdout).expect("JSON");
    blank(&mut info, false);
    info
}

/// Clears values that differ between sound images: sizes of files, iteration counts and UUIDs.
fn blank(value: &mut Value, in_child: bool) {
    const DRAWN: [&str; 4] = ["actual-size", "iters", "master-key-iters", "uuid"];
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                if DRAWN.contains(&key.as_str()) || (in_child && key == "virtual-size") {
                    *value = Value::Null;
                }
                blank(value, in_child || key == "children");
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| blank(value, in_child)),
        _ => {}
    }
}

/// Returns the commands of one step: writes of several lengths, zero writes and a discard.
fn writes(step: u8) -> Vec<String> {
    let places = [(0, 512), (1 << 20, 70_000), (2_500_000, 3000), (3 << 20, 1 << 20), (700_000, 9)];
    let shift = u32::from(step) * 5120;
    places
        .iter()
        .zip(1..)
        .map(|((offset, len), n)| format!("write -q -P {} {} {len}", step * 16 + n, offset + shift))
        .chain([
            format!("write -q -z {} 100000", 1_100_000 + shift),
            format!("write -q -z -u {} 200k", 3_200_000 + shift),
            format!("discard -q {} 128k", (1 << 20) + shift),
        ])
        .collect()
}

fn io(row: &Row, step: u8) -> Vec<String> {
    let mut words = named(row, "disk");
    for write in writes(step) {
        words.extend(["-c".to_owned(), write]);
    }
    words
}

fn qemu(tool: Tool) -> Program {
    Program::new(tool.qemu_name())
}

fn ours(tool: Tool) -> Program {
    Program::oxblk().arg(tool.subcommand())
}

fn check(row: &Row, directory: &Path) {
    for program in [qemu(Img), ours(Img)] {
        let reply = program.args(command(row, &["check"], "disk")).directory(directory).run();
        assert!(reply.code() == 0, "{row}: check: {}{}", reply.out(), reply.err());
    }
}

/// Returns the contents as a raw image. Both tools must read the same.
fn contents(row: &Row, directory: &Path) -> Vec<u8> {
    let read = |program: Program, out: &str| -> Vec<u8> {
        let mut words = command(row, &["convert", "-O", "raw"], "disk");
        words.push(out.to_owned());
        program.args(words).directory(directory).succeed();
        std::fs::read(directory.join(out)).expect("a raw image")
    };
    let (theirs, own) = (read(qemu(Img), "theirs.raw"), read(ours(Img), "ours.raw"));
    assert!(theirs == own, "{row}: the tools read different contents");
    own
}

fn each_directory(both: &Differential) -> Vec<PathBuf> {
    let [first, _] = both.our_directories();
    vec![both.qemu_directory(), first]
}

fn run(row: &Row) {
    let both = Differential::new().rules(Rules { disk_size: true, ..Rules::default() });
    let base: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 999).to_le_bytes()[0]).collect();
    both.file("base", &base);
    let options = row.options();
    let mut create = vec!["create", "--object", SECRET, "-f", "qcow2"];
    if !options.is_empty() {
        create.extend(["-o", options.as_str()]);
    }
    create.extend(["disk", "5000192"]);
    let created = both.same(Img, &create);
    assert!(created.code() == 0, "{row}: {}", created.err());
    let [first, _] = both.our_directories();
    let theirs = info(qemu(Img), row, &both.qemu_directory());
    // Both tools print the same fields for the images of both tools.
    for directory in each_directory(&both) {
        assert_eq!(info(ours(Img), row, &directory), theirs, "{row}: info");
    }
    assert_eq!(info(qemu(Img), row, &first), theirs, "{row}: info of our image by qemu-img");
    // Each tool writes to its own image, then to the image of the other tool.
    for step in 0..3 {
        let swapped = step % 2 == 1;
        for (directory, is_theirs) in each_directory(&both).into_iter().zip([true, false]) {
            let program = if is_theirs == swapped { ours(Io) } else { qemu(Io) };
            program.args(io(row, step)).directory(&directory).succeed();
            check(row, &directory);
        }
        let [theirs, own] = [both.qemu_directory(), first.clone()];
        let (theirs, own) = (contents(row, &theirs), contents(row, &own));
        assert!(row.begins_as_noise() || theirs == own, "{row}: step {step}");
    }
    assert_eq!(
        info(ours(Img), row, &first),
        info(qemu(Img), row, &both.qemu_directory()),
        "{row}: info after writes"
    );
    let mut measure = vec!["measure", "--object", SECRET, "-O", "qcow2", "--output=json"];
    let measured = row.options_for_measure();
    if !measured.is_empty() {
        measure.extend(["-o", measured.as_str()]);
    }
    measure.extend(["--size", "5000192"]);
    both.same(Img, &measure);
}

/// Runs every `of`th row, from `part` on, so that the tests run in parallel.
fn run_part(part: usize, of: usize) {
    for row in rows().iter().skip(part).step_by(of) {
        run(row);
    }
}

#[test]
fn images_with_every_pair_of_options_are_the_same_to_both_tools_1() {
    run_part(0, 4);
}

#[test]
fn images_with_every_pair_of_options_are_the_same_to_both_tools_2() {
    run_part(1, 4);
}

#[test]
fn images_with_every_pair_of_options_are_the_same_to_both_tools_3() {
    run_part(2, 4);
}

#[test]
fn images_with_every_pair_of_options_are_the_same_to_both_tools_4() {
    run_part(3, 4);
}

//! Command lines of `io`: its options, and the commands given by `-c`.

use crate::random::Random;

use super::case::{choose, option_words};
use super::img::{Opt, flag, long, value};
use super::values::Kind;

const OPTIONS: &[Opt] = &[
    value('f', "format", Kind::Format),
    flag('r', "read-only"),
    flag('s', "snapshot"),
    flag('n', "nocache"),
    flag('C', "copy-on-read"),
    flag('m', "misalign"),
    value('i', "aio", Kind::Aio),
    value('t', "cache", Kind::Cache),
    value('d', "discard", Kind::Discard),
    flag('U', "force-share"),
    long("object", Some(Kind::Object)),
    long("image-opts", None),
];

/// A command, the letters of its options (a colon follows a letter that takes a value), and its operands.
type Form = (&'static str, &'static str, &'static [Kind]);

const COMMANDS: &[Form] = &[
    ("read", "abCqrvP:s:l:", &[Kind::Offset, Kind::Block]),
    ("readv", "CqrvP:", &[Kind::Offset, Kind::Block, Kind::Block]),
    ("write", "bcCfnquzP:s:", &[Kind::Offset, Kind::Block]),
    ("write", "zuqn", &[Kind::Offset, Kind::Block]),
    ("writev", "CfqP:", &[Kind::Offset, Kind::Block, Kind::Block]),
    ("aio_read", "CiqrvP:", &[Kind::Offset, Kind::Block]),
    ("aio_write", "CfiquzP:", &[Kind::Offset, Kind::Block]),
    ("discard", "Cq", &[Kind::Offset, Kind::Block]),
    ("alloc", "", &[Kind::Offset, Kind::Block]),
    ("map", "", &[]),
    ("flush", "", &[]),
    ("length", "", &[]),
    ("info", "", &[]),
    ("truncate", "m:", &[Kind::Size]),
    ("reopen", "rwc:o:", &[]),
    ("open", "snCrUo:t:d:i:", &[Kind::Image]),
    ("close", "", &[]),
    ("aio_flush", "", &[]),
    ("sigraise", "", &[Kind::Count]),
    ("sleep", "", &[Kind::Count]),
    ("quit", "", &[]),
    ("bogus", "", &[]),
    ("", "", &[]),
];

fn kind_of(command: &str, letter: char) -> Kind {
    match (command, letter) {
        (_, 'P') => Kind::Pattern,
        (_, 'm') => Kind::Preallocation,
        (_, 'c' | 't') => Kind::Cache,
        (_, 'o') => Kind::RunOptions,
        (_, 'd') => Kind::Discard,
        (_, 'i') => Kind::Aio,
        _ => Kind::Block,
    }
}

/// One command for `-c`.
pub(super) fn command(random: &mut Random) -> String {
    let (name, letters, operands) = *random.pick(COMMANDS);
    let mut words = vec![name.to_owned()];
    let letters: Vec<char> = letters.chars().collect();
    for (index, letter) in letters.iter().enumerate() {
        if *letter == ':' || !random.one_in(letters.len() as u64 / 2 + 3) {
            continue;
        }
        words.push(format!("-{letter}"));
        if letters.get(index + 1) == Some(&':') {
            words.push(choose(random, kind_of(name, *letter)));
        }
    }
    if random.one_in(25) {
        words.push("-Z".to_owned());
    }
    for kind in operands {
        if !random.one_in(20) {
            words.push(choose(random, *kind));
        }
    }
    if random.one_in(25) {
        words.push("x".to_owned());
    }
    words.join(" ")
}

/// The arguments of one run.
pub(super) fn arguments(random: &mut Random) -> Vec<String> {
    let mut words = Vec::new();
    for option in OPTIONS {
        if random.one_in(14) {
            words.extend(option_words(random, *option));
        }
    }
    for _ in 0..random.within(1, 4) {
        words.push("-c".to_owned());
        words.push(command(random));
    }
    if !random.one_in(20) {
        let is_options = words.iter().any(|word| word == "--image-opts");
        let kind = if is_options { Kind::ImageOptions } else { Kind::Image };
        words.push(choose(random, kind));
    }
    words
}

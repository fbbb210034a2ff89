//! A command line that a seed determines.

use crate::program::Tool;
use crate::random::Random;

use super::img::{COMMANDS, Command, Opt};
use super::io;
use super::values::Kind;

/// A command line for QEMU's tool and for oxblk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The tool.
    pub tool: Tool,
    /// Its arguments.
    pub arguments: Vec<String>,
}

impl Case {
    /// Makes the command line of a seed.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        loop {
            let case = if random.one_in(4) {
                Self { tool: Tool::Io, arguments: io::arguments(&mut random) }
            } else {
                let command = *random.pick(COMMANDS);
                Self { tool: Tool::Img, arguments: img(&mut random, &command) }
            };
            if case.is_short() {
                return case;
            }
        }
    }

    /// Returns the command line in the form that a shell accepts.
    pub fn line(&self) -> String {
        let quoted = |word: &String| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:+,=%".contains(c);
            if !word.is_empty() && word.chars().all(plain) {
                word.clone()
            } else {
                format!("'{}'", word.replace('\'', "'\\''"))
            }
        };
        let words: Vec<_> = self.arguments.iter().map(quoted).collect();
        format!("{} {}", self.tool.qemu_name(), words.join(" "))
    }

    /// Whether the command ends soon and needs little space with every tool. This is false for a preallocation of a huge size.
    fn is_short(&self) -> bool {
        let huge =
            |word: &String| ["E", "99999", "4294967296"].iter().any(|size| word.contains(size));
        let allocates =
            |word: &String| ["falloc", "full", "metadata"].iter().any(|mode| word.contains(mode));
        let sleeps = |word: &String| word.starts_with("sleep");
        let takes_long = |word: &String| allocates(word) || sleeps(word);
        !(self.arguments.iter().any(huge) && self.arguments.iter().any(takes_long))
    }
}

/// Chooses a value for an option or operand; most of the chosen values are good.
pub(super) fn choose(random: &mut Random, kind: Kind) -> String {
    let (good, bad, odd) = kind.pool();
    let from = match random.below(100) {
        0..72 => good,
        72..86 => bad,
        _ => odd,
    };
    (*random.pick(from)).to_owned()
}

/// Returns an option in one of the forms that a user may write, sometimes abbreviated or with a value that it does not take.
pub(super) fn option_words(random: &mut Random, option: Opt) -> Vec<String> {
    let value = option.value.map(|kind| choose(random, kind));
    let short = option.short.filter(|_| option.long.is_none() || !random.one_in(3));
    match (short, option.long, value) {
        (Some(letter), _, Some(value)) if random.one_in(5) => vec![format!("-{letter}{value}")],
        (Some(letter), _, Some(value)) => vec![format!("-{letter}"), value],
        (Some(letter), _, None) => vec![format!("-{letter}")],
        (None, Some(long), value) => {
            let long = if random.one_in(6) && long.len() > 3 {
                let len = usize::try_from(random.within(2, long.len() as u64 - 1)).expect("short");
                &long[..len]
            } else {
                long
            };
            match value {
                Some(value) if random.one_in(2) => vec![format!("--{long}={value}")],
                Some(value) => vec![format!("--{long}"), value],
                None if random.one_in(30) => vec![format!("--{long}=x")],
                None => vec![format!("--{long}")],
            }
        }
        (None, None, _) => Vec::new(),
    }
}

fn img(random: &mut Random, command: &Command) -> Vec<String> {
    let mut groups: Vec<Vec<String>> = Vec::new();
    if !random.one_in(12) {
        let main = *random.pick(command.main);
        groups.push(main.iter().map(|word| (*word).to_owned()).collect());
    }
    for option in command.options {
        if random.one_in(command.options.len() as u64 / 2 + 3) {
            groups.push(option_words(random, *option));
        }
    }
    if random.one_in(40) {
        groups.push(vec![(*random.pick(&["--bogus", "-Z", "--", "-", "--=x", "-o"])).to_owned()]);
    }
    let is_options =
        groups.iter().flatten().any(|word| word == "--image-opts" || word == "--source-image-opts");
    for (index, kind) in command.operands.iter().enumerate() {
        if random.one_in(25) {
            continue;
        }
        let kind = match kind {
            Kind::Image if is_options && !random.one_in(8) => Kind::ImageOptions,
            Kind::NewImage if index == 1 && groups.iter().flatten().any(|word| word == "-n") => {
                *random.pick(&[Kind::Image, Kind::NewImage])
            }
            kind => *kind,
        };
        groups.push(vec![choose(random, kind)]);
    }
    if random.one_in(30) {
        groups.push(vec!["extra".to_owned()]);
    }
    // Move one option with its value, or one operand, to a random place.
    if random.one_in(3) && groups.len() > 1 {
        let from = usize::try_from(random.below(groups.len() as u64)).expect("an index");
        let group = groups.remove(from);
        let to = usize::try_from(random.below(groups.len() as u64 + 1)).expect("an index");
        groups.insert(to, group);
    }
    let mut words = vec![command.name.to_owned()];
    words.extend(groups.into_iter().flatten());
    words
}

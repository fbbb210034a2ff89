//! The description of a command.

use super::Specs;
use super::spec::Value;

/// A command, with all texts of its help and its manual page.
pub(crate) struct Page {
    /// The words after the name of the program: `img convert`. Empty for the program itself.
    pub(crate) path: &'static str,
    /// One phrase, which begins with a verb in lower case.
    pub(crate) about: &'static str,
    /// The arguments after the name of the command.
    pub(crate) usage: &'static str,
    /// The operands. Completions offer their values. Help and manual pages explain sizes and formats if an operand or the value
    /// of an option needs this ([`Self::takes_sizes`], [`Self::takes_formats`]).
    pub(crate) operands: &'static [Value],
    pub(crate) flags: &'static dyn Specs,
    pub(crate) notes: &'static [Note],
    /// The exit codes with their meanings.
    pub(crate) exit_codes: &'static [(u8, &'static str)],
    pub(crate) examples: &'static [Example],
}

/// A part of a description.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Note {
    /// A paragraph.
    Text(&'static str),
    /// Terms with their meanings, under a title.
    List(&'static str, &'static [(&'static str, &'static str)]),
}

/// An example of a command line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Example {
    /// One phrase, which begins with a verb in lower case.
    pub(crate) about: &'static str,
    /// The arguments after the name of the command.
    pub(crate) arguments: &'static str,
}

impl Page {
    /// The last word of the path: the name of the command in its group.
    pub(crate) fn name(&self) -> &'static str {
        self.path.rsplit(' ').next().unwrap_or_default()
    }

    /// The path without its last word: the command that has this command as a subcommand. `None` for the program
    /// itself.
    pub(crate) fn group(&self) -> Option<&'static str> {
        match self.path.rsplit_once(' ') {
            Some((group, _)) => Some(group),
            None => (!self.path.is_empty()).then_some(""),
        }
    }

    /// Whether any value or operand is a size, which may have a suffix (`k`, `M`, …).
    pub(crate) fn takes_sizes(&self) -> bool {
        self.has_kind(super::spec::Kind::Size)
    }

    /// Whether any value or operand is the name of a format.
    pub(crate) fn takes_formats(&self) -> bool {
        self.has_kind(super::spec::Kind::Format)
    }

    fn has_kind(&self, kind: super::spec::Kind) -> bool {
        let specs = self.flags.specs();
        let values = specs.iter().filter_map(|spec| spec.value);
        values.chain(self.operands.iter().copied()).any(|value| value.kind == kind)
    }
}

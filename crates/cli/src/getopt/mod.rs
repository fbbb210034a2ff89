//! Command lines as `getopt_long(3)` reads them.
//!
//! QEMU's tools take their options through the C library's parser, so scripts rely on its habits: short
//! options in clusters (`-qf raw`, `-fraw`), long ones by any unambiguous prefix (`--out json`,
//! `--output=json`), options after operands, `--` as the end of options. This parser keeps those habits
//! and the library's wording of faults, to the byte.
//!
//! A table of [`Opt`] says what exists; [`Parser::next`] hands out one option at a time, in the order
//! of the command line; [`Parser::operands`] gives what is left. A parser never looks at the values.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

/// One option of a command. At least one of `short` and `long` is there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opt {
    /// What [`Parser::next`] returns for it; by custom the short letter.
    pub(crate) id: char,
    /// The letter after `-`.
    pub(crate) short: Option<char>,
    /// The word after `--`.
    pub(crate) long: Option<&'static str>,
    /// Whether a value follows.
    pub(crate) takes_value: bool,
    /// The word must be written in full. It does not make abbreviations of other words ambiguous.
    pub(crate) in_full: bool,
}

impl Opt {
    /// Another word for an option, from a later version of the tools. It must be written in full, so the
    /// abbreviations of older words keep their meaning.
    pub(crate) const fn alias(self, long: &'static str) -> Self {
        Self { short: None, long: Some(long), in_full: true, ..self }
    }

    /// The option, whose word must be written in full.
    pub(crate) const fn in_full(self) -> Self {
        Self { in_full: true, ..self }
    }

    /// Another letter for an option.
    pub(crate) const fn letter(self, letter: char) -> Self {
        Self { short: Some(letter), long: None, in_full: true, ..self }
    }
}

/// An option with a letter and a word.
pub(crate) const fn both(letter: char, long: &'static str, takes_value: bool) -> Opt {
    Opt { id: letter, short: Some(letter), long: Some(long), takes_value, in_full: false }
}

/// An option with a word only; `id` is any character that no other option of the table has.
pub(crate) const fn long(id: char, long: &'static str, takes_value: bool) -> Opt {
    Opt { id, short: None, long: Some(long), takes_value, in_full: false }
}

/// An option with a letter only.
pub(crate) const fn short(letter: char, takes_value: bool) -> Opt {
    Opt { id: letter, short: Some(letter), long: None, takes_value, in_full: false }
}

/// A fault of the command line: the C library's text, which begins with the program's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault(pub(crate) String);

/// What happens at the first operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operands {
    /// Options may still follow.
    Anywhere,
    /// It ends the options.
    EndOptions,
}

/// Reads one command line.
#[derive(Debug)]
pub(crate) struct Parser<'t> {
    name: String,
    table: &'t [Opt],
    /// Options whose words must be written in full.
    common: &'t [Opt],
    mode: Operands,
    rest: VecDeque<String>,
    cluster: VecDeque<char>,
    operands: Vec<String>,
    letters_only: bool,
}

/// An option found, with its value if it takes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// [`Opt::id`].
    pub(crate) id: char,
    /// Empty for an option without a value.
    pub(crate) value: String,
}

impl<'t> Parser<'t> {
    /// `name` stands before messages; `arguments` come without the program's name.
    pub(crate) fn new(
        name: impl Into<String>,
        arguments: impl IntoIterator<Item = String>,
        table: &'t [Opt],
        mode: Operands,
    ) -> Self {
        Self {
            name: name.into(),
            table,
            common: &[],
            mode,
            rest: arguments.into_iter().collect(),
            cluster: VecDeque::new(),
            operands: Vec::new(),
            letters_only: false,
        }
    }

    /// Reads as `getopt(3)` does: there are no words, so `--x` is a cluster of letters.
    #[must_use]
    pub(crate) fn letters_only(mut self) -> Self {
        self.letters_only = true;
        self
    }

    /// Accepts these long options too, when their words are written in full.
    pub(crate) fn with_common(self, common: &'t [Opt]) -> Self {
        Self { common, ..self }
    }

    /// The next option, or `None` when only operands are left.
    ///
    /// # Errors
    /// [`Fault`] with the message to print; the option at fault is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Found>, Fault> {
        if let Some(letter) = self.cluster.pop_front() {
            return self.letter(letter).map(Some);
        }
        while let Some(argument) = self.rest.pop_front() {
            if argument == "--" {
                break;
            }
            if !self.letters_only
                && let Some(word) = argument.strip_prefix("--")
            {
                return self.word(word).map(Some);
            }
            match argument.strip_prefix('-') {
                Some(letters) if !letters.is_empty() => {
                    self.cluster = letters.chars().collect();
                    return self.next();
                }
                _ if self.mode == Operands::EndOptions => {
                    self.rest.push_front(argument);
                    break;
                }
                _ => self.operands.push(argument),
            }
        }
        self.operands.extend(self.rest.drain(..));
        Ok(None)
    }

    /// What is not an option, in order. Complete once [`Self::next`] has returned `None`.
    pub(crate) fn operands(self) -> Vec<String> {
        self.operands
    }

    fn letter(&mut self, letter: char) -> Result<Found, Fault> {
        let Some(opt) = self.table.iter().find(|opt| opt.short == Some(letter)) else {
            return Err(self.fault(format!("invalid option -- '{letter}'")));
        };
        if !opt.takes_value {
            return Ok(Found { id: opt.id, value: String::new() });
        }
        let attached: String = self.cluster.drain(..).collect();
        let value = if attached.is_empty() { self.rest.pop_front() } else { Some(attached) };
        match value {
            Some(value) => Ok(Found { id: opt.id, value }),
            None => Err(self.fault(format!("option requires an argument -- '{letter}'"))),
        }
    }

    fn word(&mut self, word: &str) -> Result<Found, Fault> {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word, None),
        };
        let opt = *self.find_word(word, name)?;
        let full = opt.long.unwrap_or_default();
        match (opt.takes_value, value) {
            (false, None) => Ok(Found { id: opt.id, value: String::new() }),
            (false, Some(_)) => {
                Err(self.fault(format!("option '--{full}' doesn't allow an argument")))
            }
            (true, value) => match value.or_else(|| self.rest.pop_front()) {
                Some(value) => Ok(Found { id: opt.id, value }),
                None => Err(self.fault(format!("option '--{full}' requires an argument"))),
            },
        }
    }

    /// The option of that name, or the only one that it is a prefix of.
    fn find_word(&self, word: &str, name: &str) -> Result<&'t Opt, Fault> {
        let mut known = self.table.iter().chain(self.common);
        if let Some(opt) = known.find(|opt| opt.long == Some(name)) {
            return Ok(opt);
        }
        let matches: Vec<&'t Opt> = self
            .table
            .iter()
            .filter(|o| !o.in_full && o.long.is_some_and(|l| l.starts_with(name)))
            .collect();
        let Some((first, others)) = matches.split_first() else {
            return Err(self.fault(format!("unrecognized option '--{word}'")));
        };
        if others.iter().all(|o| o.id == first.id && o.takes_value == first.takes_value) {
            return Ok(first);
        }
        let list: String =
            matches.iter().map(|o| format!(" '--{}'", o.long.unwrap_or_default())).collect();
        Err(self.fault(format!("option '--{word}' is ambiguous; possibilities:{list}")))
    }

    fn fault(&self, text: impl std::fmt::Display) -> Fault {
        Fault(format!("{}: {text}", self.name))
    }
}

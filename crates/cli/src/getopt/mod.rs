//! Parsing command lines as `getopt_long(3)` does.
//!
//! QEMU's tools use the C library's parser, so scripts rely on its behaviour: short options in clusters (`-qf raw`,
//! `-fraw`), any unambiguous prefix of a long option (`--out json`, `--output=json`), options after operands, and `--` as
//! the end of options. This parser has the same rules and error messages, with two differences: it ignores the environment
//! variable `POSIXLY_CORRECT`, and a word may be marked as one that cannot be abbreviated ([`Opt::in_full`]).
//!
//! A table of [`Opt`] lists the options. [`Parser::next`] returns one option at a time, in the order of the command line.
//! [`Parser::operands`] returns the remaining words. The parser does not interpret values.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt::{self, Display, Formatter};

/// A row of the table: a letter, a word, or a letter and a word that select one option. At least one of `short` and `long` is
/// set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opt {
    /// The identifier that [`Parser::next`] returns. All spellings of an option have the same identifier.
    pub(crate) id: usize,
    /// The letter after `-`.
    pub(crate) short: Option<char>,
    /// The word after `--`.
    pub(crate) long: Option<&'static str>,
    /// Whether the option takes a value.
    pub(crate) takes_value: bool,
    /// The word cannot be abbreviated, so it does not make abbreviations of other words ambiguous.
    pub(crate) in_full: bool,
}

/// An error in the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The name of the program or of the command.
    pub(crate) name: String,
    /// The message of the C library without the name.
    pub(crate) message: String,
    /// The unknown option without `--`, if the error is an unknown long option.
    pub(crate) unknown: Option<String>,
}

impl Display for Fault {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.message)
    }
}

/// The allowed positions of operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operands {
    /// Options may follow operands.
    Anywhere,
    /// The first operand ends the options.
    EndOptions,
}

/// Parses one command line.
#[derive(Debug)]
pub(crate) struct Parser<'t> {
    name: String,
    table: &'t [Opt],
    mode: Operands,
    rest: VecDeque<String>,
    cluster: VecDeque<char>,
    operands: Vec<String>,
    letters_only: bool,
}

/// An option of the command line, with its value if it takes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// [`Opt::id`].
    pub(crate) id: usize,
    /// Empty for an option without a value.
    pub(crate) value: String,
}

impl<'t> Parser<'t> {
    /// `name` is printed before messages. `arguments` do not include the program's name.
    pub(crate) fn new(
        name: impl Into<String>,
        arguments: impl IntoIterator<Item = String>,
        table: &'t [Opt],
        mode: Operands,
    ) -> Self {
        Self {
            name: name.into(),
            table,
            mode,
            rest: arguments.into_iter().collect(),
            cluster: VecDeque::new(),
            operands: Vec::new(),
            letters_only: false,
        }
    }

    /// Parses as `getopt(3)` does: without long options, so `--x` is a cluster of letters.
    #[must_use]
    pub(crate) fn letters_only(mut self) -> Self {
        self.letters_only = true;
        self
    }

    /// The next option, or `None` if only operands are left.
    ///
    /// # Errors
    /// [`Fault`] with the message to print. The invalid option is skipped.
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

    /// The operands in order. They are complete once [`Self::next`] has returned `None`.
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

    /// The long option with this name, or the option that the name abbreviates. All words that begin with the name and can be
    /// abbreviated must be spellings of one option.
    fn find_word(&self, word: &str, name: &str) -> Result<&'t Opt, Fault> {
        let mut known = self.table.iter();
        if let Some(opt) = known.find(|opt| opt.long == Some(name)) {
            return Ok(opt);
        }
        let matches: Vec<&'t Opt> = self
            .table
            .iter()
            .filter(|o| !o.in_full && o.long.is_some_and(|l| l.starts_with(name)))
            .collect();
        let Some((first, others)) = matches.split_first() else {
            let unknown = Some(name.to_owned());
            return Err(Fault { unknown, ..self.fault(format!("unrecognized option '--{word}'")) });
        };
        if others.iter().all(|o| o.id == first.id && o.takes_value == first.takes_value) {
            return Ok(first);
        }
        let list: String =
            matches.iter().map(|o| format!(" '--{}'", o.long.unwrap_or_default())).collect();
        Err(self.fault(format!("option '--{word}' is ambiguous; possibilities:{list}")))
    }

    fn fault(&self, message: String) -> Fault {
        Fault { name: self.name.clone(), message, unknown: None }
    }
}

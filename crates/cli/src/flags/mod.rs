//! Command-line options, with one declaration for each.
//!
//! A [`Flag`] declares an option of a command: its spellings, the value that it takes, a line of help, and the function
//! that stores the value in the command's arguments. [`parse`] reads a command line with these declarations. The output
//! of `--help`, the manual pages and the completions of the shells come from the same declarations, so every option is
//! documented.
//!
//! | file | purpose |
//! |---|---|
//! | `spec` | the spellings, the value and the help of an option |
//! | `page` | the description of a command: usage, options, exit codes, examples |
//! | `refusal` | the error for a value that an option does not accept |
//! | `shared` | options that several commands have |
//! | `help`, `man` | the output of `--help`, and manual pages |
//! | `text` | functions and texts for help, manual pages and completions |
//! | `bash`, `zsh`, `fish` | completion scripts |
//! | `command` | reading the command line of a command, with the output of help and errors |
//!
//! Options are stored in the order of the command line. [`crate::getopt`] defines how a command line is split into
//! options and operands.

pub(crate) mod bash;
pub(crate) mod command;
pub(crate) mod fish;
pub(crate) mod help;
pub(crate) mod man;
pub(crate) mod page;
pub(crate) mod refusal;
pub(crate) mod shared;
pub(crate) mod spec;
mod text;
pub(crate) mod zsh;

use crate::getopt::{Fault, Found, Operands, Opt, Parser};
use refusal::Refusal;
use spec::{Alias, Names, Spec, Value};

/// The result of storing a value.
pub(crate) type Stored = Result<(), Refusal>;

/// An option of a command whose arguments are an `A`.
pub(crate) struct Flag<A> {
    spec: Spec,
    store: Store<A>,
    /// The exit code if the value is refused.
    code: u8,
}

/// What an option does.
enum Store<A> {
    Switch(fn(&mut A) -> &mut bool),
    SwitchWith(fn(&mut A) -> Stored),
    Text(fn(&mut A) -> &mut Option<String>),
    Value(fn(&mut A, String) -> Stored),
    Nothing,
    Help,
    Version,
}

impl<A> Flag<A> {
    const fn new(names: Names, value: Option<Value>, about: &'static str, store: Store<A>) -> Self {
        Self { spec: Spec::new(names, value, about), store, code: 1 }
    }

    /// An option without a value, which sets a field to `true`.
    pub(crate) const fn switch(
        names: Names,
        about: &'static str,
        field: fn(&mut A) -> &mut bool,
    ) -> Self {
        Self::new(names, None, about, Store::Switch(field))
    }

    /// An option without a value, which calls a function.
    pub(crate) const fn switch_with(
        names: Names,
        about: &'static str,
        store: fn(&mut A) -> Stored,
    ) -> Self {
        Self::new(names, None, about, Store::SwitchWith(store))
    }

    /// An option whose value is stored in a field unchanged.
    pub(crate) const fn text(
        names: Names,
        value: Value,
        about: &'static str,
        field: fn(&mut A) -> &mut Option<String>,
    ) -> Self {
        Self::new(names, Some(value), about, Store::Text(field))
    }

    /// An option whose value is passed to a function.
    pub(crate) const fn value(
        names: Names,
        value: Value,
        about: &'static str,
        store: fn(&mut A, String) -> Stored,
    ) -> Self {
        Self::new(names, Some(value), about, Store::Value(store))
    }

    /// An option that is accepted without effect.
    pub(crate) const fn ignored(names: Names, value: Option<Value>) -> Self {
        Self::new(names, value, "accepted without effect", Store::Nothing)
    }

    /// `--help`.
    pub(crate) const fn help() -> Self {
        Self::new(spec::both('h', "help").last(), None, "print this help", Store::Help)
    }

    /// `--version`.
    pub(crate) const fn version() -> Self {
        Self::new(spec::both('V', "version").last(), None, "print the version", Store::Version)
    }

    /// The exit code if the value is refused, instead of 1.
    #[must_use]
    pub(crate) const fn refused_with(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    fn store(&self, into: &mut A, value: String) -> Result<(), Stop> {
        let stored = match &self.store {
            Store::Switch(field) => {
                *field(into) = true;
                Ok(())
            }
            Store::SwitchWith(store) => store(into),
            Store::Text(field) => {
                *field(into) = Some(value);
                Ok(())
            }
            Store::Value(store) => store(into, value),
            Store::Nothing => Ok(()),
            Store::Help => return Err(Stop::Help),
            Store::Version => return Err(Stop::Version),
        };
        stored.map_err(|refusal| {
            let code = if refusal.answered { 0 } else { self.code };
            Stop::Refused(refusal, code)
        })
    }
}

/// Gives access to the descriptions of a command's options. The trait hides the type of the command's arguments.
pub(crate) trait Specs: Sync {
    /// The descriptions in the order of the declarations.
    fn specs(&self) -> Vec<&'static Spec>;
}

impl<A> Specs for &'static [Flag<A>] {
    fn specs(&self) -> Vec<&'static Spec> {
        let flags: &'static [Flag<A>] = self;
        flags.iter().map(|flag| &flag.spec).collect()
    }
}

/// Why [`parse`] ended before the end of the command line.
#[derive(Debug)]
pub(crate) enum Stop {
    /// `--help` was given.
    Help,
    /// `--version` was given.
    Version,
    /// An option is unknown or ambiguous, a required value is missing, or an option that takes no value has one.
    Invalid(Fault),
    /// The value of an option is refused, or has been answered with a list. The command ends with this exit code.
    Refused(Refusal, u8),
}

/// A command line without the words that select the command.
#[derive(Debug)]
pub(crate) struct Line<'n> {
    /// The name that is printed before messages about the command line.
    pub(crate) name: &'n str,
    pub(crate) words: Vec<String>,
    pub(crate) operands: Operands,
    /// The command line has no long options.
    pub(crate) letters_only: bool,
}

impl<'n> Line<'n> {
    /// A command line with short and long options, also after operands.
    pub(crate) fn new(name: &'n str, words: Vec<String>) -> Self {
        Self { name, words, operands: Operands::Anywhere, letters_only: false }
    }

    fn parser(self, table: &[Opt]) -> Parser<'_> {
        let parser = Parser::new(self.name, self.words, table, self.operands);
        if self.letters_only { parser.letters_only() } else { parser }
    }
}

/// Reads a command line: stores the options in `into` and returns the operands.
///
/// # Errors
/// The reason to stop. The options in front of the failing option have been stored.
pub(crate) fn parse<A>(
    line: Line<'_>,
    flags: &[Flag<A>],
    into: &mut A,
) -> Result<Vec<String>, Stop> {
    let table = table(flags);
    let mut parser = line.parser(&table);
    while let Some(Found { id, value }) = parser.next().map_err(Stop::Invalid)? {
        if let Some(flag) = flags.get(id) {
            flag.store(into, value)?;
        }
    }
    Ok(parser.operands())
}

/// The operands of a command line, or `None` if an option is invalid. No option is stored.
pub(crate) fn operands<A>(words: Vec<String>, flags: &[Flag<A>]) -> Option<Vec<String>> {
    let table = table(flags);
    let mut parser = Line::new("", words).parser(&table);
    while parser.next().ok()?.is_some() {}
    Some(parser.operands())
}

/// All long options, without `--`.
pub(crate) fn words<A>(flags: &[Flag<A>]) -> Vec<&'static str> {
    table(flags).iter().filter_map(|opt| opt.long).collect()
}

/// The table for the parser. The identifier of an option is its index in `flags`.
fn table<A>(flags: &[Flag<A>]) -> Vec<Opt> {
    let mut table = Vec::new();
    for (id, Flag { spec, .. }) in flags.iter().enumerate() {
        let Spec { names: Names { short, long, in_full, aliases, .. }, value, .. } = *spec;
        let opt = Opt { id, short, long, takes_value: value.is_some(), in_full };
        table.push(opt);
        table.extend(aliases.iter().map(|alias| match *alias {
            Alias::Word(word) => Opt { short: None, long: Some(word), in_full: false, ..opt },
            Alias::FullWord(word) => Opt { short: None, long: Some(word), in_full: true, ..opt },
            Alias::Letter(letter) => Opt { short: Some(letter), long: None, ..opt },
        }));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::spec::{both, long};
    use super::*;

    #[derive(Default)]
    struct Arguments {
        quiet: bool,
        format: Option<String>,
        log: Vec<String>,
    }

    const FLAGS: &[Flag<Arguments>] = &[
        Flag::switch(both('q', "quiet"), "print errors only", |a| &mut a.quiet),
        Flag::text(both('f', "format"), Value::FORMAT, "format", |a| &mut a.format),
        Flag::value(
            both('l', "log").aliases(&[Alias::FullWord("record"), Alias::Letter('r')]),
            Value::text("TEXT"),
            "append",
            |a: &mut Arguments, value: String| {
                if value.is_empty() {
                    return Err(Refusal::misused("--log expects a text"));
                }
                a.log.push(value);
                Ok(())
            },
        )
        .refused_with(2),
        Flag::switch_with(long("both"), "append twice", |a| {
            a.log.extend(["b".to_owned(), "b".to_owned()]);
            Ok(())
        }),
        Flag::ignored(both('T', "trace"), Some(Value::text("SPEC"))),
        Flag::help(),
    ];

    fn run(line: &str) -> (Arguments, Result<Vec<String>, Stop>) {
        let mut arguments = Arguments::default();
        let words = line.split(' ').map(str::to_owned).collect();
        let ended = parse(Line::new("tool", words), FLAGS, &mut arguments);
        (arguments, ended)
    }

    #[test]
    fn options_are_stored_in_the_order_of_the_command_line() {
        let (arguments, operands) = run("-l 1 x --both --rec 2 --log=3 -fraw -f qcow2 -r4 -T y");
        assert!(matches!(operands, Err(Stop::Invalid(_))), "--rec is an abbreviated alias");
        assert_eq!(arguments.log, ["1", "b", "b"]);
        let (arguments, operands) = run("-l 1 x --both --record 2 --log=3 -fraw -f qcow2 -r4 -T y");
        assert_eq!(operands.unwrap(), ["x"]);
        assert_eq!(arguments.log, ["1", "b", "b", "2", "3", "4"]);
        assert_eq!((arguments.format.as_deref(), arguments.quiet), (Some("qcow2"), false));
    }

    #[test]
    fn a_refused_value_ends_the_command_with_the_exit_code_of_its_option() {
        let (arguments, ended) = run("-q --log= -f raw");
        assert!(matches!(ended, Err(Stop::Refused(Refusal { misused: true, .. }, 2))));
        assert!(arguments.quiet && arguments.format.is_none());
    }

    #[test]
    fn help_ends_the_parsing() {
        assert!(matches!(run("-h --bogus").1, Err(Stop::Help)));
        assert!(matches!(run("--bogus -h").1, Err(Stop::Invalid(_))));
    }
}

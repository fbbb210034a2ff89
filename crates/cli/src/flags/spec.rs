//! The description of an option: its spellings, its value and its help. The description does not depend on the command
//! that has the option.

/// The spellings of an option. At least one of `short` and `long` is set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    /// The letter after `-`.
    pub(crate) short: Option<char>,
    /// The word after `--`.
    pub(crate) long: Option<&'static str>,
    /// The word cannot be abbreviated, so it does not make abbreviations of other words ambiguous.
    pub(crate) in_full: bool,
    /// The place of the option in help.
    pub(crate) place: Place,
    pub(crate) aliases: &'static [Alias],
}

/// Where help lists an option. Inside a group, options are in the order of their declarations. The declarations keep
/// QEMU's order, because the message about an ambiguous abbreviation lists the options in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// Among the options that are specific to the command.
    Specific,
    /// Among the options that many commands have.
    Common,
    /// At the end.
    Last,
}

/// Another spelling of an option.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Alias {
    /// A word that can be abbreviated.
    Word(&'static str),
    /// A word that cannot be abbreviated. Use this for words that QEMU 10.0 does not have, if they would make abbreviations
    /// of QEMU's words ambiguous.
    FullWord(&'static str),
    Letter(char),
}

impl Alias {
    /// The alias with its dashes.
    pub(crate) fn spelling(&self) -> String {
        match self {
            Self::Word(word) | Self::FullWord(word) => format!("--{word}"),
            Self::Letter(letter) => format!("-{letter}"),
        }
    }
}

impl Names {
    /// The same spellings, but the word cannot be abbreviated.
    #[must_use]
    pub(crate) const fn in_full(self) -> Self {
        Self { in_full: true, ..self }
    }

    /// The option is listed after those that are specific to the command.
    #[must_use]
    pub(crate) const fn common(self) -> Self {
        Self { place: Place::Common, ..self }
    }

    /// The option is listed after all others.
    #[must_use]
    pub(crate) const fn last(self) -> Self {
        Self { place: Place::Last, ..self }
    }

    /// Adds other spellings.
    #[must_use]
    pub(crate) const fn aliases(self, aliases: &'static [Alias]) -> Self {
        Self { aliases, ..self }
    }
}

/// A letter and a word.
pub(crate) const fn both(short: char, long: &'static str) -> Names {
    Names {
        short: Some(short),
        long: Some(long),
        in_full: false,
        place: Place::Specific,
        aliases: &[],
    }
}

/// A word only.
pub(crate) const fn long(long: &'static str) -> Names {
    Names { short: None, long: Some(long), in_full: false, place: Place::Specific, aliases: &[] }
}

/// A letter only.
pub(crate) const fn short(short: char) -> Names {
    Names { short: Some(short), long: None, in_full: false, place: Place::Specific, aliases: &[] }
}

/// The value of an option, or an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Value {
    /// The name in usage lines: a word in capitals, or the alternatives (`leaks|all`).
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// The value that the command uses if the option is not given.
    pub(crate) default: Option<&'static str>,
}

/// What a value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The name of a file. Completions offer files.
    File,
    /// The name of an image format.
    Format,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A number of bytes, which may have a suffix.
    Size,
    /// Any other text or number.
    Text,
}

impl Value {
    pub(crate) const FORMAT: Self = Self::new("FORMAT", Kind::Format);
    pub(crate) const CACHE: Self =
        Self::choice("MODE", &["none", "writeback", "unsafe", "directsync", "writethrough"]);
    pub(crate) const AIO: Self = Self::choice("MODE", &["threads", "native", "io_uring"]);
    pub(crate) const DISCARD: Self = Self::choice("MODE", &["unmap", "ignore"]);
    pub(crate) const PREALLOCATION: Self =
        Self::choice("MODE", &["off", "metadata", "falloc", "full"]);
    /// The operand of most commands.
    pub(crate) const FILENAME: Self = Self::file("FILENAME");

    const fn new(name: &'static str, kind: Kind) -> Self {
        Self { name, kind, default: None }
    }

    /// The name of a file.
    pub(crate) const fn file(name: &'static str) -> Self {
        Self::new(name, Kind::File)
    }

    /// A number of bytes, which may have a suffix.
    pub(crate) const fn size(name: &'static str) -> Self {
        Self::new(name, Kind::Size)
    }

    /// Any text or number.
    pub(crate) const fn text(name: &'static str) -> Self {
        Self::new(name, Kind::Text)
    }

    /// One of the words in `words`.
    pub(crate) const fn choice(name: &'static str, words: &'static [&'static str]) -> Self {
        Self::new(name, Kind::Choice(words))
    }

    /// The value that the command uses if the option is not given.
    #[must_use]
    pub(crate) const fn default(self, text: &'static str) -> Self {
        Self { default: Some(text), ..self }
    }

    /// All words that the value may be. Empty if the value has no such list.
    pub(crate) fn words(&self) -> Vec<&'static str> {
        match self.kind {
            Kind::Choice(words) => words.to_vec(),
            Kind::Format => super::text::formats(),
            Kind::File | Kind::Size | Kind::Text => Vec::new(),
        }
    }
}

/// The description of an option.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) names: Names,
    pub(crate) value: Option<Value>,
    /// The help text: a short phrase that begins with a lower-case letter and has no full stop.
    pub(crate) about: &'static str,
}

impl Spec {
    /// The description of an option.
    pub(crate) const fn new(names: Names, value: Option<Value>, about: &'static str) -> Self {
        Self { names, value, about }
    }

    /// All spellings with their dashes: the letter, the word, the aliases.
    pub(crate) fn spellings(&self) -> Vec<String> {
        let Names { short, long, aliases, .. } = self.names;
        let short = short.map(|letter| format!("-{letter}"));
        let long = long.map(|word| format!("--{word}"));
        short.into_iter().chain(long).chain(aliases.iter().map(Alias::spelling)).collect()
    }

    /// The letter and the word with their dashes, and the name of the value.
    pub(crate) fn label(&self) -> String {
        let spellings = self.spellings();
        let main = spellings.len().saturating_sub(self.names.aliases.len());
        let names = spellings.get(..main).unwrap_or_default().join(", ");
        match self.value {
            Some(value) => format!("{names} {}", value.name),
            None => names,
        }
    }

    /// The line of help with the values, the default and the aliases.
    pub(crate) fn help(&self) -> String {
        let mut text = self.about.to_owned();
        if let Some(Value { name, kind: Kind::Choice(words), .. }) = self.value
            && name != words.join("|")
        {
            text.push_str(": ");
            text.push_str(&super::text::alternatives(words));
        }
        let default =
            self.value.and_then(|value| value.default).map(|default| format!("default: {default}"));
        let aliases: Vec<_> = self.names.aliases.iter().map(Alias::spelling).collect();
        let also = (!aliases.is_empty()).then(|| format!("also {}", aliases.join(", ")));
        let notes: Vec<_> = default.into_iter().chain(also).collect();
        if !notes.is_empty() {
            text.push_str(&format!(" ({})", notes.join("; ")));
        }
        text
    }
}

/// The descriptions in the order of help.
pub(crate) fn in_order(mut specs: Vec<&'static Spec>) -> Vec<&'static Spec> {
    specs.sort_by_key(|spec| spec.names.place);
    specs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_contains_the_values_the_default_and_the_aliases() {
        let names = both('r', "rate").aliases(&[Alias::FullWord("rate-limit"), Alias::Letter('R')]);
        let spec = Spec::new(names, Some(Value::AIO.default("io_uring")), "the mode");
        assert_eq!(spec.label(), "-r, --rate MODE");
        assert_eq!(
            spec.help(),
            "the mode: threads, native or io_uring (default: io_uring; also --rate-limit, -R)"
        );
        assert_eq!(spec.spellings(), ["-r", "--rate", "--rate-limit", "-R"]);
        let value = Value::choice("human|json", &["human", "json"]);
        let spec = Spec::new(long("output"), Some(value), "how to print");
        assert_eq!(
            (spec.label().as_str(), spec.help().as_str()),
            ("--output human|json", "how to print")
        );
    }

    #[test]
    fn the_modes_that_help_and_completions_offer_are_accepted() {
        use oxblk::{Aio, Cache, parse_discard};
        use oxblk_core::Preallocation;

        assert!(Value::CACHE.words().into_iter().all(|mode| Cache::parse(mode).is_some()));
        assert!(Value::DISCARD.words().into_iter().all(|mode| parse_discard(mode).is_some()));
        assert!(Value::AIO.words().into_iter().all(|mode| Aio::parse(mode).is_some()));
        let preallocation = Value::PREALLOCATION.words();
        assert!(preallocation.into_iter().all(|mode| Preallocation::parse(mode).is_some()));
    }
}

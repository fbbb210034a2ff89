//! The options of a case: pairs of a name and a value. An unknown name is an error; the message lists the options of the case.

use std::str::FromStr;

/// The options that the user has set.
pub(crate) struct Options<'a> {
    set: Vec<(&'a str, &'a str)>,
}

impl<'a> Options<'a> {
    /// Parses the arguments of a case. `known` has the name of each option and what its value means.
    ///
    /// # Errors
    /// If an option is unknown or its value is missing. The message lists the options.
    pub(crate) fn parse(args: &'a [String], known: &[(&str, &str)]) -> Result<Self, String> {
        let set = args.chunks(2).map(|pair| match pair {
            [name, value] if known.iter().any(|(option, _)| option == name) => {
                Ok((name.as_str(), value.as_str()))
            }
            _ => {
                let list = known.iter().map(|(name, about)| format!("\n  {name:<10} {about}"));
                Err(format!("the options are{}", list.collect::<String>()))
            }
        });
        Ok(Options { set: set.collect::<Result<_, _>>()? })
    }

    /// The value of an option.
    pub(crate) fn text(&self, name: &str) -> Option<&'a str> {
        self.set.iter().find(|(set, _)| *set == name).map(|(_, value)| *value)
    }

    /// The value of an option as a number.
    ///
    /// # Errors
    /// If the value is not a number.
    pub(crate) fn number<T: FromStr>(&self, name: &str, default: T) -> Result<T, String> {
        match self.text(name) {
            None => Ok(default),
            Some(value) => value.parse().map_err(|_| format!("{name} needs a number")),
        }
    }
}

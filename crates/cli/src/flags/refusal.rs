//! The error of a value that an option does not accept.

use oxblk_core::Error;

/// The messages to print about a refused value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Each message is printed after the name of the tool. The list is empty if the messages have been printed already.
    pub(crate) messages: Vec<String>,
    /// A line that is printed after the messages, without the name of the tool.
    pub(crate) hint: Option<String>,
    /// Whether the line `Try '… --help' for more info` is printed at the end.
    pub(crate) misused: bool,
    /// The value was a request for a list, which has been printed. The command ends with success.
    pub(crate) answered: bool,
}

impl Refusal {
    /// A refusal whose messages have been printed already.
    pub(crate) fn printed() -> Self {
        Self::default()
    }

    /// No refusal: the value was a request for a list, which has been printed.
    pub(crate) fn answered() -> Self {
        Self { answered: true, ..Self::default() }
    }

    /// A refusal with one message.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { messages: vec![message.into()], ..Self::default() }
    }

    /// A refusal with one message, followed by the line `Try '… --help' for more info`.
    pub(crate) fn misused(message: impl Into<String>) -> Self {
        Self { misused: true, ..Self::failed(message) }
    }

    /// Adds a message.
    #[must_use]
    pub(crate) fn then(mut self, message: impl Into<String>) -> Self {
        self.messages.push(message.into());
        self
    }
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self::failed(message)
    }
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Self {
        Self { hint: error.hint().map(str::to_owned), ..Self::failed(error.to_string()) }
    }
}

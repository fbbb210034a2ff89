//! [`Error`]: the error type of the block layer.
//!
//! An [`Error`] contains data for programs and a text for people. The data consists of a stable [`ErrorKind`], the
//! errno that a guest or a network client receives, and the node, path and offset concerned. The `Display` text is one
//! line. If QEMU has the same error, the text has the wording of QEMU's tools, because scripts match this text.
//! [`std::error::Error::source`] returns the error that has caused this error, if there is one.

use crate::Errno;
use std::borrow::Cow;
use std::fmt;
use std::io;

/// Result of a block layer operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Category of a failure. The categories are stable, so callers may match on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An I/O operation failed, in most cases on the host.
    Io,
    /// No space is left on the host or in the image, or the node cannot grow.
    NoSpace,
    /// The file or object does not exist.
    NotFound,
    /// The operation is not permitted: a permission is missing or in conflict, the host, a lock or the gate refuses, or
    /// a password is wrong.
    Denied,
    /// The node or the file is read-only.
    ReadOnly,
    /// An argument or option is wrong.
    Invalid,
    /// The driver does not support the operation.
    Unsupported,
    /// The image violates the specification of its format.
    Corrupt,
    /// Another operation uses or closes the object, so this operation is not possible now.
    Busy,
    /// The request lies outside the device, or a size is too large.
    OutOfRange,
    /// The operation was cancelled.
    Cancelled,
    /// The backing chain contains a loop, or is too long.
    BackingChain,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    errno: i32,
    message: Cow<'static, str>,
    node: Option<String>,
    path: Option<String>,
    offset: Option<u64>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The error of a failed block layer operation. An [`Error`] has the size of one pointer, so that `Result`s stay small.
pub struct Error(Box<Inner>);

impl Error {
    /// An error of `kind` with the one-line text `message`. The errno is the default errno of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            errno: default_errno(kind),
            message: message.into(),
            node: None,
            path: None,
            offset: None,
            hint: None,
            source: None,
        }))
    }

    /// The error that the host reports with `errno`. The text of the error is the system's text for `errno`.
    pub fn from_errno(errno: i32) -> Self {
        let mut error = Self::new(kind_of(errno), strerror(errno));
        error.0.errno = errno;
        error
    }

    /// [`ErrorKind::Invalid`] with `message`.
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// [`ErrorKind::Unsupported`] with `message`.
    pub fn unsupported(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// [`ErrorKind::Corrupt`] with `message`.
    pub fn corrupt(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// Puts `prefix` and `": "` in front of the text, as in `Could not open 'x': reason`.
    #[must_use]
    pub fn prefix(mut self, prefix: impl fmt::Display) -> Self {
        self.0.message = format!("{prefix}: {}", self.0.message).into();
        self
    }

    /// Replaces the text by `message`. Kind, errno, node, path, offset and hint stay; the error with the old text
    /// becomes the source.
    #[must_use]
    pub fn reword(self, message: impl Into<Cow<'static, str>>) -> Self {
        let mut outer = Self::new(self.0.kind, message);
        outer.0.errno = self.0.errno;
        outer.0.node.clone_from(&self.0.node);
        outer.0.path.clone_from(&self.0.path);
        outer.0.offset = self.0.offset;
        outer.0.hint.clone_from(&self.0.hint);
        outer.0.source = Some(Box::new(self));
        outer
    }

    /// Sets the errno that guests and clients receive.
    #[must_use]
    pub fn errno(mut self, errno: i32) -> Self {
        self.0.errno = errno;
        self
    }

    /// Sets the source of the error.
    #[must_use]
    pub(crate) fn caused_by(
        mut self,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    /// Records the node concerned, unless a node closer to the cause is recorded already.
    #[must_use]
    pub fn on_node(mut self, node: &str) -> Self {
        self.0.node.get_or_insert_with(|| node.to_owned());
        self
    }

    /// Records the file concerned, unless a file closer to the cause is recorded already.
    #[must_use]
    pub fn on_path(mut self, path: &str) -> Self {
        self.0.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Records the byte offset concerned, unless an offset closer to the cause is recorded already.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Adds a hint that tools print on a separate line after the error.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Category of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The (positive) errno for guests and clients.
    pub fn raw_errno(&self) -> i32 {
        self.0.errno
    }

    /// The node concerned, where known.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The file concerned, where known.
    pub fn path(&self) -> Option<&str> {
        self.0.path.as_deref()
    }

    /// The byte offset concerned, where known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// A hint that tells the user how to solve the problem, if there is such a hint.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        write!(f, "{} ({:?}, ", inner.message, inner.kind)?;
        match Errno::name(inner.errno) {
            Some(name) => f.write_str(name)?,
            None => write!(f, "errno {}", inner.errno)?,
        }
        if let Some(node) = &inner.node {
            write!(f, ", node {node}")?;
        }
        if let Some(path) = &inner.path {
            write!(f, ", path {path}")?;
        }
        if let Some(offset) = inner.offset {
            write!(f, ", offset {offset:#x}")?;
        }
        f.write_str(")")?;
        if let Some(source) = &inner.source {
            write!(f, " <- {source:?}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        if let Some(errno) = error.raw_os_error() {
            let mut converted = Self::from_errno(errno);
            converted.0.source = Some(Box::new(error));
            return converted;
        }
        let (kind, errno) = match error.kind() {
            io::ErrorKind::WriteZero | io::ErrorKind::StorageFull => {
                (ErrorKind::NoSpace, Errno::NOSPC)
            }
            io::ErrorKind::NotFound => (ErrorKind::NotFound, Errno::NOENT),
            io::ErrorKind::InvalidInput => (ErrorKind::Invalid, Errno::INVAL),
            io::ErrorKind::Unsupported => (ErrorKind::Unsupported, Errno::OPNOTSUPP),
            _ => (ErrorKind::Io, Errno::IO),
        };
        let mut converted = Self::new(kind, error.to_string()).errno(errno);
        converted.0.source = Some(Box::new(error));
        converted
    }
}

impl From<oxblk_crypto::Error> for Error {
    fn from(error: oxblk_crypto::Error) -> Self {
        let kind = match error.kind() {
            oxblk_crypto::ErrorKind::Invalid => ErrorKind::Invalid,
            oxblk_crypto::ErrorKind::Unsupported => ErrorKind::Unsupported,
            oxblk_crypto::ErrorKind::WrongPassword => ErrorKind::Denied,
            oxblk_crypto::ErrorKind::NoRandom => ErrorKind::Io,
        };
        let mut converted = Self::new(kind, error.to_string());
        converted.0.source = Some(Box::new(error));
        converted
    }
}

/// The system's text for `errno`, without the number that `std::io::Error` appends.
pub fn strerror(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text.get(..end).unwrap_or_default().to_owned(),
        None => text,
    }
}

fn default_errno(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::Io | ErrorKind::Corrupt => Errno::IO,
        ErrorKind::NoSpace => Errno::NOSPC,
        ErrorKind::NotFound => Errno::NOENT,
        ErrorKind::Denied => Errno::PERM,
        ErrorKind::ReadOnly => Errno::ROFS,
        ErrorKind::Invalid => Errno::INVAL,
        ErrorKind::Unsupported => Errno::OPNOTSUPP,
        ErrorKind::Busy => Errno::BUSY,
        ErrorKind::OutOfRange => Errno::IO,
        ErrorKind::Cancelled => Errno::CANCELED,
        ErrorKind::BackingChain => Errno::LOOP,
    }
}

fn kind_of(errno: i32) -> ErrorKind {
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => ErrorKind::NoSpace,
        Errno::NOENT => ErrorKind::NotFound,
        Errno::PERM | Errno::ACCES => ErrorKind::Denied,
        Errno::ROFS => ErrorKind::ReadOnly,
        Errno::INVAL => ErrorKind::Invalid,
        Errno::OPNOTSUPP | Errno::NOSYS => ErrorKind::Unsupported,
        Errno::BUSY | Errno::AGAIN => ErrorKind::Busy,
        Errno::CANCELED => ErrorKind::Cancelled,
        _ => ErrorKind::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_error_prints_the_system_text_without_its_number() {
        let error = Error::from(io::Error::from_raw_os_error(2)).prefix("Could not open 'x'");
        assert_eq!(error.to_string(), "Could not open 'x': No such file or directory");
        assert_eq!(error.raw_errno(), Errno::NOENT);
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn the_debug_text_contains_the_name_of_the_errno() {
        let text = |errno| format!("{:?}", Error::from_errno(errno).on_path("x"));
        assert_eq!(text(Errno::NOSPC), "No space left on device (NoSpace, ENOSPC, path x)");
        assert!(text(4000).contains("(Io, errno 4000, path x)"));
    }

    #[test]
    fn a_new_text_keeps_everything_else() {
        let error = Error::from_errno(Errno::NOSPC).on_node("n").on_path("p").at(512);
        let error = error.with_hint("Free some space").reword("Image is full");
        assert_eq!(error.to_string(), "Image is full");
        assert_eq!((error.kind(), error.raw_errno()), (ErrorKind::NoSpace, Errno::NOSPC));
        assert_eq!((error.node(), error.path(), error.offset()), (Some("n"), Some("p"), Some(512)));
        assert_eq!(error.hint(), Some("Free some space"));
    }

    #[test]
    fn context_closest_to_the_cause_wins() {
        let error = Error::from_errno(Errno::IO).on_node("inner").on_node("outer").at(512).at(0);
        assert_eq!(error.node(), Some("inner"));
        assert_eq!(error.offset(), Some(512));
    }
}

//! The gate: the rule that decides which other files an image may open.
//!
//! Names of other files inside an image (its backing file, its data file) come from the person who made the image, and
//! may be malicious. The program that opens images chooses with a [`Gate`] which of these files the graph opens. The
//! gate is a part of the [`Graph`](crate::Graph) handle, so the gate applies to every image of a backing chain. The
//! gate does not apply to files that the user gives in options.
//!
//! | gate | backing file | data file |
//! |---|---|---|
//! | [`Nothing`](Gate::Nothing) | refused | refused |
//! | [`Directory`](Gate::Directory) | regular files below the directory | the same |
//! | [`AnyFile`](Gate::AnyFile) | every path | every path |
//! | [`Anything`](Gate::Anything) | every name, including `json:{…}` and `nbd://…` | every path |
//!
//! The name of a data file is always a path: `json:x` means a file of that name.
//!
//! With [`Gate::Directory`], the resolved path contains no symbolic link and no `..`. In addition, the open requests
//! the host not to follow symbolic links ([`OpenFlags::no_symlinks`](crate::OpenFlags)). So a link that somebody
//! creates between the check and the open is not followed.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::graph::scheme;
use crate::{Errno, Error, ErrorKind, Result};

/// The rule that decides which other files an image may open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// No other file. Use this gate for untrusted images.
    Nothing,
    /// Regular files below a directory. [`Gate::directory`] creates this value.
    Directory(Directory),
    /// Every file that can be reached by a path, including devices.
    AnyFile,
    /// Every name, including names with a protocol and names with options (`json:{…}`), as in QEMU.
    Anything,
}

/// A canonical directory: its path contains no symbolic links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory(Arc<Path>);

/// A name that the gate allows.
#[derive(Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The name to open.
    pub name: String,
    /// `name` is a path without symbolic links, and the open must follow none.
    pub no_symlinks: bool,
}

/// The purpose for which an image refers to another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The backing file of the image.
    Backing,
    /// The file for the image's guest data.
    Data,
}

impl Purpose {
    fn noun(self) -> &'static str {
        match self {
            Self::Backing => "backing file",
            Self::Data => "data file",
        }
    }

    /// The hint that tells the user how to open the file despite the gate.
    fn way(self) -> &'static str {
        match self {
            Self::Backing => {
                "give it in the image's options (backing.file.filename=...), or open without it (backing=)"
            }
            Self::Data => "give it in the image's options (data-file.filename=...)",
        }
    }
}

impl Gate {
    /// A gate that allows regular files below the directory `path`.
    ///
    /// # Errors
    /// When `path` does not exist, is not a directory, or cannot be resolved.
    pub fn directory(path: &Path) -> Result<Self> {
        let real = path.canonicalize().map_err(|error| {
            Error::from(error).prefix(format!("Could not open directory '{}'", path.display()))
        })?;
        if !real.is_dir() {
            return Err(Error::invalid(format!("'{}' is not a directory", path.display())));
        }
        Ok(Self::Directory(Directory(real.into())))
    }

    /// Checks a file name that an image contains. `name` is a path or has a protocol prefix. A relative path is
    /// relative to the current directory.
    ///
    /// # Errors
    /// `EACCES` if the gate refuses the name. The message contains the name, and tells the user how to open the file
    /// despite the gate.
    pub fn admit(&self, purpose: Purpose, name: &str) -> Result<Admitted> {
        let refuse = |reason: &str| Err(refused(purpose, name, reason));
        let path = match (purpose, scheme(name)) {
            (Purpose::Backing, Some("file")) => name.get("file:".len()..).unwrap_or_default(),
            (Purpose::Backing, Some(_)) if *self != Self::Anything => {
                return match self {
                    Self::Nothing => refuse("untrusted images may not refer to other files"),
                    _ => refuse("a name that chooses a protocol is not allowed here"),
                };
            }
            _ => name,
        };
        match self {
            Self::Nothing => refuse("untrusted images may not refer to other files"),
            Self::Directory(directory) => match directory.find(path) {
                Ok(name) => Ok(Admitted { name, no_symlinks: true }),
                Err(reason) => refuse(&reason),
            },
            Self::AnyFile | Self::Anything => {
                let is_path = purpose == Purpose::Data && scheme(name).is_some();
                let name = if is_path { format!("./{name}") } else { name.to_owned() };
                Ok(Admitted { name, no_symlinks: false })
            }
        }
    }
}

impl Directory {
    /// The canonical path of a regular file below the directory.
    fn find(&self, path: &str) -> std::result::Result<String, String> {
        let real = crate::names::to_path(path).canonicalize().map_err(|error| error.to_string())?;
        if !real.starts_with(&self.0) {
            return Err(format!("only files below '{}' are allowed", self.0.display()));
        }
        if !real.is_file() {
            return Err("only regular files are allowed".to_owned());
        }
        Ok(crate::names::from_os(real))
    }
}

fn refused(purpose: Purpose, name: &str, reason: &str) -> Error {
    let (noun, way) = (purpose.noun(), purpose.way());
    let message = format!("The image refers to the {noun} '{name}', but {reason}; {way}");
    Error::new(ErrorKind::Denied, message).errno(Errno::ACCES).caused_by(RefusedName { purpose })
}

/// The source of the error that a gate returns for a refused name. Callers use this type to recognise the error and to
/// add a hint of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefusedName {
    /// The purpose for which the image refers to the file.
    pub purpose: Purpose,
}

impl fmt::Display for RefusedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the gate refuses the name of the {}", self.purpose.noun())
    }
}

impl std::error::Error for RefusedName {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn text(path: &Path) -> &str {
        path.to_str().unwrap()
    }

    fn is_refused(gate: &Gate, purpose: Purpose, name: &str) {
        let error = gate.admit(purpose, name).unwrap_err();
        assert_eq!((error.kind(), error.raw_errno()), (ErrorKind::Denied, Errno::ACCES), "{name}");
        let message = error.to_string();
        assert!(message.contains(name) && !message.contains('\n'), "{message}");
    }

    #[test]
    fn the_gate_nothing_refuses_every_name() {
        for name in ["base", "/etc/passwd", "file:base", "json:{}", "nbd://h/"] {
            is_refused(&Gate::Nothing, Purpose::Backing, name);
            is_refused(&Gate::Nothing, Purpose::Data, name);
        }
    }

    #[test]
    fn the_gate_any_file_accepts_paths_and_no_protocols() {
        for name in ["base", "../x", "/dev/sda", "file:x", "./nbd:x"] {
            assert_eq!(Gate::AnyFile.admit(Purpose::Backing, name).unwrap().name, name);
        }
        for name in ["json:{}", "nbd://h/", "nbd:h:1", "host_device:/dev/sda"] {
            is_refused(&Gate::AnyFile, Purpose::Backing, name);
        }
    }

    #[test]
    fn the_gate_anything_accepts_every_backing_name_and_reads_data_file_names_as_paths() {
        for gate in [Gate::AnyFile, Gate::Anything] {
            let admitted = gate.admit(Purpose::Data, "json:{}").unwrap();
            assert_eq!(admitted.name, "./json:{}");
            assert_eq!(gate.admit(Purpose::Data, "file:x").unwrap().name, "./file:x");
            assert_eq!(gate.admit(Purpose::Data, "/a/b:c").unwrap().name, "/a/b:c");
        }
        for name in ["json:{}", "nbd://h/", "file:x", "base"] {
            let admitted = Gate::Anything.admit(Purpose::Backing, name).unwrap();
            assert_eq!(admitted, Admitted { name: name.to_owned(), no_symlinks: false });
        }
    }

    #[test]
    fn the_gate_directory_refuses_names_that_lead_out_of_the_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        let inside = root.join("inside");
        std::fs::create_dir_all(inside.join("sub")).unwrap();
        for file in [root.join("secret"), inside.join("base"), inside.join("sub/base")] {
            std::fs::write(file, "x").unwrap();
        }
        symlink(root.join("secret"), inside.join("link")).unwrap();
        symlink("sub/base", inside.join("good")).unwrap();
        symlink(&root, inside.join("up")).unwrap();
        std::fs::create_dir(root.join("inside-too")).unwrap();
        std::fs::write(root.join("inside-too/f"), "x").unwrap();
        let gate = Gate::directory(&inside).unwrap();
        for (name, real) in [
            ("base", "base"),
            ("sub/../base", "base"),
            ("sub/base", "sub/base"),
            ("good", "sub/base"),
        ] {
            let admitted = gate.admit(Purpose::Backing, text(&inside.join(name))).unwrap();
            assert_eq!(admitted.name, text(&inside.join(real)));
            assert!(admitted.no_symlinks);
        }
        for name in ["../secret", "link", "up/secret", "sub", "absent", "../inside-too/f"] {
            is_refused(&gate, Purpose::Backing, text(&inside.join(name)));
            is_refused(&gate, Purpose::Data, text(&inside.join(name)));
        }
        for name in ["/dev/null", "/etc/passwd", "json:{}", "nbd://h/"] {
            is_refused(&gate, Purpose::Backing, name);
        }
    }

    #[test]
    fn the_gate_directory_needs_an_existing_directory() {
        assert!(Gate::directory(Path::new("/nonexistent")).is_err());
        assert!(Gate::directory(Path::new("/dev/null")).is_err());
    }
}

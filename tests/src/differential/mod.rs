//! Runs the same command with oxblk and with the QEMU tools, and compares the results byte by byte.
//!
//! A [`Differential`] has three directories with the same files. QEMU's tool runs in the first directory, `oxblk img …` in the
//! second directory, and oxblk under the name of QEMU's tool in the third directory. All names in the arguments are relative,
//! so the three command lines are the same. Standard output, standard error and the exit code must be the same too.
//! [`normalise`](normalise::normalise) replaces what cannot be the same (the directory's path, times, rates) in every output.
//!
//! ```no_run
//! use oxblk_tests::differential::Differential;
//! use oxblk_tests::program::Tool::{Img, Io};
//!
//! let both = Differential::new();
//! both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]); // the same input in each directory
//! both.same(Io, &["-c", "write -P 7 0 64k", "a.qcow2"]); // one command, compared
//! both.same(Img, &["map", "a.qcow2"]);
//! both.same_content("a.qcow2"); // all images read the same, and oxblk's pass qemu-img check
//! ```

pub mod format;
pub mod generator;
pub mod normalise;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::program::{Program, Reply, Tool, oxblk};
use normalise::{Rules, normalise};

/// The program that runs the command. It runs in a directory with the name of this variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Qemu,
    Subcommand,
    Link,
}

impl Side {
    const ALL: [Side; 3] = [Side::Qemu, Side::Subcommand, Side::Link];
    const OURS: [Side; 2] = [Side::Subcommand, Side::Link];

    fn name(self) -> &'static str {
        match self {
            Side::Qemu => "qemu",
            Side::Subcommand => "subcommand",
            Side::Link => "link",
        }
    }
}

/// Three directories with the same files, in which the same commands run.
#[derive(Debug)]
pub struct Differential {
    root: TempDir,
    rules: Rules,
}

impl Default for Differential {
    fn default() -> Self {
        Self::new()
    }
}

impl Differential {
    /// Creates three empty directories.
    ///
    /// # Panics
    /// When a directory cannot be created.
    pub fn new() -> Self {
        let root =
            tempfile::Builder::new().prefix("oxblk-diff-").tempdir().expect("a scratch directory");
        for side in Side::ALL {
            std::fs::create_dir(root.path().join(side.name())).expect("a scratch directory");
        }
        let links = root.path().join("bin");
        std::fs::create_dir(&links).expect("a scratch directory");
        for tool in Tool::ALL {
            symlink(oxblk(), links.join(tool.qemu_name())).expect("a link to oxblk");
        }
        Self { root, rules: Rules::default() }
    }

    /// Sets rules that remove more from the output than times and paths.
    #[must_use]
    pub fn rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    fn directory(&self, side: Side) -> PathBuf {
        self.root.path().join(side.name())
    }

    /// Returns the directory in which QEMU's tool runs.
    pub fn qemu_directory(&self) -> PathBuf {
        self.directory(Side::Qemu)
    }

    /// Returns the two directories in which oxblk runs.
    pub fn our_directories(&self) -> [PathBuf; 2] {
        Side::OURS.map(|side| self.directory(side))
    }

    /// Calls `each` for every directory, to make files or change bytes.
    pub fn prepare(&self, each: impl Fn(&Path)) {
        for side in Side::ALL {
            each(&self.directory(side));
        }
    }

    /// Runs commands of `io` on a disk that options describe, in write-back mode, and compares the results.
    ///
    /// # Panics
    /// When the results differ.
    pub fn io(&self, disk: &str, commands: &[&str]) {
        let mut words = vec!["-t", "writeback", "--image-opts", disk];
        words.extend(commands.iter().flat_map(|command| ["-c", command]));
        self.same(Tool::Io, &words);
    }

    /// Copies the files of a directory into every directory.
    ///
    /// # Panics
    /// When a file cannot be copied.
    pub fn copies(&self, of: &Path) {
        self.prepare(|directory| {
            for file in std::fs::read_dir(of).expect("a directory") {
                let file = file.expect("a file");
                std::fs::copy(file.path(), directory.join(file.file_name())).expect("a copy");
            }
        });
    }

    /// Writes the same file into every directory.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn file(&self, name: &str, bytes: &[u8]) {
        self.prepare(|directory| std::fs::write(directory.join(name), bytes).expect("a file"));
    }

    /// Runs QEMU's tool in every directory, to create the same input. The tool must succeed.
    pub fn qemu(&self, tool: Tool, args: &[&str]) {
        self.prepare(|directory| {
            Program::new(tool.qemu_name()).args(args).directory(directory).succeed();
        });
    }

    /// Runs QEMU's tool in its own directory, then copies all files of that directory to the other directories.
    ///
    /// # Panics
    /// When the tool fails.
    pub fn made_once(&self, tool: Tool, args: &[&str]) {
        let directory = self.qemu_directory();
        Program::new(tool.qemu_name()).args(args).directory(&directory).succeed();
        for file in std::fs::read_dir(&directory).expect("a directory") {
            let file = file.expect("a file");
            for ours in self.our_directories() {
                std::fs::copy(file.path(), ours.join(file.file_name())).expect("a copy");
            }
        }
    }

    fn run(&self, side: Side, tool: Tool, args: &[&str], stdin: &[u8]) -> Reply {
        let program = match side {
            Side::Qemu => Program::new(tool.qemu_name()),
            Side::Subcommand => Program::oxblk().arg(tool.subcommand()),
            Side::Link => Program::new(self.root.path().join("bin").join(tool.qemu_name())),
        };
        program.args(args).directory(self.directory(side)).stdin(stdin).run()
    }

    /// Runs one command with each program. The outputs and exit codes must be the same. Returns QEMU's reply.
    ///
    /// # Panics
    /// When the outputs or the exit codes differ. The message shows the difference.
    pub fn same(&self, tool: Tool, args: &[&str]) -> Reply {
        self.same_with_input(tool, args, b"")
    }

    /// Does the same as [`Differential::same`], with standard input.
    ///
    /// # Panics
    /// When the outputs or the exit codes differ.
    pub fn same_with_input(&self, tool: Tool, args: &[&str], stdin: &[u8]) -> Reply {
        let theirs = self.run(Side::Qemu, tool, args, stdin);
        for side in Side::OURS {
            let ours = self.run(side, tool, args, stdin);
            self.compare(side, tool, args, &theirs, &ours);
        }
        theirs
    }

    /// Does the same as [`Differential::same`], but compares only the exit codes, not the outputs.
    ///
    /// # Panics
    /// When the exit codes differ.
    pub fn same_exit_code(&self, tool: Tool, args: &[&str]) -> Reply {
        let theirs = self.run(Side::Qemu, tool, args, b"");
        for side in Side::OURS {
            let ours = self.run(side, tool, args, b"");
            let what = format!("{} {} ({})", tool.qemu_name(), args.join(" "), side.name());
            assert_eq!(
                ours.code(),
                theirs.code(),
                "{what}\nQEMU said: {}{}oxblk said: {}{}",
                theirs.out(),
                theirs.err(),
                ours.out(),
                ours.err()
            );
        }
        theirs
    }

    fn compare(&self, side: Side, tool: Tool, args: &[&str], theirs: &Reply, ours: &Reply) {
        let (qemu, oxblk) = (self.directory(Side::Qemu), self.directory(side));
        let text = |bytes: &[u8], directory: &Path| {
            self.called_as_qemu(tool, &normalise(bytes, directory, self.rules))
        };
        let mut wrong = String::new();
        for (stream, a, b) in
            [("stdout", &theirs.stdout, &ours.stdout), ("stderr", &theirs.stderr, &ours.stderr)]
        {
            let (a, b) = (text(a, &qemu), text(b, &oxblk));
            if a != b {
                wrong.push_str(&difference(stream, &a, &b));
            }
        }
        if theirs.code() != ours.code() {
            wrong.push_str(&format!("exit code: QEMU {}, oxblk {}\n", theirs.code(), ours.code()));
        }
        assert!(
            wrong.is_empty(),
            "{} {} ({}) differs\n{wrong}",
            tool.qemu_name(),
            args.join(" "),
            side.name()
        );
    }

    /// Replaces the name of oxblk's tool in messages by the name of QEMU's tool. A message begins with the name under which the
    /// tool was called.
    fn called_as_qemu(&self, tool: Tool, text: &str) -> String {
        let (qemu, own) = (tool.qemu_name(), tool.subcommand());
        let link = self.root.path().join("bin").join(qemu);
        text.replace(&*link.to_string_lossy(), qemu)
            .replace(&format!("{} {own}", oxblk().display()), qemu)
            .replace(&format!("oxblk {own}"), qemu)
    }

    /// Asserts that the file of QEMU and the files of oxblk have the same bytes.
    ///
    /// # Panics
    /// When the files differ. The message contains the lengths or the offset of the first difference.
    pub fn same_bytes(&self, name: &str) {
        let theirs = std::fs::read(self.directory(Side::Qemu).join(name)).expect("QEMU's file");
        for side in Side::OURS {
            let ours = std::fs::read(self.directory(side).join(name)).expect("oxblk's file");
            assert_eq!(ours.len(), theirs.len(), "the length of {name} ({})", side.name());
            let first = theirs.iter().zip(&ours).position(|(a, b)| a != b);
            assert_eq!(first, None, "first differing byte of {name} ({})", side.name());
        }
    }

    /// Asserts that a guest reads the same from the image of each program (`qemu-img compare`), and that oxblk's images pass
    /// `qemu-img check` if the format has a check.
    ///
    /// # Panics
    /// When the contents differ or the check finds a fault.
    pub fn same_content(&self, name: &str) {
        for side in Side::OURS {
            let ours = self.directory(side);
            check_clean(&ours.join(name));
            Program::new("qemu-img")
                .args(["compare", "-q"])
                .arg(self.directory(Side::Qemu).join(name))
                .arg(ours.join(name))
                .succeed();
        }
    }
}

impl Differential {
    /// Does the same as [`Differential::same_content`] for an image that `words` select on a command line: QEMU reads the same
    /// contents from oxblk's image as from its own image.
    ///
    /// # Panics
    /// When the contents differ or the check finds a fault.
    pub fn same_content_of(&self, words: &[String], name: &str) {
        let content = |directory: &Path, check: bool| {
            if check {
                check_finds_nothing(
                    Program::new("qemu-img").arg("check").args(words).directory(directory),
                );
            }
            let raw = format!("{name}.content");
            let convert = Program::new("qemu-img").args(["convert", "-O", "raw"]);
            convert.args(words).arg(&raw).directory(directory).succeed();
            let bytes = std::fs::read(directory.join(&raw)).expect("the content");
            std::fs::remove_file(directory.join(&raw)).expect("the content");
            bytes
        };
        let theirs = content(&self.directory(Side::Qemu), false);
        for side in Side::OURS {
            let same = content(&self.directory(side), true) == theirs;
            assert!(same, "the content of {name} ({})", side.name());
        }
    }
}

/// The exit code of `qemu-img check` for a format without a check.
const NO_CHECK: i32 = 63;

/// Asserts that `qemu-img check` finds neither errors nor leaks. A format without a check passes.
///
/// # Panics
/// When the check finds a fault.
pub fn check_clean(image: &Path) {
    check_finds_nothing(Program::new("qemu-img").arg("check").arg(image));
}

/// Runs the command `check` and asserts that it finds no fault.
fn check_finds_nothing(check: Program) {
    let what = format!("{check:?}");
    let reply = check.run();
    let is_clean = matches!(reply.code(), 0 | NO_CHECK);
    assert!(is_clean, "{what}\n{}{}", reply.out(), reply.err());
}

/// Returns both texts, and the number of the first line in which they differ.
fn difference(stream: &str, theirs: &str, ours: &str) -> String {
    let mut lines = theirs.lines().zip(ours.lines()).enumerate();
    let first = lines.find(|(_, (a, b))| a != b).map_or_else(
        || theirs.lines().count().min(ours.lines().count()) + 1,
        |(index, _)| index + 1,
    );
    format!("{stream}, from line {first}\n--- QEMU\n{theirs}\n--- oxblk\n{ours}\n---\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_the_first_line_that_differs() {
        assert!(difference("stdout", "a\nb\n", "a\nc\n").starts_with("stdout, from line 2\n"));
        assert!(difference("stdout", "a\n", "a\nc\n").starts_with("stdout, from line 2\n"));
    }
}

//! Command lines that are generated from tables of options and values, and run with QEMU's tools and with oxblk.
//!
//! A seed determines a [`Case`]: a command with some of its options, in any form that a user may write, and with good, bad or
//! odd values. Both tools run the command line in directories with the same files. The output, the exit code and the bytes of
//! every file after the run must be the same. The module `meant` lists the intended differences; docs/differences.md explains
//! each of them.

mod case;
mod fixture;
mod img;
mod io;
mod layout;
mod meant;
mod values;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;

pub use case::Case;

use super::normalise::{Rules, normalise};
use crate::program::{Program, Reply, Tool, oxblk};

/// A command line for which the results of the two programs differ.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Its seed.
    pub seed: u64,
    /// The command line.
    pub line: String,
    /// A description of the difference.
    pub text: String,
}

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Command lines that were compared.
    pub compared: u64,
    /// Command lines on which QEMU's tool ended by a signal. These command lines are not compared.
    pub crashed: u64,
    /// Compared command lines on which QEMU's tool ended with exit code 0.
    pub succeeded: u64,
    /// The command lines for which the results differ.
    pub differences: Vec<Difference>,
}

/// The directories of one worker.
struct Bench {
    root: TempDir,
    files: fixture::Files,
}

impl Bench {
    fn new() -> Self {
        let root = tempfile::Builder::new().prefix("oxblk-diff-").tempdir();
        let root = root.expect("a scratch directory");
        let first = root.path().join("fixture");
        std::fs::create_dir(&first).expect("a scratch directory");
        fixture::make(&first);
        let files = fixture::read(&first);
        let bin = root.path().join("bin");
        std::fs::create_dir(&bin).expect("a scratch directory");
        for tool in Tool::ALL {
            std::os::unix::fs::symlink(oxblk(), bin.join(tool.qemu_name())).expect("a link");
        }
        Self { root, files }
    }

    fn directory(&self, side: &str) -> PathBuf {
        let directory = self.root.path().join(side);
        if directory.exists() {
            std::fs::remove_dir_all(&directory).expect("a scratch directory");
        }
        std::fs::create_dir(&directory).expect("a scratch directory");
        fixture::write(&self.files, &directory);
        directory
    }

    fn run(&self, program: &Path, case: &Case, directory: &Path) -> Reply {
        Program::new(program)
            .args(&case.arguments)
            .directory(directory)
            .time_limit(Duration::from_secs(60))
            .run()
    }

    /// Runs a case with both programs. Returns the difference, if there is one.
    fn compare(&self, case: &Case, outcome: &mut Outcome) -> Option<String> {
        let (qemu, own) = (self.directory("qemu"), self.directory("oxblk"));
        let name = case.tool.qemu_name();
        let theirs = self.run(Path::new(name), case, &qemu);
        if theirs.code() >= 128 {
            outcome.crashed += 1;
            return None;
        }
        let bin = self.root.path().join("bin").join(name);
        let ours = self.run(&bin, case, &own);
        outcome.compared += 1;
        outcome.succeeded += u64::from(theirs.code() == 0);
        if meant::is_meant_refusal(case, &theirs) {
            return None;
        }
        let creation_fails = meant::creation_fails(case, &theirs, &ours);
        let rules = Rules { disk_size: true, progress: true };
        let text = |bytes: &[u8], directory: &Path| {
            let text = normalise(bytes, directory, rules);
            meant::normalise(&text.replace(&*bin.to_string_lossy(), name))
        };
        let mut wrong = String::new();
        for (stream, a, b) in
            [("stdout", &theirs.stdout, &ours.stdout), ("stderr", &theirs.stderr, &ours.stderr)]
        {
            let (a, b) = (text(a, &qemu), text(b, &own));
            let [mut a, mut b] = [a.as_str(), b.as_str()];
            if stream == "stderr" && creation_fails {
                [a, b] = [a, b].map(meant::without_last_line);
            }
            let same = a == b || meant::is_unordered(case) && sorted(a) == sorted(b);
            if !same {
                wrong.push_str(&format!("{stream}\n--- QEMU\n{a}--- oxblk\n{b}---\n"));
            }
        }
        if theirs.code() != ours.code() {
            wrong.push_str(&format!("exit code: QEMU {}, oxblk {}\n", theirs.code(), ours.code()));
        }
        wrong.push_str(&self.files_differ(case, &ours, &qemu, &own));
        (!wrong.is_empty()).then_some(wrong)
    }

    /// Describes how the files of two directories differ. The text is empty if they are the same.
    fn files_differ(&self, case: &Case, reply: &Reply, qemu: &Path, own: &Path) -> String {
        let ours = fixture::read(own);
        let mut text = String::new();
        if reply.code() != 0 && meant::changes_all_or_nothing(case) {
            for name in ours.keys().filter(|name| self.files.get(*name) != ours.get(*name)) {
                text.push_str(&format!("{}: changed by a failed command\n", name.display()));
            }
            return text;
        }
        if meant::contents_may_differ(case, reply.code()) {
            return text;
        }
        let theirs = fixture::read(qemu);
        let survives = meant::target_may_survive(case, reply.code());
        let removed = meant::target_is_removed(case, reply);
        for name in theirs.keys().filter(|name| !ours.contains_key(*name) && !removed) {
            text.push_str(&format!("{}: only QEMU made it\n", name.display()));
        }
        for name in ours.keys().filter(|name| !theirs.contains_key(*name) && !survives) {
            text.push_str(&format!("{}: only oxblk made it\n", name.display()));
        }
        for (name, a) in &theirs {
            let Some(b) = ours.get(name).filter(|b| *b != a) else { continue };
            if meant::bytes_may_differ(case) || meant::is_shrunk(self.files.get(name), b) {
                text.push_str(&contents_differ(&qemu.join(name), &own.join(name)));
                continue;
            }
            let (a, b) = (layout::significant(a), layout::significant(b));
            if a == b {
                continue;
            }
            let at = a.iter().zip(&b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
            let lengths = (a.len(), b.len());
            text.push_str(&format!(
                "{}: differs at {at:#x}, lengths {lengths:x?}\n",
                name.display()
            ));
        }
        text
    }
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines
}

/// Describes how the guest-visible contents of two images differ. The text is empty if they are the same.
fn contents_differ(theirs: &Path, ours: &Path) -> String {
    let mut program = Program::new("qemu-img").args(["compare", "-U"]).arg(theirs).arg(ours);
    if let Some(directory) = theirs.parent() {
        // A name such as `file:NAME` is relative to the working directory.
        program = program.directory(directory);
    }
    let reply = program.run();
    if reply.code() == 0 {
        return String::new();
    }
    format!("{}: another content: {}{}", theirs.display(), reply.out(), reply.err())
}

/// Runs the cases of `count` seeds from `first` on. At most `jobs` cases run concurrently.
///
/// # Panics
/// When a tool cannot be run.
pub fn run(first: u64, count: u64, jobs: usize) -> Outcome {
    let (next, all) = (AtomicU64::new(0), Mutex::new(Outcome::default()));
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                let bench = Bench::new();
                let mut own = Outcome::default();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    let seed = first + index;
                    let case = Case::new(seed);
                    if meant::is_meant(&case) {
                        continue;
                    }
                    let compared =
                        catch_unwind(AssertUnwindSafe(|| bench.compare(&case, &mut own)));
                    // A tool that does not end counts as a difference.
                    let found = compared.unwrap_or_else(|panic| Some(crate::panic_text(&*panic)));
                    if let Some(text) = found {
                        own.differences.push(Difference { seed, line: case.line(), text });
                    }
                }
                let mut all = all.lock().expect("no worker panics");
                all.compared += own.compared;
                all.crashed += own.crashed;
                all.succeeded += own.succeeded;
                all.differences.extend(own.differences);
            });
        }
    });
    let mut all = all.into_inner().expect("no worker panics");
    all.differences.sort_by_key(|difference| difference.seed);
    all
}

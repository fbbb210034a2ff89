//! Operations that read all metadata of a large image: `check` and internal snapshots of a disk of 1 TiB whose clusters are all
//! allocated, in `/dev/shm`. The file is sparse: it contains 128 MiB of L2 tables and 32 MiB of refcounts, and no data.
//!
//! Each run starts from a copy of the same image. The two programs run alternately, forwards and backwards.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::CaseResult;
use crate::options::Options;
use crate::report::{self, Series};
use crate::tools::{Measured, timed};

/// One comparison.
struct Case {
    name: &'static str,
    /// The arguments after `oxblk img` and `qemu-img`; the image is the last argument.
    arguments: &'static [&'static str],
    /// The image from which a run starts.
    image: &'static str,
    /// The target for the time of QEMU divided by the time of oxblk.
    mark: f64,
}

const CASES: &[Case] = &[
    Case { name: "check", arguments: &["check"], image: "plain.qcow2", mark: 3.0 },
    Case {
        name: "check, 10 snapshots",
        arguments: &["check"],
        image: "snapshots.qcow2",
        mark: 3.0,
    },
    Case {
        name: "snapshot -c, the first",
        arguments: &["snapshot", "-c", "new"],
        image: "plain.qcow2",
        mark: 5.0,
    },
    Case {
        name: "snapshot -c, the eleventh",
        arguments: &["snapshot", "-c", "new"],
        image: "snapshots.qcow2",
        mark: 5.0,
    },
    Case {
        name: "snapshot -d, one of ten",
        arguments: &["snapshot", "-d", "s5"],
        image: "snapshots.qcow2",
        mark: 5.0,
    },
    Case {
        name: "snapshot -d, the only one",
        arguments: &["snapshot", "-d", "s1"],
        image: "one.qcow2",
        mark: 5.0,
    },
];

struct Bench {
    dir: PathBuf,
    oxblk: PathBuf,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

const OPTIONS: &[(&str, &str)] = &[
    ("--rounds", "number of rounds; each runs both programs twice, in the order A B B A"),
    ("--size", "size of the disk, for example 1T"),
    ("--only", "run only the comparisons whose names contain this text"),
    ("--oxblk", "path of the program; the default is oxblk in the folder of this program"),
];

/// Runs the case.
pub(crate) fn run(args: &[String]) -> CaseResult {
    let options = Options::parse(args, OPTIONS)?;
    let rounds: u64 = options.number("--rounds", 1)?;
    let only = options.text("--only").unwrap_or_default();
    let size = options.text("--size").unwrap_or("1T");
    let bench = prepare(options.text("--oxblk").map(PathBuf::from), size)?;
    let mut summary = Vec::new();
    for case in CASES.iter().filter(|case| case.name.contains(only)) {
        let found = bench.compare(case, rounds)?;
        report::print(case.name, "seconds", 1.0, &found.times);
        report::print(&format!("{}: peak memory", case.name), "MiB", 1024.0, &found.peaks);
        summary.push((case, found));
    }
    println!(
        "\n| case | oxblk img | qemu-img | times as fast | mark | less processor time | peak memory, oxblk, qemu-img |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (case, found) in &summary {
        let [ours, theirs] = [&found.times[0], &found.times[1]].map(Series::median);
        let [our_work, their_work] = [&found.processor[0], &found.processor[1]].map(Series::median);
        let [our_peak, their_peak] =
            [&found.peaks[0], &found.peaks[1]].map(|peak| peak.median() / 1024.0);
        println!(
            "| {} | {ours:.2} s | {theirs:.2} s | {:.1} | ≥ {} | {:.1} | {our_peak:.0}, {their_peak:.0} MiB |",
            case.name,
            theirs / ours,
            case.mark,
            their_work / our_work,
        );
    }
    Ok(())
}

fn prepare(oxblk: Option<PathBuf>, size: &str) -> Result<Bench, String> {
    let built = std::env::current_exe().map_err(|error| error.to_string())?;
    let oxblk = oxblk.unwrap_or_else(|| built.with_file_name("oxblk"));
    if !oxblk.exists() {
        return Err(format!("{} is not built: cargo build --release", oxblk.display()));
    }
    let dir = Path::new("/dev/shm").join(format!("oxblk-bench-metadata-{}", std::process::id()));
    std::fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let bench = Bench { dir, oxblk };
    let create = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "plain.qcow2"];
    bench.qemu_img(&[&create[..], &[size]].concat())?;
    bench.copy("plain.qcow2", "snapshots.qcow2")?;
    for number in 1..=10 {
        let name = format!("s{number}");
        bench.oxblk_img(&["snapshot", "-c", &name, "snapshots.qcow2"])?;
        if number == 1 {
            bench.copy("snapshots.qcow2", "one.qcow2")?;
        }
    }
    Ok(bench)
}

impl Bench {
    fn compare(&self, case: &Case, rounds: u64) -> Result<Measured, String> {
        let mut found = Measured::new();
        for _ in 0..rounds {
            for side in [0, 1, 1, 0] {
                self.copy(case.image, "run.qcow2")?;
                let mut command = match side {
                    0 => Command::new(&self.oxblk),
                    _ => Command::new("qemu-img"),
                };
                if side == 0 {
                    command.arg("img");
                }
                command.args(case.arguments).arg("run.qcow2").current_dir(&self.dir);
                found.add(side, &timed(&mut command)?);
            }
        }
        Ok(found)
    }

    fn qemu_img(&self, args: &[&str]) -> CaseResult {
        self.program("qemu-img", args)
    }

    fn oxblk_img(&self, args: &[&str]) -> CaseResult {
        let program = self.oxblk.to_str().ok_or("a path that is not text")?;
        self.program(program, &[&["img"][..], args].concat())
    }

    fn copy(&self, from: &str, to: &str) -> CaseResult {
        self.program("cp", &["--sparse=always", from, to])
    }

    fn program(&self, name: &str, args: &[&str]) -> CaseResult {
        match Command::new(name).args(args).current_dir(&self.dir).status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{name} {}: {status}", args.join(" "))),
            Err(error) => Err(format!("{name}: {error}")),
        }
    }
}

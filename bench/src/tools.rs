//! `oxblk img` against `qemu-img`, alternately, on the same disk on tmpfs: conversions, benchmarks, peak memory.
//!
//! About two fifths of the disk are holes; the rest is half random bytes, half text. Each pair of runs is followed by a pair in
//! the opposite order, so that a drift of the machine's speed affects both programs equally. Before the timed runs, each
//! program runs once untimed.
//!
//! In a case with a new target, the kernel needs most of the time to allocate memory for the target. The cases "in place" have
//! targets whose memory is already allocated, and show the cost of the programs themselves.

mod cases;
mod disk;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::CaseResult;
use crate::options::Options;
use crate::report::{self, Series};
use cases::{CASES, Case, Fresh};

struct Bench {
    dir: PathBuf,
    oxblk: PathBuf,
    /// Size of the disk, as an argument of qemu-img.
    size: String,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Time and peak memory of one run.
pub(crate) struct Run {
    pub(crate) seconds: f64,
    /// Processor time on all cores, of the program and of the kernel on its behalf.
    pub(crate) processor_seconds: f64,
    pub(crate) peak_kib: f64,
}

/// The measurements of a case, first those of oxblk, then those of QEMU.
pub(crate) struct Measured {
    pub(crate) times: [Series; 2],
    pub(crate) processor: [Series; 2],
    pub(crate) peaks: [Series; 2],
}

impl Measured {
    pub(crate) fn new() -> Self {
        let series = || ["oxblk img", "qemu-img"].map(Series::new);
        Self { times: series(), processor: series(), peaks: series() }
    }

    /// Adds a run of oxblk (`side` is 0) or of QEMU (1).
    pub(crate) fn add(&mut self, side: usize, run: &Run) {
        self.times[side].runs.push(run.seconds);
        self.processor[side].runs.push(run.processor_seconds);
        self.peaks[side].runs.push(run.peak_kib);
    }
}

const OPTIONS: &[(&str, &str)] = &[
    ("--rounds", "number of rounds; each runs both programs twice, in the order A B B A"),
    ("--gib", "size of the disk in GiB"),
    ("--only", "run only the comparisons whose names contain this text"),
    ("--oxblk", "path of the program; the default is oxblk in the folder of this program"),
];

/// Runs the case.
pub(crate) fn run(args: &[String]) -> CaseResult {
    let options = Options::parse(args, OPTIONS)?;
    let (rounds, gib) = (options.number("--rounds", 2)?, options.number("--gib", 4)?);
    let only = options.text("--only").unwrap_or_default();
    let bench = prepare(options.text("--oxblk").map(PathBuf::from), gib)?;
    let cases: Vec<&Case> = CASES.iter().filter(|case| case.name.contains(only)).collect();
    for kind in ["zlib", "zstd"] {
        let name = format!("{kind}.qcow2");
        if cases.iter().any(|case| case.arguments.contains(&name.as_str())) {
            bench.pack(kind, &name)?;
        }
    }
    let mut summary = Vec::new();
    for case in cases {
        let found = bench.compare(case, rounds)?;
        report::print(case.name, "seconds", 1.0, &found.times);
        report::print(&format!("{}: processor", case.name), "seconds", 1.0, &found.processor);
        report::print(&format!("{}: peak memory", case.name), "MiB", 1024.0, &found.peaks);
        summary.push((case, found));
    }
    println!(
        "\n| case | oxblk | qemu-img | times as fast | mark | less processor time | peak memory, oxblk | qemu-img |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (case, found) in &summary {
        let [ours, theirs] = [&found.times[0], &found.times[1]].map(Series::median);
        let [our_work, their_work] = [&found.processor[0], &found.processor[1]].map(Series::median);
        let [our_peak, their_peak] =
            [&found.peaks[0], &found.peaks[1]].map(|peak| peak.median() / 1024.0);
        println!(
            "| {} | {ours:.2} s | {theirs:.2} s | {:.2} | ≥ {} | {:.2} | {our_peak:.0} MiB | {their_peak:.0} MiB |",
            case.name,
            theirs / ours,
            case.mark,
            their_work / our_work,
        );
    }
    println!("\nTimes as fast as qemu-img:\n");
    report::chart(summary.iter().map(|(case, found)| {
        let [ours, theirs] = [&found.times[0], &found.times[1]].map(Series::median);
        (case.name, theirs / ours)
    }));
    println!("\nTimes less processor time than qemu-img:\n");
    report::chart(summary.iter().map(|(case, found)| {
        let [ours, theirs] = [&found.processor[0], &found.processor[1]].map(Series::median);
        (case.name, theirs / ours)
    }));
    Ok(())
}

impl Bench {
    fn compare(&self, case: &Case, rounds: u64) -> Result<Measured, String> {
        let mut found = Measured::new();
        // The first run that writes to memory makes the kernel allocate this memory. The time of the allocation must not count
        // for either program.
        for ours in [true, false] {
            self.once(case, ours)?;
        }
        for _ in 0..rounds {
            for side in [0, 1, 1, 0] {
                found.add(side, &self.once(case, side == 0)?);
            }
        }
        Ok(found)
    }

    fn once(&self, case: &Case, ours: bool) -> Result<Run, String> {
        match case.fresh {
            Fresh::Absent(name) => drop(std::fs::remove_file(self.dir.join(name))),
            Fresh::Image(name) => {
                let _ = std::fs::remove_file(self.dir.join(name));
                self.qemu_img(&["create", "-q", "-f", "qcow2", name, &self.size])?;
            }
            Fresh::Overlay(name) => {
                let _ = std::fs::remove_file(self.dir.join(name));
                self.qemu_img(&[
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-b",
                    "disk.qcow2",
                    "-F",
                    "qcow2",
                    name,
                ])?;
            }
            Fresh::Emptied(name) => {
                self.qemu_img(&["create", "-q", "-f", "qcow2", "empty.qcow2", &self.size])?;
                self.overwrite_start("empty.qcow2", name)
                    .map_err(|error| format!("{name}: {error}"))?;
            }
            Fresh::Nothing => {}
        }
        let mut command = if ours {
            let mut command = Command::new(&self.oxblk);
            command.arg("img");
            command
        } else {
            Command::new("qemu-img")
        };
        let (verb, rest) = case.arguments.split_first().ok_or("a case without arguments")?;
        command.arg(verb);
        if !ours {
            command.args(case.qemu_only);
        }
        timed(command.args(rest).current_dir(&self.dir))
    }

    /// Overwrites the start of the file `target` with the content of the file `name`.
    fn overwrite_start(&self, name: &str, target: &str) -> std::io::Result<()> {
        let bytes = std::fs::read(self.dir.join(name))?;
        File::options().write(true).open(self.dir.join(target))?.write_all(&bytes)
    }

    /// Creates a compressed image of the disk.
    fn pack(&self, kind: &str, name: &str) -> CaseResult {
        let option = format!("compression_type={kind}");
        let mut command = Command::new(&self.oxblk);
        command.args(["img", "convert", "-c", "-O", "qcow2", "-o", &option, "disk.raw", name]);
        timed(command.current_dir(&self.dir)).map(drop)
    }

    fn qemu_img(&self, args: &[&str]) -> CaseResult {
        let status = Command::new("qemu-img").args(args).current_dir(&self.dir).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("qemu-img {}: {status}", args.join(" "))),
            Err(error) => Err(format!("qemu-img: {error}")),
        }
    }
}

/// Runs a program to completion, and samples its peak memory while it runs.
pub(crate) fn timed(command: &mut Command) -> Result<Run, String> {
    let (begin, work_before) = (Instant::now(), children_work()?);
    let mut child =
        command.stdout(Stdio::null()).spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let status_file = format!("/proc/{}/status", child.id());
    let mut peak_kib = 0.0;
    loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            let seconds = begin.elapsed().as_secs_f64();
            if !status.success() {
                return Err(format!("{command:?}: {status}"));
            }
            let processor_seconds = children_work()? - work_before;
            return Ok(Run { seconds, processor_seconds, peak_kib });
        }
        if let Some(peak) = peak_of(&status_file) {
            peak_kib = peak;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Processor time of the child processes that have ended, in seconds (proc(5): fields 16 and 17 of `stat`, in
/// hundredths).
fn children_work() -> Result<f64, String> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|error| error.to_string())?;
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let ticks: f64 = fields.skip(13).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / 100.0)
}

/// The peak resident memory of a running process in KiB.
fn peak_of(status_file: &str) -> Option<f64> {
    let status = std::fs::read_to_string(status_file).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn prepare(oxblk: Option<PathBuf>, gib: u64) -> Result<Bench, String> {
    let built = std::env::current_exe().map_err(|error| error.to_string())?;
    let oxblk = oxblk.unwrap_or_else(|| built.with_file_name("oxblk"));
    if !oxblk.exists() {
        return Err(format!("{} is not built: cargo build --release", oxblk.display()));
    }
    let dir = Path::new("/dev/shm").join(format!("oxblk-bench-tools-{}", std::process::id()));
    std::fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let bench = Bench { dir, oxblk, size: format!("{gib}G") };
    disk::write(&bench.dir.join("disk.raw"), gib).map_err(|error| format!("disk.raw: {error}"))?;
    bench.qemu_img(&["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"])?;
    bench.qemu_img(&["convert", "-O", "qcow2", "disk.raw", "old.qcow2"])?;
    bench.qemu_img(&["convert", "-O", "raw", "disk.raw", "old.raw"])?;
    bench.qemu_img(&["convert", "-O", "raw", "disk.raw", "other.raw"])?;
    disk::change(&bench.dir.join("other.raw"), gib)
        .map_err(|error| format!("other.raw: {error}"))?;
    let metadata = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"];
    bench.qemu_img(&[&metadata[..], &["pieces.qcow2", "128G"]].concat())?;
    disk::break_up(&bench.dir.join("pieces.qcow2"))
        .map_err(|error| format!("pieces.qcow2: {error}"))?;
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "full.qcow2", "1G"])?;
    bench.qemu_img(&[
        "bench",
        "-q",
        "-w",
        "-c",
        "1024",
        "-s",
        "1M",
        "-d",
        "8",
        "-f",
        "qcow2",
        "full.qcow2",
    ])?;
    Ok(bench)
}

//! fio over NBD against `oxblk serve` and `qemu-nbd`, alternately, on the same image (by default qcow2) on tmpfs.
//!
//! The image is full of random bytes, so that every read finds data. One server runs at a time; each run starts the
//! server, runs fio and stops the server. The contenders run forwards and then backwards.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::CaseResult;
use crate::options::Options;
use crate::report::{self, Series};

const IMAGE_SIZE: u64 = 1 << 30;

/// Returns the command of a server that exports an image on a socket.
type Server = fn(&Bench) -> Command;

const SERVERS: &[(&str, Server)] =
    &[("oxblk serve", oxblk), ("qemu-nbd", qemu_nbd), ("qemu-nbd --aio=io_uring", qemu_nbd_uring)];

/// Name of a load, and fio's arguments for it.
const LOADS: &[(&str, &[&str])] = &[
    ("4 KiB random reads, depth 32", &["--rw=randread", "--bs=4k", "--iodepth=32"]),
    ("4 KiB random writes, depth 32", &["--rw=randwrite", "--bs=4k", "--iodepth=32"]),
    (
        "the same reads, 4 connections",
        &["--rw=randread", "--bs=4k", "--iodepth=32", "--numjobs=4", "--group_reporting"],
    ),
    ("1 MiB reads, depth 8", &["--rw=read", "--bs=1m", "--iodepth=8"]),
];

struct Bench {
    dir: PathBuf,
    oxblk: PathBuf,
}

impl Bench {
    fn image(&self) -> PathBuf {
        self.dir.join("disk.qcow2")
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

const OPTIONS: &[(&str, &str)] = &[
    ("--rounds", "number of rounds; each runs all servers forwards and then backwards"),
    ("--seconds", "length of a run"),
    ("--load", "number of the only load to run"),
    ("--format", "format of the image, for example raw"),
];

/// Runs the case.
pub(crate) fn run(args: &[String]) -> CaseResult {
    let options = Options::parse(args, OPTIONS)?;
    let (rounds, seconds) = (options.number("--rounds", 3)?, options.number("--seconds", 3)?);
    let only = options.number("--load", usize::MAX)?;
    let bench = prepare(options.text("--format").unwrap_or("qcow2"))?;
    for (index, (load, arguments)) in LOADS.iter().enumerate() {
        if only != usize::MAX && only != index {
            continue;
        }
        let mut series: Vec<_> = SERVERS.iter().map(|(name, _)| Series::new(name)).collect();
        for round in 0..rounds * 2 {
            let mut turns: Vec<usize> = (0..SERVERS.len()).collect();
            if round % 2 == 1 {
                turns.reverse();
            }
            for turn in turns {
                let rate = measure(&bench, SERVERS[turn].1, arguments, seconds)?;
                series[turn].runs.push(rate);
            }
        }
        report::print(load, "thousand requests per second", 1000.0, &series);
    }
    Ok(())
}

/// Builds oxblk and makes the image.
fn prepare(format: &str) -> Result<Bench, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--release", "--package", "oxblk-cli"]);
    finish(build.current_dir(env!("CARGO_MANIFEST_DIR")))?;
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let dir = PathBuf::from(format!("/dev/shm/oxblk-bench-nbd-{}", std::process::id()));
    std::fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let bench = Bench { oxblk: exe.with_file_name("oxblk"), dir };
    let raw = bench.dir.join("raw");
    fill(&raw).map_err(|error| format!("{}: {error}", raw.display()))?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", format]).arg(&raw).arg(bench.image());
    finish(&mut convert)?;
    let _ = std::fs::remove_file(raw);
    Ok(bench)
}

fn fill(path: &Path) -> std::io::Result<()> {
    let (mut from, mut to) = (File::open("/dev/urandom")?, File::create(path)?);
    let mut piece = vec![0; 1 << 20];
    for _ in 0..IMAGE_SIZE >> 20 {
        from.read_exact(&mut piece)?;
        to.write_all(&piece)?;
    }
    Ok(())
}

fn finish(command: &mut Command) -> CaseResult {
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} ended with {status}")) }
}

fn oxblk(bench: &Bench) -> Command {
    let mut command = Command::new(&bench.oxblk);
    command.arg("serve").arg(bench.image()).arg("--nbd").arg(bench.socket());
    command
}

fn qemu_nbd(bench: &Bench) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=8", "-k"]).arg(bench.socket()).arg(bench.image());
    command
}

fn qemu_nbd_uring(bench: &Bench) -> Command {
    let mut command = qemu_nbd(bench);
    command.arg("--aio=io_uring");
    command
}

/// A running server. Dropping the value stops the server.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// Measures requests per second in one run.
fn measure(bench: &Bench, server: Server, load: &[&str], seconds: usize) -> Result<f64, String> {
    let _ = std::fs::remove_file(bench.socket());
    let mut command = server(bench);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Running(command.spawn().map_err(|error| format!("{command:?}: {error}"))?);
    let start = Instant::now();
    while UnixStream::connect(bench.socket()).is_err() {
        if start.elapsed() > Duration::from_secs(10) {
            return Err(format!("{command:?} does not listen"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = Command::new("fio")
        .args(["--name=nbd", "--ioengine=nbd", "--time_based", "--output-format=json"])
        .arg(format!("--uri=nbd+unix:///?socket={}", bench.socket().display()))
        .arg(format!("--runtime={seconds}"))
        .args(load)
        .output()
        .map_err(|error| format!("fio: {error}"))?;
    // fio may print notes before its report.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or_default();
    let report: Value = serde_json::from_str(json)
        .map_err(|_| format!("fio: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
    let iops = |way: &str| report["jobs"][0][way]["iops"].as_f64().unwrap_or(0.0);
    Ok(iops("read") + iops("write"))
}

//! 4 KiB random reads at queue depth 32 on one thread, from a file on tmpfs. The case measures the cost of an operation.
//!
//! Contenders: oxblk-ring with 32 tasks; a bare loop on a ring with the fastest options; compio with 32 tasks; fio with default
//! and with its fastest settings. The contenders run one after another, forwards and then backwards, on the same file.

mod bare;
mod fio;
mod ours;
mod peer_compio;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::CaseResult;
use crate::options::Options;
use crate::random::Random;
use crate::report::{self, Series};

/// Bytes per read.
const BLOCK: usize = 4096;
/// Reads in flight.
const DEPTH: usize = 32;
const FILE_SIZE: u64 = 1 << 30;

/// The parameters of a contender.
struct Task<'a> {
    path: &'a Path,
    time: Duration,
}

/// Reads per second, or the reason why the contender cannot run.
type Rate = Result<f64, String>;

/// Name and function of a contender.
type Contender = (&'static str, fn(&Task<'_>) -> Rate);

const CONTENDERS: &[Contender] = &[
    ("oxblk-ring, 32 tasks", ours::run),
    ("bare io-uring loop", bare::run),
    ("compio, 32 tasks", peer_compio::run),
    ("fio io_uring", fio::plain),
    ("fio io_uring, fixed bufs and files", fio::fixed),
];

const OPTIONS: &[(&str, &str)] = &[
    ("--rounds", "number of rounds; each runs all contenders forwards and then backwards"),
    ("--seconds", "length of a run"),
    ("--only", "number of the only contender to run, for a profiler"),
];

/// Runs the case.
pub(crate) fn run(args: &[String]) -> CaseResult {
    let options = Options::parse(args, OPTIONS)?;
    let (rounds, seconds): (u64, u64) =
        (options.number("--rounds", 3)?, options.number("--seconds", 2)?);
    let only = options.number("--only", u64::MAX)?;
    let file = DataFile::make()?;
    let task = Task { path: &file.0, time: Duration::from_secs(seconds) };
    let mut series: Vec<Series> = CONTENDERS.iter().map(|(name, _)| Series::new(name)).collect();
    if let Some((name, contender)) = usize::try_from(only).ok().and_then(|i| CONTENDERS.get(i)) {
        println!("{name}: {:.0} reads/s", contender(&task)?);
        return Ok(());
    }
    for _ in 0..rounds {
        let forwards = 0..CONTENDERS.len();
        for i in forwards.clone().chain(forwards.rev()) {
            if let (Some((_, contender)), Some(series)) = (CONTENDERS.get(i), series.get_mut(i)) {
                series.runs.push(contender(&task)?);
            }
        }
    }
    report::print(
        "engine",
        "million 4 KiB reads per second, depth 32, one thread, file in /dev/shm",
        1e6,
        &series,
    );
    Ok(())
}

/// The file that all contenders read. The file is full of data, and is removed at the end.
struct DataFile(PathBuf);

impl DataFile {
    fn make() -> Result<DataFile, String> {
        let data =
            DataFile(PathBuf::from(format!("/dev/shm/oxblk-bench-{}.dat", std::process::id())));
        let fail = |error: std::io::Error| format!("{}: {error}", data.0.display());
        let mut file = File::create_new(&data.0).map_err(fail)?;
        let mut block = vec![0u8; 1 << 20];
        let mut random = Random::new(1);
        for _ in 0..FILE_SIZE >> 20 {
            random.fill(&mut block);
            file.write_all(&block).map_err(fail)?;
        }
        Ok(data)
    }
}

impl Drop for DataFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Reads per second.
#[expect(clippy::cast_precision_loss, reason = "far fewer reads than a double can count")]
fn rate(reads: u64, took: Duration) -> f64 {
    reads as f64 / took.as_secs_f64()
}

//! The cost of filters that have nothing to do, and of requests with `O_DIRECT`.
//!
//! The first two comparisons are 4 KiB random reads and writes at queue depth 32 on one I/O thread, on a qcow2 image in
//! `/dev/shm` that is full of data: the image alone, and the image below each filter. The third comparison is reads and writes
//! with `O_DIRECT`, on a raw image in `/var/tmp` that is full of data. The contenders run one after another, forwards and then
//! backwards. Each run opens the disk and runs the load for a tenth of a second before the measurement.
//!
//! The processor time is the time of the process in all its threads, including the kernel's work on its behalf. It depends less
//! than the rate on other work of the machine.

mod load;
mod stacks;

use std::path::{Path, PathBuf};
use std::time::Duration;

use oxblk::{Create, Disk, Format, IoThreads};

use crate::CaseResult;
use crate::options::Options;
use crate::report::{self, Series};
use load::{Direction, Measured};
use stacks::STACKS;

/// Bytes per request.
const BLOCK: usize = 4096;
/// Requests in flight.
const DEPTH: u64 = 32;
/// Size of the disks in bytes.
const SIZE: u64 = 512 << 20;
/// Bytes per write when a disk is filled.
const CHUNK: usize = 1 << 20;

const OPTIONS: &[(&str, &str)] = &[
    ("--rounds", "number of rounds; each runs all contenders forwards and then backwards"),
    ("--seconds", "length of a run"),
    ("--only", "run only the comparisons whose names contain this text"),
    ("--dir", "folder of the image for O_DIRECT; the default is /var/tmp"),
];

/// A file that is removed when the value is dropped.
struct Image(PathBuf);

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs the case.
pub(crate) fn run(args: &[String]) -> CaseResult {
    let options = Options::parse(args, OPTIONS)?;
    let bench = Bench {
        rounds: options.number("--rounds", 3)?,
        time: Duration::from_secs(options.number("--seconds", 2)?),
        threads: IoThreads::start(1).map_err(|error| error.to_string())?,
    };
    let only = options.text("--only").unwrap_or_default();
    let dir = Path::new(options.text("--dir").unwrap_or("/var/tmp"));
    let filters = [("filters: reads", Direction::Read), ("filters: writes", Direction::Write)];
    let filters: Vec<_> = filters.iter().filter(|(name, _)| name.contains(only)).collect();
    if !filters.is_empty() {
        let image = bench.image(Path::new("/dev/shm"), Format::Qcow2)?;
        let names: Vec<_> = STACKS.iter().map(|stack| stack.name).collect();
        for (case, direction) in filters {
            bench.compare(case, &names, |turn| {
                let disk = STACKS[turn].open(&image.0, &bench.threads)?;
                bench.measure(disk, *direction)
            })?;
        }
    }
    let case = "O_DIRECT";
    if case.contains(only) {
        let image = bench.image(dir, Format::Raw)?;
        let directions = [Direction::Read, Direction::Write];
        bench.compare(case, &["reads", "writes"], |turn| {
            bench.measure(stacks::open_direct(&image.0, &bench.threads)?, directions[turn])
        })?;
    }
    Ok(())
}

struct Bench {
    rounds: usize,
    time: Duration,
    threads: IoThreads,
}

impl Bench {
    /// Creates an image that is full of data.
    fn image(&self, dir: &Path, format: Format) -> Result<Image, String> {
        let name = format!("oxblk-bench-filters-{}.{}", std::process::id(), format.name());
        let image = Image(dir.join(name));
        let create = Create::new(&image.0, format, SIZE).threads(self.threads.clone());
        create.run().wait().map_err(|error| error.to_string())?;
        let options = Disk::options().format(format).threads(self.threads.clone());
        let disk = options.open(&image.0).wait().map_err(|error| error.to_string())?;
        stacks::fill(&disk)?;
        disk.close().wait().map_err(|error| error.to_string())?;
        Ok(image)
    }

    fn measure(&self, disk: Disk, direction: Direction) -> Result<Measured, String> {
        let measured = load::measure(&disk, direction, self.time)?;
        disk.close().wait().map_err(|error| error.to_string())?;
        Ok(measured)
    }

    /// Runs the contenders with these names, and prints the results.
    fn compare(
        &self,
        case: &str,
        names: &[&'static str],
        once: impl Fn(usize) -> Result<Measured, String>,
    ) -> CaseResult {
        let series = || names.iter().map(|name| Series::new(name)).collect::<Vec<_>>();
        let (mut rates, mut processor) = (series(), series());
        for _ in 0..self.rounds {
            let forwards = 0..names.len();
            for turn in forwards.clone().chain(forwards.rev()) {
                let measured = once(turn)?;
                rates[turn].runs.push(measured.rate);
                processor[turn].runs.push(measured.processor);
            }
        }
        report::print(case, "thousand requests per second", 1e3, &rates);
        let title = format!("{case}: processor");
        report::print(&title, "microseconds of processor time per request", 1e-6, &processor);
        println!("\n| {case} | thousand/s | rate / first | processor time | time / first |");
        println!("| --- | --- | --- | --- | --- |");
        let first = [&rates[0], &processor[0]].map(Series::median);
        for (rate, processor) in rates.iter().zip(&processor) {
            let (name, rate, processor) = (rate.name, rate.median(), processor.median());
            println!(
                "| {name} | {:.1} | {:.3} | {:.2} µs | {:.3} |",
                rate / 1e3,
                rate / first[0],
                processor * 1e6,
                processor / first[1],
            );
        }
        println!();
        Ok(())
    }
}

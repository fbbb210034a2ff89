//! Runs the model and crash harnesses for a long time. `cargo xtask soak` builds and starts this program.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oxblk_tests::formats::{named, variants};
use oxblk_tests::soak::{Kind, Order, run};

const USAGE: &str = "\
Usage: cargo xtask soak [--minutes N] [--driver NAME] [--kind KIND,...] [--operations N] [--cuts N]
                        [--seed N] [--jobs N]

Runs the random tests until each variant of each driver has had its share of each kind:
  model          --operations (100000) on simulated disks
  threads        --operations on real files from four I/O threads
  cancel         a fifth of --operations, every other given up under way
  crash          --cuts (300) power cuts on simulated disks
  crash-threads  --cuts power cuts while four I/O threads work
  changes        --cuts power cuts amid changes of size, snapshots and contents
  changes-threads  the same, with requests from several I/O threads
  faults         --cuts failing disks
  each-fault     --cuts times every fifth operation of a disk fails, one at a time
  damage         --cuts damaged disks
  graph          --operations changes of the graph under requests, on simulated disks
  graph-threads  the same on real files, with requests from four I/O threads
  filtered-model, filtered-threads, filtered-crash, filtered-faults
                 as the tests without filters, with up to five random filters
With --minutes it runs for that time instead. --driver takes a family (qcow2) or a variant
(qcow2-64k), --jobs says how many tests run at once (as many as there are cores).

A failure prints its seed: run it again alone with
  --driver VARIANT --kind KIND --seed SEED --operations 1 --cuts 1 --jobs 1";

fn main() -> ExitCode {
    let order = match order(std::env::args().skip(1)) {
        Ok(order) => order,
        Err(message) => {
            eprintln!("{message}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    println!("first seed {}, {} jobs run concurrently", order.seed, order.jobs);
    // The report prints each failure, so the default panic message is not needed.
    std::panic::set_hook(Box::new(|_| {}));
    if run(&order).is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn order(mut args: impl Iterator<Item = String>) -> Result<Order, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut order = Order {
        kinds: Kind::ALL.to_vec(),
        variants: variants().to_vec(),
        seed: now.as_secs() % 1_000_000 * 1_000_000,
        time: None,
        operations: 100_000,
        cuts: 300,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
    };
    while let Some(option) = args.next() {
        let value = args.next().ok_or_else(|| format!("{option} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|error| format!("{option} {value}: {error}"));
        match option.as_str() {
            "--minutes" => order.time = Some(Duration::from_secs(number()? * 60)),
            "--operations" => order.operations = number()?,
            "--cuts" => order.cuts = number()?,
            "--seed" => order.seed = number()?,
            "--jobs" => order.jobs = usize::try_from(number()?).map_err(|e| e.to_string())?,
            "--driver" => {
                order.variants = named(&value);
                if order.variants.is_empty() {
                    return Err(format!("no driver or variant is named {value}"));
                }
            }
            "--kind" => {
                let kind = |name| {
                    Kind::named(name).ok_or_else(|| format!("no kind of test is named {name}"))
                };
                order.kinds = value.split(',').map(kind).collect::<Result<_, _>>()?;
            }
            _ => return Err(format!("unknown option {option}")),
        }
    }
    Ok(order)
}

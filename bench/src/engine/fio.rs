//! fio with its io_uring engine, with default settings and with its fastest settings.

use std::process::Command;

use serde_json::Value;

use super::{BLOCK, DEPTH, Rate, Task};

pub(super) fn plain(task: &Task<'_>) -> Rate {
    run(task, &[])
}

pub(super) fn fixed(task: &Task<'_>) -> Rate {
    run(task, &["--fixedbufs", "--registerfiles", "--gtod_reduce=1"])
}

fn run(task: &Task<'_>, extra: &[&str]) -> Rate {
    let output = Command::new("fio")
        .args([
            "--name=engine",
            "--ioengine=io_uring",
            "--rw=randread",
            "--norandommap",
            "--randrepeat=0",
        ])
        .args(["--thread", "--time_based", "--output-format=json"])
        .arg(format!("--bs={BLOCK}"))
        .arg(format!("--iodepth={DEPTH}"))
        .arg(format!("--runtime={}", task.time.as_secs()))
        .arg(format!("--filename={}", task.path.display()))
        .args(extra)
        .output()
        .map_err(|e| format!("fio: {e}"))?;
    if !output.status.success() {
        return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let report: Value =
        serde_json::from_slice(&output.stdout).map_err(|e| format!("fio's report: {e}"))?;
    report
        .pointer("/jobs/0/read/iops")
        .and_then(Value::as_f64)
        .ok_or_else(|| "fio's report has no rate".to_owned())
}

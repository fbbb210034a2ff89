//! Printing the results of a case: medians and ratios, as a table and as JSON.

use serde_json::{Value, json};

/// All runs of one contender.
pub(crate) struct Series {
    pub(crate) name: &'static str,
    /// One value per run.
    pub(crate) runs: Vec<f64>,
}

impl Series {
    pub(crate) fn new(name: &'static str) -> Series {
        Series { name, runs: Vec::new() }
    }

    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match (sorted.get(middle.wrapping_sub(1)), sorted.get(middle)) {
            (Some(low), Some(high)) if sorted.len().is_multiple_of(2) => f64::midpoint(*low, *high),
            (_, Some(median)) => *median,
            _ => 0.0,
        }
    }

    fn extreme(&self, pick: fn(f64, f64) -> f64) -> f64 {
        self.runs.iter().copied().reduce(pick).unwrap_or(0.0)
    }
}

/// Prints a table with the values divided by `scale`. The last column is the median of the first contender divided by the
/// median of this contender. Then prints the values as JSON, not divided.
pub(crate) fn print(case: &str, unit: &str, scale: f64, series: &[Series]) {
    let first = series.first().map_or(0.0, Series::median);
    println!(
        "{:<34} {:>10} {:>10} {:>10} {:>14}",
        case, "median", "lowest", "highest", "first / this"
    );
    for s in series {
        let ratio = if s.median() > 0.0 { first / s.median() } else { 0.0 };
        println!(
            "{:<34} {:>10.3} {:>10.3} {:>10.3} {:>13.2}x",
            s.name,
            s.median() / scale,
            s.extreme(f64::min) / scale,
            s.extreme(f64::max) / scale,
            ratio
        );
    }
    println!("({unit})");
    let entries: Vec<Value> = series
        .iter()
        .map(|s| json!({ "name": s.name, "median": s.median(), "runs": s.runs }))
        .collect();
    println!("{}", json!({ "case": case, "contenders": entries }));
}

/// Prints a bar for each ratio: each block means 0.2, and a line marks the ratio 1.
pub(crate) fn chart<'a>(ratios: impl Iterator<Item = (&'a str, f64)>) {
    for (name, ratio) in ratios {
        let mut bar = String::new();
        for block in 1..=50_u8 {
            if f64::from(block) * 0.2 > ratio + 0.1 {
                break;
            }
            bar.push('█');
            if block == 5 {
                bar.push('|');
            }
        }
        println!("{name:<54} {bar} {ratio:.2}");
    }
}

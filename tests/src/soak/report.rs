//! The table at the end of a long run: one Markdown row for each variant.

use std::time::Duration;

use super::{Kind, Order, Table};
use crate::tally::Tally;

/// The results of one variant.
struct Row<'a> {
    table: &'a Table,
    variant: Option<&'static str>,
}

impl Row<'_> {
    /// Returns the sum over these kinds.
    fn tally(&self, kinds: &[Kind]) -> Tally {
        let mut sum = Tally::default();
        for ((kind, variant), done) in self.table {
            if kinds.contains(kind) && self.variant.is_none_or(|own| own == *variant) {
                sum.add(&done.tally);
            }
        }
        sum
    }

    fn jobs(&self, kinds: &[Kind], count: impl Fn(&super::Done) -> u64) -> u64 {
        let own = |(kind, variant): &(Kind, &'static str)| {
            kinds.contains(kind) && self.variant.is_none_or(|own| own == *variant)
        };
        self.table.iter().filter(|(key, _)| own(key)).map(|(_, done)| count(done)).sum()
    }

    fn cells(&self) -> Vec<String> {
        let number = |n: u64| n.to_string();
        let chains = |tally: &Tally| tally.chains.map(|n| n.to_string()).join("/");
        let cancel = self.tally(&[Kind::Cancel]);
        let changes = [Kind::Changes, Kind::ChangesThreads];
        let cuts = self.tally(&[Kind::Crash, Kind::CrashThreads]);
        let all_cuts = self.tally(&[&[Kind::Crash, Kind::CrashThreads][..], &changes].concat());
        let faults = self.tally(&[Kind::Faults]);
        let graph = self.tally(&[Kind::Graph, Kind::GraphThreads]);
        vec![
            self.variant.unwrap_or("all").to_owned(),
            number(self.tally(&[Kind::Model]).operations),
            number(self.tally(&[Kind::Threads]).operations),
            chains(&self.tally(&[Kind::Model, Kind::Threads])),
            format!("{} ({})", cancel.operations, cancel.cancelled),
            number(self.tally(&[Kind::Crash]).cuts),
            number(self.tally(&[Kind::CrashThreads]).cuts),
            format!("{}, {}", self.tally(&changes[..1]).cuts, self.tally(&changes[1..]).cuts),
            chains(&cuts),
            number(all_cuts.operations),
            number(all_cuts.disks),
            format!("{} ({})", self.jobs(&[Kind::Faults], |done| done.ended), faults.failed),
            number(self.tally(&[Kind::EachFault]).failed),
            number(self.jobs(&[Kind::Damage], |done| done.ended)),
            format!("{} ({})", graph.operations, graph.failed),
            number(self.tally(&Kind::ALL).checked_by_qemu),
            number(self.jobs(&Kind::ALL, |done| done.failures)),
        ]
    }
}

const HEAD: [&str; 17] = [
    "variant",
    "model: operations",
    "4 threads: operations",
    "chains of 1/2/3/4",
    "cancel: operations (given up)",
    "power cuts, 1 thread",
    "power cuts, 4 threads",
    "power cuts amid changes, 1 thread and 3 threads",
    "chains of 1/2/3/4",
    "operations before cuts",
    "disks after cuts",
    "failing disks (failed operations)",
    "failures of one operation each",
    "damaged disks",
    "changes of the graph (refused)",
    "qemu-img checks",
    "failures",
];

/// Prints the table.
pub(super) fn print(table: &Table, order: &Order, elapsed: Duration) {
    let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
    for variant in &order.variants {
        rows.push(Row { table, variant: Some(variant.name) }.cells());
    }
    rows.push(Row { table, variant: None }.cells());
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    for (index, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!(" {cell:>width$} |"));
        println!("|{}", cells.collect::<String>());
        if index == 0 {
            let rule = widths.iter().map(|width| format!("-{}:|", "-".repeat(*width)));
            println!("|{}", rule.collect::<String>());
        }
    }
    let jobs: u64 = table.values().map(|done| done.started).sum();
    println!("{jobs} jobs, seeds from {}, {} s", order.seed, elapsed.as_secs());
}

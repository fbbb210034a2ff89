//! The rows of the matrix. The number of rows is small, but each allowed pair of values of two options is in a row.

use std::collections::BTreeSet;
use std::fmt;

/// An option of `create` and its values; `""` leaves the option out.
const OPTIONS: [(&str, &[&str]); 10] = [
    ("compat", &["1.1", "0.10"]),
    ("cluster_size", &["64k", "512", "4k", "16k", "2M"]),
    ("refcount_bits", &["16", "1", "8", "64"]),
    ("lazy_refcounts", &["off", "on"]),
    ("compression_type", &["zlib", "zstd"]),
    ("extended_l2", &["off", "on"]),
    ("data_file", &["", "data", "data,data_file_raw=on"]),
    ("encrypt.format", &["", "luks", "aes"]),
    ("preallocation", &["off", "metadata"]),
    ("backing_file", &["", "base"]),
];

const COMPAT: usize = 0;
const CLUSTER: usize = 1;
const REFCOUNT: usize = 2;
const LAZY: usize = 3;
const COMPRESSION: usize = 4;
const EXTENDED: usize = 5;
const DATA: usize = 6;
const ENCRYPTION: usize = 7;
const PREALLOCATION: usize = 8;
const BACKING: usize = 9;

/// An image of the matrix: the index of the value of each option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row([usize; OPTIONS.len()]);

impl Row {
    fn value(&self, option: usize) -> &'static str {
        OPTIONS[option].1[self.0[option]]
    }

    /// Returns the encryption format.
    pub(crate) fn encryption(&self) -> Option<&'static str> {
        Some(self.value(ENCRYPTION)).filter(|format| !format.is_empty())
    }

    /// Whether a new image of qemu-img does not read as zeroes: qemu-img preallocates zeroes in the file, and zeroes do not
    /// decrypt to zeroes.
    pub(crate) fn begins_as_noise(&self) -> bool {
        let preallocated = self.0[PREALLOCATION] != 0 || self.value(DATA).contains("raw");
        self.encryption().is_some() && preallocated
    }

    fn write(&self, with_files: bool) -> String {
        let mut all = Vec::new();
        for (option, (name, values)) in OPTIONS.iter().enumerate() {
            let value = self.value(option);
            // The first value is the default. Omit this value, so that the tools use their own default.
            if self.0[option] == 0 || (!with_files && option == BACKING) {
                continue;
            }
            assert!(values.contains(&value));
            all.push(format!("{name}={value}"));
            match option {
                ENCRYPTION => all.push("encrypt.key-secret=key".to_owned()),
                BACKING => all.push("backing_fmt=raw".to_owned()),
                _ => {}
            }
            if value == "luks" {
                all.push("encrypt.iter-time=10".to_owned());
            }
        }
        all.join(",")
    }

    /// Returns the options as written after `-o`.
    pub(crate) fn options(&self) -> String {
        self.write(true)
    }

    /// Returns the options for `measure`, which accepts no backing file.
    pub(crate) fn options_for_measure(&self) -> String {
        self.write(false)
    }

    /// Whether the format allows these options. `qemu-img` refuses the other combinations.
    fn is_possible(&self) -> bool {
        let given = |option: usize| self.0[option] != 0;
        let old = given(COMPAT);
        let modern = [REFCOUNT, LAZY, COMPRESSION, EXTENDED, DATA];
        let small = ["512", "4k"].contains(&self.value(CLUSTER));
        let raw = self.value(DATA).contains("raw");
        let impossible = [
            old && modern.iter().any(|option| given(*option)),
            given(EXTENDED) && small,
            given(BACKING) && (raw || (given(PREALLOCATION) && !given(EXTENDED))),
        ];
        !impossible.contains(&true)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = self.options();
        f.write_str(if options.is_empty() { "no options" } else { &options })
    }
}

type Pair = ((usize, usize), (usize, usize));

fn pairs_of(row: &Row) -> impl Iterator<Item = Pair> + '_ {
    (0..OPTIONS.len())
        .flat_map(move |a| (a + 1..OPTIONS.len()).map(move |b| ((a, row.0[a]), (b, row.0[b]))))
}

/// Returns all allowed combinations of values.
fn possible() -> Vec<Row> {
    let mut all = vec![Row([0; OPTIONS.len()])];
    for (option, (_, values)) in OPTIONS.iter().enumerate() {
        all = all
            .iter()
            .flat_map(|row| {
                (0..values.len()).map(|value| {
                    let mut row = *row;
                    row.0[option] = value;
                    row
                })
            })
            .collect();
    }
    all.retain(Row::is_possible);
    all
}

/// Returns rows that contain every possible pair. Each added row is the row with the most missing pairs.
pub(crate) fn rows() -> Vec<Row> {
    let possible = possible();
    let mut missing: BTreeSet<Pair> = possible.iter().flat_map(pairs_of).collect();
    let mut rows = Vec::new();
    while !missing.is_empty() {
        let new = |row: &&Row| pairs_of(row).filter(|pair| missing.contains(pair)).count();
        let best = *possible.iter().max_by_key(new).expect("a row that has a missing pair");
        for pair in pairs_of(&best) {
            missing.remove(&pair);
        }
        rows.push(best);
    }
    rows
}

#[test]
fn every_possible_pair_of_values_is_in_a_row() {
    let rows = rows();
    let covered: BTreeSet<Pair> = rows.iter().flat_map(pairs_of).collect();
    let wanted: BTreeSet<Pair> = possible().iter().flat_map(pairs_of).collect();
    assert_eq!(covered, wanted);
    assert!(rows.len() < 40, "{} rows", rows.len());
}

//! A short run of the random tests on every variant of every format. `cargo xtask soak` is the long run. A failure prints the
//! seed that reproduces it.

use oxblk_tests::formats::{self, Variant, named, variants};
use oxblk_tests::model::mixed::Plan;
use oxblk_tests::model::threads::Extent;
use oxblk_tests::{crash, hostile, model, panic_text, scaled};

/// Runs one kind of test on every variant and reports all failures together.
fn on_every_variant(test: impl Fn(&'static Variant) + std::panic::RefUnwindSafe) {
    let failures: Vec<String> = variants()
        .iter()
        .filter_map(|variant| std::panic::catch_unwind(|| test(variant)).err())
        .map(|panic| panic_text(&*panic))
        .collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// The seeds of a variant. Variants with large clusters get fewer seeds, because large clusters are slow to simulate.
fn seeds(variant: &Variant, most: u64) -> std::ops::RangeInclusive<u64> {
    1..=scaled(if variant.cluster >= 256 << 10 { 1 } else { most })
}

#[test]
fn a_simulated_disk_matches_the_model() {
    on_every_variant(|variant| {
        for seed in seeds(variant, 2) {
            model::sim::run(variant, seed, 60);
        }
    });
}

#[test]
fn a_file_used_from_four_io_threads_matches_the_model_and_passes_qemus_check() {
    on_every_variant(|variant| {
        model::threads::run(
            variant,
            1,
            Extent { phases: 2, operations: scaled(600), filters: false },
        );
    });
}

#[test]
fn snapshots_growth_and_compaction_during_requests_of_four_threads_match_the_model() {
    let plan = Plan { operations: 120, changes: true, uncounted_reads: false };
    on_every_variant(|variant| {
        if variant.snapshots {
            for seed in 1..=scaled(1) {
                model::mixed::run(variant, seed, plan);
            }
        }
    });
}

#[test]
fn without_the_quarantine_of_freed_clusters_reads_return_wrong_data() {
    let plan = Plan { operations: 1500, changes: false, uncounted_reads: true };
    let [variant] = named("qcow2-4k")[..] else { panic!("one variant") };
    let found = (1..=40).any(|seed| model::mixed::attempt(variant, seed, plan).is_err());
    assert!(found, "no read returned wrong data");
    model::mixed::run(variant, 1, Plan { uncounted_reads: false, ..plan });
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed_and_leaves_leaks_at_worst() {
    on_every_variant(|variant| {
        for seed in 1..=scaled(1) {
            crash::run::run(variant, seed, 6);
        }
    });
}

#[test]
fn a_power_cut_while_four_io_threads_work_loses_nothing_that_was_flushed() {
    on_every_variant(|variant| {
        for seed in 1..=scaled(1) {
            crash::threads::run(variant, seed, 60, 3);
        }
    });
}

#[test]
fn cancelled_requests_leave_all_other_data_correct() {
    on_every_variant(|variant| {
        // Seed 6 uses files on a disk, and seed 1 files on tmpfs.
        for seed in [1, 6] {
            model::cancel::run(
                variant,
                seed,
                Extent { phases: 1, operations: scaled(300), filters: false },
            );
        }
    });
}

#[test]
fn a_failing_disk_loses_no_data_of_completed_requests() {
    on_every_variant(|variant| {
        for seed in seeds(variant, 6) {
            crash::faults::run(variant, seed);
        }
    });
}

/// Variants of qcow2 that execute image-wide changes differently.
fn changing() -> impl Iterator<Item = &'static Variant> {
    let names = ["512", "4k", "v2", "refcount1", "ext-16k", "luks", "lazy", "bitmaps"];
    names.into_iter().flat_map(|name| formats::named(&format!("qcow2-{name}")))
}

#[test]
fn a_power_cut_during_an_image_wide_change_leaves_the_old_or_the_new_state() {
    for variant in changing() {
        crash::changes::run(variant, 1, 8, crash::changes::From::OneThread);
    }
}

#[test]
fn a_power_cut_during_changes_and_requests_of_several_threads_loses_no_flushed_data() {
    for variant in changing() {
        crash::changes::run(variant, 2, 4, crash::changes::From::Threads);
    }
}

#[test]
fn one_failed_disk_operation_loses_no_data_of_completed_requests() {
    let others = ["vdi", "parallels", "qed", "vpc"].into_iter().flat_map(|name| named(name));
    for variant in changing().chain(others) {
        crash::each_fault::run(variant, 1, 11);
    }
}

#[test]
fn no_request_to_a_damaged_image_panics_or_waits_forever() {
    on_every_variant(|variant| {
        for seed in seeds(variant, 10) {
            hostile::mutate::run(variant, seed);
        }
    });
}

//! Filters above and below images, alone and in random stacks: a short run of the random tests. `cargo xtask soak` is the long
//! run.

use oxblk_tests::filters::Stack;
use oxblk_tests::formats::{Variant, named};
use oxblk_tests::model::threads::Extent;
use oxblk_tests::random::Random;
use oxblk_tests::tally::Tally;
use oxblk_tests::{crash, model, panic_text, scaled};

/// Variants with and without backing files, tables, compression and data files.
fn filtered() -> impl Iterator<Item = &'static Variant> {
    let names = ["raw", "qcow2-4k", "qcow2-ext-16k", "qcow2-luks", "vdi", "qed", "vpc"];
    names.into_iter().flat_map(named)
}

/// The variants of which each filter is tested alone.
fn alone() -> impl Iterator<Item = (&'static Variant, Stack)> {
    let variants = ["raw", "qcow2-4k"].into_iter().flat_map(named);
    variants.flat_map(|variant| Stack::all_alone(variant).into_iter().map(move |s| (variant, s)))
}

/// Random stacks for each variant, each with a seed.
fn random(
    count: u64,
    pick: impl Fn(&Variant, &mut Random) -> Stack,
) -> Vec<(u64, &'static Variant, Stack)> {
    let seeds = 1..=scaled(count);
    let of_variant = |variant: &'static Variant| {
        let stack = |seed: u64| pick(variant, &mut Random::new(!seed));
        seeds.clone().map(|seed| (seed, variant, stack(seed))).collect::<Vec<_>>()
    };
    filtered().flat_map(of_variant).collect()
}

/// Runs all tests, and reports all failures together.
fn all(tests: impl IntoIterator<Item = impl FnOnce() -> Tally>) {
    let run = |test| std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
    let failures: Vec<_> = tests
        .into_iter()
        .filter_map(|test| run(test).err())
        .map(|panic| panic_text(&*panic))
        .collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn each_filter_alone_matches_the_model() {
    all(alone().map(|(variant, stack)| move || model::sim::run_filtered(variant, 4, 40, &stack)));
}

#[test]
fn random_stacks_of_filters_match_the_model() {
    all(random(2, Stack::random)
        .into_iter()
        .map(|(seed, variant, stack)| move || model::sim::run_filtered(variant, seed, 25, &stack)));
}

#[test]
fn a_power_cut_with_one_filter_loses_nothing_that_was_flushed() {
    all(alone().map(|(variant, stack)| move || crash::run::run_filtered(variant, 5, 4, &stack)));
}

#[test]
fn a_power_cut_with_random_stacks_of_filters_loses_nothing_that_was_flushed() {
    all(random(1, Stack::random)
        .into_iter()
        .map(|(seed, variant, stack)| move || crash::run::run_filtered(variant, seed, 4, &stack)));
}

#[test]
fn a_failing_disk_below_filters_loses_no_data_of_completed_requests() {
    all(random(2, Stack::random_for_failures)
        .into_iter()
        .map(|(seed, variant, stack)| move || crash::faults::run_filtered(variant, seed, &stack)));
}

#[test]
fn one_failed_disk_operation_below_a_filter_loses_no_data_of_completed_requests() {
    let stacks = alone().filter(|(variant, stack)| {
        variant.check && stack.loses_nothing_by_failures() && !stack.has_copies()
    });
    all(stacks
        .map(|(variant, stack)| move || crash::each_fault::run_filtered(variant, 1, 23, &stack)));
}

#[test]
fn a_file_below_and_above_filters_matches_the_model_and_passes_qemus_check() {
    let extent = Extent { phases: 2, operations: scaled(200), filters: true };
    for (variant, seed) in filtered().zip(1..) {
        model::threads::run(variant, seed, extent);
    }
}

#[test]
fn cancelled_requests_below_filters_leave_all_other_data_correct() {
    let extent = Extent { phases: 2, operations: scaled(100), filters: true };
    for (variant, seed) in filtered().zip([1, 6].into_iter().cycle()) {
        model::cancel::run(variant, seed, extent);
    }
}

//! Runs the harnesses on every format.

mod create_crash;
mod qed;

use oxblk_tests::differential::format;
use oxblk_tests::formats::{FORMATS, Variant, variants};
use oxblk_tests::{fuzz, hostile, panic_text};

/// Runs one kind of test on every variant and reports all failures together.
fn on_every_variant(test: impl Fn(&'static Variant) + std::panic::RefUnwindSafe) {
    on_variants(variants().iter(), test);
}

/// Runs one kind of test on these variants and reports all failures together.
fn on_variants<'a>(
    variants: impl Iterator<Item = &'a &'static Variant>,
    test: impl Fn(&'static Variant) + std::panic::RefUnwindSafe,
) {
    let fails = |variant: &&'static Variant| {
        let panic = std::panic::catch_unwind(|| test(variant)).err()?;
        Some(format!("{}: {}", variant.name, panic_text(&*panic)))
    };
    let failures: Vec<String> = variants.filter_map(fails).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn an_image_is_made_changed_inspected_and_resized_as_by_the_qemu_tools() {
    on_every_variant(format::life_of_an_image);
}

#[test]
fn images_are_converted_between_all_formats_as_by_the_qemu_tools() {
    // The first variant of each format, and one third of all variants.
    let first = |variant: &Variant| variant.format.variants()[0].name == variant.name;
    let chosen = variants().iter().enumerate().filter(|(n, variant)| n % 3 == 0 || first(variant));
    on_variants(chosen.map(|(_, variant)| variant), format::conversions);
}

/// Runs every fourth corrupt image of every format, from the image number `share` on, through the program.
fn spoiled_images(share: usize) {
    for format in FORMATS {
        for table in format.hostile() {
            let cases: Vec<_> = table.cases.into_iter().skip(share).step_by(4).collect();
            hostile::through_the_program(format.name(), &table.good, &cases);
        }
    }
}

#[test]
fn every_corrupt_image_gives_its_expected_result_1() {
    spoiled_images(0);
}

#[test]
fn every_corrupt_image_gives_its_expected_result_2() {
    spoiled_images(1);
}

#[test]
fn every_corrupt_image_gives_its_expected_result_3() {
    spoiled_images(2);
}

#[test]
fn every_corrupt_image_gives_its_expected_result_4() {
    spoiled_images(3);
}

#[test]
fn no_saved_fuzz_input_makes_its_target_panic() {
    let saved: usize = fuzz::TARGETS.iter().copied().map(fuzz::replay).sum();
    assert!(saved > 500, "only {saved} saved inputs");
}

//! A small part of the generated command lines. `cargo xtask differential` runs thousands of them.

use oxblk_tests::differential::generator::run;

#[test]
fn generated_command_lines_do_the_same_with_both_tools() {
    let outcome = run(1, 150, 2);
    let texts: Vec<_> = outcome
        .differences
        .iter()
        .map(|difference| {
            format!("seed {}: {}\n{}", difference.seed, difference.line, difference.text)
        })
        .collect();
    assert!(texts.is_empty(), "{}", texts.join("\n"));
    assert!(outcome.compared > 100 && outcome.succeeded > 20, "{outcome:?}");
}

//! Random changes of the graph under requests.

use oxblk_tests::model::graph;
use oxblk_tests::scaled;

#[test]
fn changes_of_the_graph_lose_nothing_and_refused_changes_change_nothing() {
    let (mut made, mut refused) = (0, 0);
    for seed in 0..scaled(8) {
        let tally = graph::run(seed, 150);
        made += tally.operations;
        refused += tally.failed;
    }
    assert!(made > refused && refused > 0, "{made} made, {refused} refused");
}

#[test]
fn file_locks_follow_changes_of_the_graph_under_requests_of_four_threads() {
    for seed in 0..scaled(2) {
        graph::run_on_files(seed, 150);
    }
}

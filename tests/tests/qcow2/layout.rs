//! Where data and tables of a fresh image lie: as in images that the QEMU tools write.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

#[test]
fn writes_one_after_the_other_give_the_bytes_that_qemu_gives() {
    for (options, unit) in [
        ("cluster_size=64k", 64),
        ("cluster_size=4k", 4),
        ("cluster_size=2M", 2048),
        ("compat=0.10", 64),
        ("extended_l2=on", 64),
        ("cluster_size=512", 1),
    ] {
        let both = Differential::new();
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", options, "a", "64M"]);
        for (number, start) in [0, 1, 2, 7, 9, 3].into_iter().enumerate() {
            let line = format!("write -q -P {} {}k {unit}k", number + 1, start * unit);
            both.same(Io, &["-c", &line, "a"]);
        }
        both.same(Io, &["-c", "write -q -P 9 32M 70k", "-c", "write -q -P 8 40M 3k", "a"]);
        both.same_bytes("a");
    }
}

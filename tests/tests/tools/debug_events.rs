//! The debug events of formats above `blkdebug`, in comparison with QEMU: for each event, the same command of a sequence fails.

use oxblk_core::DebugEvent as Event;
use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

/// Runs a sequence of commands once for each event. The first request after the event fails. The image is written through, so
/// metadata is written during each command.
fn compare(format: &str, create: &[&[&str]], commands: &[&str], left_out: &[Event]) {
    let both = Differential::new();
    both.file("base.raw", &[5; 2 << 20]);
    for arguments in create {
        match arguments {
            ["io", arguments @ ..] => both.made_once(Io, arguments),
            arguments => both.made_once(Img, arguments),
        }
    }
    both.prepare(|directory| {
        std::fs::rename(directory.join("a"), directory.join("saved")).unwrap();
    });
    let raised = |event: &&Event| !NEVER.contains(event) && !left_out.contains(event);
    for event in Event::ALL.iter().filter(raised) {
        both.prepare(|directory| {
            std::fs::copy(directory.join("saved"), directory.join("a")).unwrap();
        });
        let name = event.name();
        let disk = format!(
            "driver={format},file.driver=blkdebug,file.image.filename=a,\
             file.inject-error.0.event={name},file.inject-error.0.once=on"
        );
        let mut words = vec!["-t", "writethrough", "--image-opts", &disk];
        words.extend(commands.iter().flat_map(|command| ["-c", command]));
        both.same(Io, &words);
    }
}

/// Events that no sequence of commands raises.
const NEVER: [Event; 15] = [
    Event::VmstateLoad,
    Event::VmstateSave,
    Event::ReftableGrow,
    Event::ReftableUpdate,
    Event::RefblockUpdate,
    Event::RefblockAllocWriteBlocks,
    Event::RefblockAllocWriteTable,
    Event::RefblockAllocSwitchTable,
    Event::PwritevRmwHead,
    Event::PwritevRmwAfterHead,
    Event::PwritevRmwTail,
    Event::PwritevRmwAfterTail,
    Event::EmptyImagePrepare,
    Event::L1ShrinkWriteTable,
    Event::L1ShrinkFreeL2Clusters,
];

/// Events that come at other times, or while the image is opened.
const ELSEWHERE: [Event; 3] = [Event::None, Event::ClusterFree, Event::FlushToDisk];

#[test]
fn events_of_writes_to_a_new_qcow2_image_come_as_in_qemu() {
    compare(
        "qcow2",
        &[&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "a", "64M"]],
        &[
            "read 0 4k",
            "write 0 4k",
            "read 0 4k",
            "write 0 4k",
            "write 64k 64k",
            "write -c 128k 64k",
            "write -z 192k 64k",
            "discard 64k 64k",
            "flush",
            "read 0 4k",
            "truncate 65M",
        ],
        &[&ELSEWHERE[..], &[Event::L2Load]].concat(),
    );
}

#[test]
fn events_of_reads_and_writes_in_place_come_as_in_qemu() {
    compare(
        "qcow2",
        &[
            &["create", "-q", "-f", "qcow2", "a", "64M"],
            &["io", "-c", "write -P 1 0 1M", "-c", "write -c 1M 64k", "a"],
        ],
        &["read 0 4k", "write 0 4k", "read 1M 64k", "write 2M 64k", "read 0 64k", "flush"],
        &ELSEWHERE,
    );
}

#[test]
fn events_of_writes_to_clusters_of_a_snapshot_come_as_in_qemu() {
    compare(
        "qcow2",
        &[
            &["create", "-q", "-f", "qcow2", "a", "64M"],
            &["io", "-c", "write -P 1 0 1M", "a"],
            &["snapshot", "-c", "s", "a"],
        ],
        &["read 0 4k", "write 0 4k", "write 0 4k", "write 128k 64k", "flush"],
        &ELSEWHERE,
    );
}

#[test]
fn events_of_growing_tables_come_as_in_qemu() {
    compare(
        "qcow2",
        &[&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "a", "1M"]],
        &["write 0 64k", "write 64k 64k", "write 128k 512k", "flush", "truncate 4M", "read 0 4k"],
        &[&ELSEWHERE[..], &[Event::L2Load]].concat(),
    );
}

#[test]
fn events_of_other_formats_come_as_in_qemu() {
    let commands = ["read 0 4k", "write 0 4k", "read 0 4k", "write 0 4k", "write 4M 64k", "flush"];
    compare(
        "qed",
        &[&["create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", "a", "64M"]],
        &commands,
        &[&ELSEWHERE[..], &[Event::L2Load]].concat(),
    );
    for format in ["vdi", "vpc"] {
        compare(format, &[&["create", "-q", "-f", format, "a", "64M"]], &commands, &ELSEWHERE);
    }
}

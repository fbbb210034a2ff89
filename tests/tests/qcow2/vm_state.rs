//! oxblk saves and loads VM state in the same form as QEMU. Snapshots keep the VM state, and a guest under QEMU can resume from
//! this state.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{
    Backend, DriverTable, Graph, OpenFlags, Options, Perm, Permissions, Preallocation,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_protocols::file::FILE;
use oxblk_ring::{IoBuf, IoBufMut, block_on};
use oxblk_tests::differential::{Differential, check_clean};
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

static DRIVERS: DriverTable = &[QCOW2, &FILE];

async fn open(path: &Path) -> Backend {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let options = Options::from_dotted("driver=qcow2", None).unwrap();
    let node = graph.open_image(path.to_str().unwrap(), options, OpenFlags::default()).await;
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let node = node.unwrap();
    Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken)).unwrap()
}

#[test]
fn io_reads_and_writes_vm_state_as_qemu_io() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.qcow2", "3M"]);
    both.qemu(Img, &["create", "-q", "-f", "raw", "a.raw", "1M"]);
    for line in [
        "write -b -P 5 0 1M",
        "write -b 5632 512",
        "read -b -P 5 0 4k",
        "read -b -r 0 4k",
        "read -b -r 0 100",
        "read -b -P 0xcd 5632 512",
        "read -b -P 0 1M 64k",
        "read -b -P 0 2G 64k",
        "read -b -v 5632 512",
        "read -b 1000 512",
        "read -b 512 1000",
        "write -b 1000 512",
        "write -b -z 0 512",
        "write -b -P 9 300M 64k",
        "read -b -P 9 300M 64k",
    ] {
        both.same(Io, &["-c", line, "a.qcow2"]);
    }
    both.same(Io, &["-f", "raw", "-c", "read -b 0 512", "-c", "write -b 0 512", "a.raw"]);
    both.same(Io, &["-r", "-c", "read -b -P 9 300M 64k", "-c", "write -b 0 512", "a.qcow2"]);
    // Nodes that only forward requests do so with the VM state too.
    let group = ["--object", "throttle-group,id=g", "--image-opts"];
    for above in ["raw", "throttle,throttle-group=g"] {
        let disk = format!("driver={above},file.driver=qcow2,file.file.filename=a.qcow2");
        let commands = ["-c", "write -b -P 6 1M 4k", "-c", "read -b -P 6 1M 4k", "-c", "flush"];
        both.same(Io, &[&group[..], &commands, &[&disk]].concat());
    }
    both.same(Io, &["-c", "read -b -P 6 1M 4k", "a.qcow2"]);
    for directory in both.our_directories() {
        check_clean(&directory.join("a.qcow2"));
        let read = ["-c", "read -b -P 5 0 4k", "-c", "read -b -P 9 300M 64k"];
        let said = Program::new("qemu-io").args(read).arg(directory.join("a.qcow2")).succeed();
        assert!(!said.out().contains("failed"), "{}", said.out());
    }
}

#[test]
fn a_snapshot_keeps_the_state_that_was_saved_before_it() {
    for options in ["cluster_size=512", "cluster_size=64k", "compat=0.10,cluster_size=4k"] {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        Program::new("qemu-img").args(create).arg(&path).arg("1M").succeed();
        let state = |byte: u8| IoBuf::from(vec![byte; 300_032]);
        block_on(async {
            let disk = open(&path).await;
            for (byte, name) in [(7, "one"), (9, "two")] {
                disk.save_vm_state(512, state(byte)).await.unwrap();
                let new = SnapshotInfo {
                    name: name.to_owned(),
                    vm_state_size: 300_544,
                    ..SnapshotInfo::default()
                };
                disk.create_snapshot(&new).await.unwrap();
                let left = disk.load_vm_state(0, IoBufMut::new(300_544)).await.unwrap();
                assert!(left.iter().all(|byte| *byte == 0), "{options}: left in the active state");
            }
            disk.close().await.unwrap();
        });
        check_clean(&path);
        let list = Program::new("qemu-img").args(["snapshot", "-l"]).arg(&path).succeed().out();
        assert!(list.contains("294 KiB"), "{list}");
        block_on(async {
            let disk = open(&path).await;
            for (byte, id) in [(7, "1"), (9, "2")] {
                disk.apply_snapshot(id).await.unwrap();
                let found = disk.load_vm_state(0, IoBufMut::new(300_544)).await.unwrap();
                assert!(found[..512].iter().all(|byte| *byte == 0), "{options}");
                assert!(found[512..].iter().all(|found| *found == byte), "{options}: {id}");
            }
            if !options.contains("0.10") {
                disk.resize(256 << 20, Preallocation::Off).await.unwrap();
                let len = usize::try_from(disk.size() - (1 << 20)).unwrap().min(64 << 20);
                let new = disk.read(1 << 20, IoBufMut::new(len)).await.unwrap();
                assert!(new.iter().all(|byte| *byte == 0), "{options}: state became disk");
            }
            disk.delete_snapshot("2").await.unwrap();
            disk.close().await.unwrap();
        });
        check_clean(&path);
    }
}

/// Runs a guest without an operating system on the image and sends it monitor commands.
fn guest(image: &Path, more: &[&str], commands: &str) -> String {
    let script = format!("sleep 1; printf '{commands}quit\\n'");
    let qemu = format!(
        "({script}) | qemu-system-x86_64 -accel tcg -nodefaults -m 16 -display none -monitor stdio \
         -drive file={},if=virtio,format=qcow2 {}",
        image.display(),
        more.join(" ")
    );
    let run = Program::new("sh").args(["-c", &qemu]).time_limit(Duration::from_secs(100));
    run.succeed().out()
}

#[test]
fn a_guests_state_is_read_back_and_can_be_resumed_after_its_snapshot_was_applied() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("guest.qcow2");
    Program::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("64M").succeed();
    Program::new("qemu-io").args(["-c", "write -P 7 0 1M"]).arg(&path).succeed();
    guest(&path, &[], "savevm one\\n");
    let img = |args: &[&str]| Program::oxblk().arg("img").args(args).arg(&path).succeed().out();
    let list = img(&["snapshot", "-l"]);
    let theirs = Program::new("qemu-img").args(["snapshot", "-l"]).arg(&path).succeed().out();
    assert_eq!(list, theirs);
    assert!(list.contains("one"));
    let io = |commands: &[&str]| {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        Program::oxblk().arg("io").args(commands).arg(&path).succeed().out()
    };
    io(&["write -P 9 0 1M"]);
    img(&["snapshot", "-c", "disk only"]);
    img(&["snapshot", "-a", "one"]);
    check_clean(&path);
    // QEMU's migration stream begins with a magic number and a version.
    let head = io(&["read -b -v 0 512"]);
    assert!(head.contains("51 45 56 4d 00 00 00 03"), "{head}");
    assert!(!io(&["read -P 7 0 1M"]).contains("failed"));
    let said = guest(&path, &["-loadvm", "one"], "info status\\n");
    assert!(said.contains("VM status: running"), "{said}");
    img(&["snapshot", "-d", "disk only"]);
    check_clean(&path);
    let said = guest(&path, &[], "loadvm one\\ninfo status\\n");
    assert!(said.contains("VM status: running") && !said.contains("Error"), "{said}");
    check_clean(&path);
}

#[test]
fn vm_state_is_never_filled_from_a_longer_backing_file() {
    for options in ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=512"] {
        let scratch = tempfile::tempdir().unwrap();
        let run = |tool: &str, args: &[&str]| {
            Program::new(tool).args(args).directory(scratch.path()).succeed();
        };
        run("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "20M"]);
        run("qemu-io", &["-c", "write -P 0x77 0 20M", "base.qcow2"]);
        let backing = ["-F", "qcow2", "-b", "base.qcow2", "-o", options, "a.qcow2", "1k"];
        run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &backing[..]].concat());
        let path = scratch.path().join("a.qcow2");
        block_on(async {
            let disk = open(&path).await;
            let before = disk.load_vm_state(0, IoBufMut::new(64 << 10)).await.unwrap();
            assert!(before.iter().all(|byte| *byte == 0), "{options}: unallocated");
            disk.save_vm_state(5000, IoBuf::from(vec![5; 100])).await.unwrap();
            disk.save_vm_state(40_000, IoBuf::from(vec![5; 100])).await.unwrap();
            let mut wanted = vec![0; 64 << 10];
            wanted[5000..5100].fill(5);
            wanted[40_000..40_100].fill(5);
            let state = disk.load_vm_state(0, IoBufMut::new(64 << 10)).await.unwrap();
            assert!(state[..] == wanted[..], "{options}");
            let data = disk.read(0, IoBufMut::new(1024)).await.unwrap();
            assert!(data.iter().all(|byte| *byte == 0x77), "{options}: the disk");
            disk.close().await.unwrap();
        });
    }
}

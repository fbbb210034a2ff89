//! Creates a guest's disk: a GPT partition with an ext4 root file system that has some data and many holes.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{copy_program, write_script};
use crate::program::Program;
use crate::random::Random;

/// Size of the disk, in bytes.
pub const DISK_SIZE: u64 = 768 << 20;
/// The offset of the partition, in bytes.
const PARTITION: u64 = 1 << 20;
/// The space after the partition for the backup partition table, in bytes.
const TAIL: u64 = 1 << 20;

/// The init program of the disk. The program runs the task that the kernel's command line selects, then powers the guest off.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -o remount,rw /
cd /srv

write() {
    set -e
    sha256sum -c -s seed.sums
    seq 1 300000 >numbers
    for n in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of=random.$n bs=64k count=$((n * 8)) 2>/dev/null
    done
    mkdir tree
    for n in $(seq 1 400); do echo "file $n" >tree/$n; done
    sync
    # Overwritten in place, at odd offsets; removed; a hole in the middle.
    for n in 1 3 5 7; do
        dd if=/dev/urandom of=random.$n bs=1000 seek=$((n * 13)) count=50 conv=notrunc 2>/dev/null
    done
    rm random.8 blob.1
    for n in $(seq 1 3 400); do rm tree/$n; done
    dd if=numbers of=sparse bs=4k seek=1000 count=20 2>/dev/null
    find numbers random.* sparse tree -type f | sort | xargs sha256sum >written.sums
    sync
    fstrim / 2>/dev/null || echo 'GUEST: no discard'
    sha256sum -c -s written.sums
    set +e
}

verify() {
    grep -v blob.1 seed.sums | sha256sum -c -s && sha256sum -c -s written.sums &&
        [ ! -e random.8 ] && [ ! -e blob.1 ] && [ "$(ls tree | wc -l)" = 266 ]
}

task=$(sed -n 's/.*oxblk\.task=\([a-z]*\).*/\1/p' /proc/cmdline)
if "$task"; then echo "GUEST: $task done"; else echo "GUEST: $task FAILED"; fi
cd /
mount -o remount,ro / && echo 'GUEST: unmounted'
sync
poweroff -f
"#;

/// Creates a root file system below `root`: busybox, the init program above, and data of several kinds.
fn fill_root(root: &Path) {
    for directory in ["bin", "sbin", "proc", "dev", "sys", "srv", "etc"] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in [
        "sh",
        "mount",
        "umount",
        "sync",
        "poweroff",
        "seq",
        "dd",
        "sha256sum",
        "find",
        "sort",
        "xargs",
        "grep",
        "sed",
        "ls",
        "wc",
        "rm",
        "mkdir",
        "fstrim",
        "echo",
        "[",
        "cat",
    ] {
        symlink("busybox", root.join("bin").join(applet)).expect("a link");
    }
    copy_program(Path::new("/sbin/e2fsck"), root);
    fs::write(root.join("etc/fstab"), "/dev/vda1 / ext4 defaults 0 1\n").expect("a file");
    write_script(&root.join("sbin/init"), INIT);

    let mut random = Random::new(0x0b1c);
    for n in 0..4_u32 {
        let file = File::create(root.join(format!("srv/blob.{n}"))).expect("a file");
        let mut file = BufWriter::new(file);
        for _ in 0..(6_u32 << 20) / 4096 {
            let mut block = vec![0; 4096];
            random.fill(&mut block);
            file.write_all(&block).expect("a block");
        }
    }
    let text: String =
        (0..200_000).map(|n| format!("line {n} of a text that compresses well\n")).collect();
    fs::write(root.join("srv/text"), text).expect("a file");
    let names = "cd srv && sha256sum blob.* text > seed.sums";
    Program::new("sh").args(["-c", names]).directory(root).succeed();
}

/// Creates the raw disk in `scratch` and returns its path.
///
/// # Panics
/// When sfdisk or mke2fs is missing or fails.
pub fn build(scratch: &Path) -> PathBuf {
    let root = scratch.join("root");
    fill_root(&root);
    let disk = scratch.join("guest.raw");
    File::create(&disk).and_then(|file| file.set_len(DISK_SIZE)).expect("the disk's file");
    let table = format!(
        "label: gpt\nstart={}, size={}, type=linux\n",
        PARTITION / 512,
        (DISK_SIZE - PARTITION - TAIL) / 512
    );
    Program::new("/sbin/sfdisk").arg("--quiet").arg(&disk).stdin(table).succeed();
    Program::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "oxblk-root", "-d"])
        .arg(&root)
        .arg("-E")
        .arg(format!("offset={PARTITION}"))
        .arg(&disk)
        .arg(((DISK_SIZE - PARTITION - TAIL) / 4096).to_string())
        .succeed();
    disk
}

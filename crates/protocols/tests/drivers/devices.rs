//! Tests of `host_device` on a loop device. The tests are skipped if the kernel has no loop devices or the user is not
//! root.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{error, graph, open, pattern, read, write};
use oxblk_core::{Errno, OpenFlags, Options, Preallocation, ZeroFlags};
use oxblk_ring::block_on;

const MIB: u64 = 1 << 20;

struct Loop {
    device: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl Loop {
    /// Creates a loop device. If this is not possible, prints a message and returns `None`.
    fn new(size: u64, read_only: bool) -> Option<Self> {
        if !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: this kernel has no loop devices");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may make loop devices");
            return None;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]);
        if read_only {
            command.arg("--read-only");
        }
        let output = command.arg(file.path()).output().expect("losetup is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Some(Self { device, _file: file })
    }

    fn options(&self) -> String {
        format!("driver=host_device,filename={}", self.device.display())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

#[test]
fn a_block_device_reads_writes_zeroes_and_discards() {
    let Some(device) = Loop::new(4 * MIB, false) else { return };
    block_on(async {
        for cache in ["", ",cache.direct=on", ",cache.direct=on,aio=native"] {
            let disk = open(&format!("{}{cache}", device.options())).await.unwrap();
            assert_eq!(disk.size(), 4 * MIB);
            write(&disk, 1000, &pattern(100_000, 3)).await;
            disk.write_zeroes(4096, 8192, ZeroFlags::MAY_UNMAP).await.unwrap();
            disk.write_zeroes(20_001, 100, ZeroFlags::empty()).await.unwrap();
            disk.discard(MIB, MIB).await.unwrap();
            disk.flush().await.unwrap();
            let mut expected = pattern(100_000, 3);
            expected[4096 - 1000..12288 - 1000].fill(0);
            expected[19_001..19_101].fill(0);
            assert!(read(&disk, 1000, 100_000).await == expected, "{cache}");
            disk.close().await.unwrap();
        }
    });
}

#[test]
fn a_block_device_keeps_its_size() {
    let Some(device) = Loop::new(4 * MIB, false) else { return };
    block_on(async {
        let disk = open(&device.options()).await.unwrap();
        let root = disk.root().unwrap();
        let beyond = root.write(4 * MIB, vec![1; 512].into(), oxblk_core::WriteFlags::empty());
        assert_eq!(beyond.await.unwrap_err().raw_errno(), Errno::NOSPC);
        assert_eq!(
            error(disk.resize(5 * MIB, Preallocation::Off).await),
            "Cannot grow device files"
        );
        assert_eq!(
            error(disk.resize(5 * MIB, Preallocation::Falloc).await),
            "Preallocation mode 'falloc' unsupported for this non-regular file"
        );
        disk.resize(4 * MIB, Preallocation::Off).await.unwrap();
        drop(root);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_device_is_found_by_its_path_and_cleared_at_the_start_by_create() {
    let Some(device) = Loop::new(4 * MIB, false) else { return };
    block_on(async {
        let name = device.device.to_str().unwrap();
        let graph = graph();
        let node = graph.open_protocol(name, Options::new(), OpenFlags::default()).await.unwrap();
        assert_eq!(node.factory().name(), "host_device");
        graph.release(node).await.unwrap();
        let disk = open(&device.options()).await.unwrap();
        write(&disk, 0, b"QFI\xfb").await;
        disk.flush().await.unwrap();
        disk.close().await.unwrap();
        let create = async |size: &str| {
            let options = Options::from_dotted(&format!("size={size}"), None).unwrap();
            graph.create_image(name, "host_device", &options).await
        };
        assert_eq!(error(create("8M").await), "Cannot grow device files");
        create("2M").await.unwrap();
        let disk = open(&device.options()).await.unwrap();
        assert_eq!(read(&disk, 0, 4).await, [0; 4]);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_read_only_device_falls_back_if_allowed() {
    let Some(device) = Loop::new(MIB, true) else { return };
    block_on(async {
        assert!(open(&device.options()).await.is_err());
        let disk = open(&format!("{},auto-read-only=on", device.options())).await.unwrap();
        assert!(disk.is_read_only());
        disk.close().await.unwrap();
    });
}

#[test]
fn a_character_device_is_an_empty_disk() {
    block_on(async {
        let disk = open("driver=host_device,filename=/dev/null").await.unwrap();
        assert_eq!(disk.size(), 0);
        disk.close().await.unwrap();
    });
}

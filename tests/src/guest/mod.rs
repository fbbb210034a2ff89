//! A real Linux guest that boots from a disk served by oxblk.
//!
//! [`Kernel`] finds a Debian cloud kernel (installed, or unpacked into the cache by `scripts/install-test-tools`).
//! [`initramfs`] packs the modules of a virtio disk, busybox and e2fsck. [`disk`] creates a partitioned disk with an ext4 root.
//! [`boot`] boots this disk under qemu-system and returns the output of the serial console. The guest uses TCG, so that it runs
//! on every machine.
//!
//! The kernel's command line chooses the guest's task ([`Task`]). With every task, e2fsck must find the file system clean
//! before the mount, and the guest powers itself off at the end.

pub mod disk;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::program::Program;

/// The time limit of a boot, which is long enough for TCG on a heavily loaded machine.
const BOOT_LIMIT: Duration = Duration::from_secs(280);

/// The modules of a virtio disk, each after its dependencies.
const MODULES: [&str; 6] = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
];

/// The first program of the initramfs. It checks the root file system, mounts it, and starts the init program of that file
/// system.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod "$module" || echo "GUEST: insmod $module failed"; done
tries=0
while [ ! -b /dev/vda1 ] && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
e2fsck -f -n /dev/vda1
echo "GUEST: fsck before mounting ended with $?"
mount -t ext4 /dev/vda1 /root || { echo 'GUEST: cannot mount'; poweroff -f; }
exec switch_root /root /sbin/init
"#;

/// The task of a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Writes files with checksums, deletes and overwrites other files, discards, and syncs.
    Write,
    /// Checks the files of [`Task::Write`].
    Verify,
}

impl Task {
    fn name(self) -> &'static str {
        match self {
            Task::Write => "write",
            Task::Verify => "verify",
        }
    }
}

/// A kernel and its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The compressed image, in the form that `-kernel` takes.
    pub image: PathBuf,
    /// `lib/modules/VERSION/kernel/drivers`.
    drivers: PathBuf,
}

impl Kernel {
    /// Returns a cloud kernel from `/boot` or, if it has none, from the cache. Of several versions, returns the last one in
    /// alphabetical order.
    ///
    /// # Panics
    /// When there is no kernel; `scripts/install-test-tools` downloads one.
    pub fn find() -> Self {
        let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache"),
            PathBuf::from,
        );
        let roots = [PathBuf::from("/"), cache.join("oxblk-tests/kernel")];
        let found = roots.iter().filter_map(|root| Self::in_root(root)).next();
        found.expect("a Debian cloud kernel in /boot or the cache (scripts/install-test-tools)")
    }

    fn in_root(root: &Path) -> Option<Self> {
        let mut versions: Vec<String> = fs::read_dir(root.join("boot"))
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned()))
            .filter(|version| version.ends_with("cloud-amd64"))
            .collect();
        versions.sort();
        let version = versions.pop()?;
        let drivers = ["lib", "usr/lib"]
            .map(|lib| root.join(lib).join("modules").join(&version).join("kernel/drivers"))
            .into_iter()
            .find(|drivers| drivers.is_dir())?;
        Some(Self { image: root.join("boot").join(format!("vmlinuz-{version}")), drivers })
    }
}

/// Copies a program and the shared libraries that it loads to the same paths below `root`.
fn copy_program(program: &Path, root: &Path) {
    let copy = |file: &Path| {
        let target = root.join(file.strip_prefix("/").expect("an absolute path"));
        fs::create_dir_all(target.parent().expect("a file is in a directory"))
            .expect("a directory");
        fs::copy(file, &target).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    };
    copy(program);
    let libraries = Program::new("ldd").arg(program).run().out();
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        copy(Path::new(library));
    }
}

fn write_script(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a file is in a directory")).expect("a directory");
    fs::write(path, text).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("permissions");
}

/// Packs the initramfs into `scratch` and returns its path.
///
/// # Panics
/// When a program for the initramfs is missing.
pub fn initramfs(kernel: &Kernel, scratch: &Path) -> PathBuf {
    let root = scratch.join("initramfs");
    for directory in ["bin", "proc", "sys", "dev", "root", "modules"] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    copy_program(Path::new("/sbin/e2fsck"), &root);
    symlink("/sbin/e2fsck", root.join("bin/e2fsck")).expect("a link");
    for (order, module) in MODULES.iter().enumerate() {
        let plain = kernel.drivers.join(format!("{module}.ko"));
        let packed = kernel.drivers.join(format!("{module}.ko.xz"));
        let copy = root.join(format!("modules/{order}.ko"));
        // A driver that is built into the kernel has no module file.
        if plain.exists() {
            fs::copy(plain, copy).expect("a module");
        } else if packed.exists() {
            let unpack = format!("xz -dc '{}' >'{}'", packed.display(), copy.display());
            Program::new("sh").args(["-c", &unpack]).succeed();
        }
    }
    write_script(&root.join("init"), INIT);
    let archive = scratch.join("initramfs.cpio");
    let pack = format!("find . | cpio -o -H newc --quiet > '{}'", archive.display());
    Program::new("sh").args(["-c", &pack]).directory(root).succeed();
    archive
}

/// Boots a disk under qemu-system. Returns the output of the console after the guest has powered off.
///
/// `disk` is a `-blockdev` description (JSON) whose node has the name `disk`.
///
/// # Panics
/// When the guest does not power off in time or QEMU fails.
pub fn boot(kernel: &Kernel, initramfs: &Path, disk: &str, task: Task) -> String {
    let reply = Program::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-m", "384", "-nodefaults", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio", "-kernel"])
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append")
        // On a busy host, an emulated timer can be so late that the kernel considers this timer broken.
        .arg(format!("console=ttyS0 panic=-1 quiet no_timer_check oxblk.task={}", task.name()))
        .args(["-blockdev", disk, "-device", "virtio-blk-pci,drive=disk"])
        .time_limit(BOOT_LIMIT)
        .succeed();
    reply.out()
}

/// Returns the `-blockdev` description of an NBD export on a Unix socket, with discards passed on.
pub fn nbd_blockdev(socket: &Path) -> String {
    format!(
        r#"{{"driver":"nbd","node-name":"disk","discard":"unmap","server":{{"type":"unix","path":"{}"}}}}"#,
        socket.display()
    )
}

/// Asserts that the guest reported a clean file system and a completed task.
///
/// # Panics
/// When a report is missing. The message contains the console output.
pub fn assert_succeeded(console: &str, task: Task) {
    for line in [
        "GUEST: fsck before mounting ended with 0".to_owned(),
        format!("GUEST: {} done", task.name()),
    ] {
        assert!(console.contains(&line), "the guest did not say {line:?}; its console:\n{console}");
    }
}

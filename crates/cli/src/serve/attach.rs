//! The announcement of `serve`: the image, its addresses, and shell commands with which clients attach to it.

use super::address::{Endpoint, reachable};
use super::disk::Disk;
use super::options::Options;
use super::partitions::Mountable;
use oxblk_core::names;
use oxblk_ring::Address;
use std::fmt::Write;
use std::path::Path;

/// The text that is printed when the server is ready.
pub(super) fn announcement(
    options: &Options,
    disk: &Disk,
    endpoints: &[Endpoint],
    mountable: Mountable,
) -> String {
    let mode =
        if options.read_only || disk.backend.is_read_only() { "read-only" } else { "read-write" };
    let made = if disk.is_new { "Created and serving" } else { "Serving" };
    let mut text = format!(
        "{made} '{}' ({}, {}, {mode})\n",
        disk.name,
        disk.format,
        size(disk.backend.size())
    );
    for endpoint in endpoints {
        let _ = writeln!(text, "  at {}", endpoint.uri(&options.export_name));
        if let Some(address) = endpoint.exposed() {
            let _ = writeln!(text, "     listening on {address}, for other machines too");
        }
    }
    if let Some(first) = endpoints.first() {
        let read_only = mode == "read-only";
        let uri = first.uri(&options.export_name).to_string();
        text.push('\n');
        let attach = nbd_client(first.address(), &options.export_name, read_only);
        text.push_str(&commands(&uri, &attach, mountable, read_only));
    }
    text.push_str("\nCtrl-C stops the server.\n");
    text
}

fn commands(uri: &str, attach: &str, mountable: Mountable, read_only: bool) -> String {
    let uri = quoted(uri);
    let drive = if read_only { ",readonly=on" } else { "" };
    let mount = if read_only { "sudo mount -o ro" } else { "sudo mount" };
    let mount = match mountable {
        Mountable::Nothing => String::new(),
        Mountable::Disk => format!(" && {mount} /dev/nbd0 /mnt"),
        Mountable::Partition(number) => format!(" && {mount} /dev/nbd0p{number} /mnt"),
    };
    format!(
        "Attach it with one of these commands:\n\
         \x20 nbdinfo {uri}\n\
         \x20 nbdcopy {uri} copy.raw\n\
         \x20 qemu-img convert -f raw -O qcow2 {uri} copy.qcow2\n\
         \x20 qemu-system-x86_64 -m 1G -drive file={uri},format=raw,if=virtio{drive}\n\
         \x20 sudo modprobe nbd && sudo {attach}{mount}\n"
    )
}

/// The command that attaches the export to a kernel block device.
fn nbd_client(address: &Address, export: &str, read_only: bool) -> String {
    let mut command = match address {
        Address::Unix(path) => format!("nbd-client -unix {} /dev/nbd0", path_argument(path)),
        Address::Tcp { host, port } => {
            format!("nbd-client {} {port} /dev/nbd0", quoted(reachable(host)))
        }
    };
    if !export.is_empty() {
        let _ = write!(command, " -name {}", quoted(export));
    }
    if read_only {
        command.push_str(" -readonly");
    }
    command
}

fn path_argument(path: &Path) -> String {
    quoted(&names::from_os(path))
}

/// A word, quoted for a shell if necessary.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:+,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A size in a readable form, without rounding.
fn size(bytes: u64) -> String {
    let units = [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", bytes / unit),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_with_special_characters_are_quoted_for_the_shell() {
        assert_eq!(quoted("/run/a-b.sock"), "/run/a-b.sock");
        assert_eq!(quoted("nbd+unix:///?socket=/x"), "'nbd+unix:///?socket=/x'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn only_a_disk_with_contents_is_mounted() {
        let last = |mountable| {
            let text = commands("nbd://x", "nbd-client x", mountable, true);
            text.lines().last().unwrap_or_default().trim().to_owned()
        };
        assert_eq!(last(Mountable::Nothing), "sudo modprobe nbd && sudo nbd-client x");
        assert!(last(Mountable::Disk).ends_with(" && sudo mount -o ro /dev/nbd0 /mnt"));
        assert!(last(Mountable::Partition(2)).ends_with(" && sudo mount -o ro /dev/nbd0p2 /mnt"));
    }

    #[test]
    fn sizes_are_exact() {
        assert_eq!(size(10 << 30), "10 GiB");
        assert_eq!(size((10 << 30) + 512), "10737418752 bytes");
        assert_eq!(size(1536 << 20), "1536 MiB");
    }

    #[test]
    fn nbd_client_gets_the_export_and_the_address() {
        let unix = Address::Unix("/a b".into());
        assert_eq!(nbd_client(&unix, "", false), "nbd-client -unix '/a b' /dev/nbd0");
        let tcp = Address::Tcp { host: "0.0.0.0".into(), port: 10809 };
        assert_eq!(
            nbd_client(&tcp, "x y", true),
            "nbd-client localhost 10809 /dev/nbd0 -name 'x y' -readonly"
        );
    }
}

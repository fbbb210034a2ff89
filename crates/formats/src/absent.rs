//! Formats that QEMU supports and this library does not support yet.
//!
//! These formats are recognised by magic numbers (dmg by its file name extension), for two reasons. First, such an image
//! must not be opened as a raw disk: its headers and tables would appear as guest data. Second, a guest must not be able to
//! turn its probed raw disk into such an image. Opening an image of such a format fails with an error that contains the
//! name of the format.

use oxblk_core::{BoxFuture, Driver, DriverFactory, DriverKind, Error, OpenContext, Result};

/// The name of a format, and the marks or the file name extension by which it is recognised.
#[derive(Debug)]
pub struct Absent {
    name: &'static str,
    /// Alternatives. An image of the format has all marks of at least one of them.
    marks: &'static [&'static [Mark]],
    /// File name extension that identifies the format, for a format without a mark.
    ending: Option<&'static str>,
}

/// Bytes at a certain offset of an image by which its format is recognised.
#[derive(Debug)]
struct Mark {
    offset: usize,
    bytes: &'static [u8],
}

const fn at(offset: usize, bytes: &'static [u8]) -> Mark {
    Mark { offset, bytes }
}

const fn absent(name: &'static str, marks: &'static [&'static [Mark]]) -> Absent {
    Absent { name, marks, ending: None }
}

/// The format of VMware.
pub static VMDK: Absent =
    absent("vmdk", &[&[at(0, b"KDMV")], &[at(0, b"COWD")], &[at(0, b"# Disk DescriptorFile")]]);
/// The format of Hyper-V.
pub static VHDX: Absent = absent("vhdx", &[&[at(0, b"vhdxfile")]]);
/// The format before qcow2.
pub static QCOW: Absent = absent("qcow", &[&[at(0, b"QFI\xfb\0\0\0\x01")]]);
/// Disks that are encrypted with LUKS (version 1).
pub static LUKS: Absent = absent("luks", &[&[at(0, b"LUKS\xba\xbe\0\x01")]]);
/// The format of Bochs. Its marks are the signature, the type, the subtype, and one of two versions.
pub static BOCHS: Absent = absent(
    "bochs",
    &[
        &[BOCHS_MAGIC, BOCHS_TYPE, BOCHS_SUBTYPE, at(64, &0x0001_0000_u32.to_le_bytes())],
        &[BOCHS_MAGIC, BOCHS_TYPE, BOCHS_SUBTYPE, at(64, &0x0002_0000_u32.to_le_bytes())],
    ],
);
const BOCHS_MAGIC: Mark = at(0, b"Bochs Virtual HD Image\0");
const BOCHS_TYPE: Mark = at(32, b"Redolog\0");
const BOCHS_SUBTYPE: Mark = at(48, b"Growing\0");
/// Images of compressed loop devices.
pub static CLOOP: Absent =
    absent("cloop", &[&[at(0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=")]]);
/// Disk images of Apple. Such an image has no mark at its beginning.
pub static DMG: Absent = Absent { name: "dmg", marks: &[], ending: Some(".dmg") };

/// All formats of this module.
pub static ALL: &[&Absent] = &[&VMDK, &VHDX, &QCOW, &LUKS, &BOCHS, &CLOOP, &DMG];

/// The error of an operation that needs the format `name`.
pub fn error(name: &str) -> Error {
    Error::unsupported(format!("Format '{name}' is not supported yet"))
}

impl DriverFactory for Absent {
    fn name(&self) -> &'static str {
        self.name
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], filename: Option<&str>) -> u32 {
        let has = |mark: &Mark| head.get(mark.offset..).is_some_and(|h| h.starts_with(mark.bytes));
        if self.marks.iter().any(|marks| marks.iter().all(has)) {
            return 100;
        }
        let named = self.ending.zip(filename).is_some_and(|(end, name)| name.ends_with(end));
        if named { 2 } else { 0 }
    }

    fn open<'a>(&'a self, _context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(std::future::ready(Err(error(self.name))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_recognised_by_its_mark_at_the_right_offset_only() {
        assert_eq!(VMDK.probe(b"KDMV\x01\0\0\0", None), 100);
        assert_eq!(VMDK.probe(b" KDMV", None), 0);
        assert_eq!(QCOW.probe(b"QFI\xfb\0\0\0\x03", None), 0);
    }

    #[test]
    fn an_apple_image_is_recognised_by_its_file_name() {
        assert_eq!(DMG.probe(b"", Some("x.dmg")), 2);
        assert_eq!(DMG.probe(b"", Some("x.img")), 0);
        assert_eq!(DMG.probe(b"", None), 0);
    }

    #[test]
    fn a_bochs_image_has_a_type_a_subtype_and_a_version() {
        let head = |kind: &[u8], subtype: &[u8], version: u32| {
            let mut head = vec![0; 512];
            let parts = [(0, &b"Bochs Virtual HD Image"[..]), (32, kind), (48, subtype)];
            for (at, bytes) in parts {
                head[at..at + bytes.len()].copy_from_slice(bytes);
            }
            head[64..68].copy_from_slice(&version.to_le_bytes());
            head
        };
        let probe = |head: Vec<u8>| BOCHS.probe(&head, None);
        for version in [0x1_0000, 0x2_0000] {
            assert_eq!(probe(head(b"Redolog", b"Growing", version)), 100);
        }
        for text in [
            head(b"", b"", 0),
            head(b"Redologs", b"Growing", 0x2_0000),
            head(b"Redolog", b"Undoable", 0x2_0000),
            head(b"Redolog", b"Growing", 0x3_0000),
        ] {
            assert_eq!(probe(text), 0);
        }
    }
}

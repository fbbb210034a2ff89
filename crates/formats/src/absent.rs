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
    marks: &'static [Mark],
    /// File name extension that identifies the format, for a format without a mark.
    ending: Option<&'static str>,
}

/// Bytes that every image of a format has at a certain offset.
#[derive(Debug)]
struct Mark {
    offset: usize,
    bytes: &'static [u8],
}

const fn at(offset: usize, bytes: &'static [u8]) -> Mark {
    Mark { offset, bytes }
}

const fn absent(name: &'static str, marks: &'static [Mark]) -> Absent {
    Absent { name, marks, ending: None }
}

/// The format of VMware.
pub static VMDK: Absent =
    absent("vmdk", &[at(0, b"KDMV"), at(0, b"COWD"), at(0, b"# Disk DescriptorFile")]);
/// The format of Hyper-V.
pub static VHDX: Absent = absent("vhdx", &[at(0, b"vhdxfile")]);
/// The format before qcow2.
pub static QCOW: Absent = absent("qcow", &[at(0, b"QFI\xfb\0\0\0\x01")]);
/// Disks that are encrypted with LUKS (version 1).
pub static LUKS: Absent = absent("luks", &[at(0, b"LUKS\xba\xbe\0\x01")]);
/// The format of Bochs.
pub static BOCHS: Absent = absent("bochs", &[at(0, b"Bochs Virtual HD Image")]);
/// Images of compressed loop devices.
pub static CLOOP: Absent =
    absent("cloop", &[at(0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=")]);
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
        if self.marks.iter().any(has) {
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
}

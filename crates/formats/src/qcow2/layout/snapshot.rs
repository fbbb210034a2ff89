//! Entries of the snapshot table ("Snapshots").

use oxblk_core::{Errno, Error, Result, names};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Geometry;

/// Maximum length of the snapshot table in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * super::MAX_SNAPSHOTS as u64;
/// Maximum length of the extra data of one entry, in bytes.
pub const MAX_EXTRA: u32 = 1024;
/// Length of the extra data with known fields, in bytes.
const KNOWN_EXTRA: u32 = 24;
/// Bytes from the start of an entry that contain its fixed fields and its known extra data. Id and name are not included.
pub const SNAPSHOT_HEAD: usize = size_of::<RawSnapshot>() + KNOWN_EXTRA as usize;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSnapshot {
    l1_table_offset: U64,
    l1_size: U32,
    id_len: U16,
    name_len: U16,
    date_sec: U32,
    date_nsec: U32,
    vm_clock_nsec: U64,
    vm_state_size: U32,
    extra_size: U32,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<RawSnapshot>() == 40);
    assert!(offset_of!(RawSnapshot, id_len) == 12);
    assert!(offset_of!(RawSnapshot, name_len) == 14);
    assert!(offset_of!(RawSnapshot, date_sec) == 16);
    assert!(offset_of!(RawSnapshot, vm_clock_nsec) == 24);
    assert!(offset_of!(RawSnapshot, vm_state_size) == 32);
    assert!(offset_of!(RawSnapshot, extra_size) == 36);
};

/// An internal snapshot. [`parse_snapshot`] does not check the offset and the size of the L1 table; see [`Snapshot::check_l1`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Byte offset of the snapshot's L1 table.
    pub l1_offset: u64,
    /// Number of entries of the snapshot's L1 table.
    pub l1_entries: u32,
    /// Unique id.
    pub id: String,
    /// Name.
    pub name: String,
    /// Creation time: seconds and nanoseconds since the Unix epoch.
    pub date: (u32, u32),
    /// Guest time in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// Virtual size in bytes, if the entry stores it.
    pub size: Option<u64>,
    /// The extra data, unparsed.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// Number of instructions that the guest had executed, if the entry stores it.
    pub fn icount(&self) -> Option<u64> {
        let bytes = self.extra.get(16..)?;
        U64::read_from_prefix(bytes).ok().map(|(count, _)| count.get())
    }

    /// Checks the offset and the size of the L1 table against the limits of the format.
    ///
    /// # Errors
    /// When the table is too large, or its offset is too large or not aligned. The text is the same as in QEMU's tools.
    pub fn check_l1(&self, geometry: Geometry) -> Result<()> {
        let bytes = u64::from(self.l1_entries) * 8;
        if bytes > super::MAX_L1_BYTES {
            return Err(Error::invalid("Snapshot L1 table too large").errno(Errno::FBIG));
        }
        if self.l1_offset > i64::MAX.unsigned_abs() - bytes || !geometry.is_aligned(self.l1_offset)
        {
            return Err(Error::invalid("Snapshot L1 table offset invalid"));
        }
        Ok(())
    }
}

/// Encodes an entry, including padding. The extra data begins with the VM state size and, if the disk size is known, the disk
/// size.
pub fn encode_snapshot(snapshot: &Snapshot) -> Vec<u8> {
    let mut extra = snapshot.vm_state_size.to_be_bytes().to_vec();
    // An entry of a version 2 image may have no disk size. Its extra data is then not extended.
    if let Some(size) = snapshot.size {
        extra.extend(size.to_be_bytes());
    }
    extra.extend(snapshot.extra.get(extra.len()..).unwrap_or_default());
    let (id, name) = (names::to_bytes(&snapshot.id), names::to_bytes(&snapshot.name));
    let length = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    let (id_len, name_len) = (length(&id), length(&name));
    let raw = RawSnapshot {
        l1_table_offset: snapshot.l1_offset.into(),
        l1_size: snapshot.l1_entries.into(),
        id_len: id_len.into(),
        name_len: name_len.into(),
        date_sec: snapshot.date.0.into(),
        date_nsec: snapshot.date.1.into(),
        vm_clock_nsec: snapshot.vm_clock.into(),
        vm_state_size: u32::try_from(snapshot.vm_state_size).unwrap_or(0).into(),
        extra_size: u32::try_from(extra.len()).unwrap_or(0).into(),
    };
    let mut bytes = raw.as_bytes().to_vec();
    bytes.extend(extra);
    bytes.extend(id.iter().take(id_len.into()));
    bytes.extend(name.iter().take(name_len.into()));
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Parses the entry at the start of `bytes`. Returns the entry and its length in bytes, including padding. Returns `None` if
/// `bytes` is shorter than the entry.
///
/// # Errors
/// When the entry's extra data is longer than [`MAX_EXTRA`].
pub fn parse_snapshot(bytes: &[u8]) -> Result<Option<(Snapshot, u64)>> {
    let Ok((raw, rest)) = RawSnapshot::read_from_prefix(bytes) else { return Ok(None) };
    let extra_size = raw.extra_size.get();
    if extra_size > MAX_EXTRA {
        return Err(Error::invalid("Too much extra metadata in snapshot table entry"));
    }
    let Some((extra, rest)) = rest.split_at_checked(usize::try_from(extra_size).unwrap_or(0))
    else {
        return Ok(None);
    };
    let Some((id, rest)) = rest.split_at_checked(raw.id_len.get().into()) else { return Ok(None) };
    let Some(name) = rest.get(..raw.name_len.get().into()) else { return Ok(None) };
    let number = |at: usize| {
        let bytes = extra.get(at..)?;
        U64::read_from_prefix(bytes).ok().map(|(value, _)| value.get())
    };
    // A zero byte ends the text, as in QEMU.
    let text = |bytes: &[u8]| {
        let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        names::to_text(name)
    };
    let snapshot = Snapshot {
        l1_offset: raw.l1_table_offset.get(),
        l1_entries: raw.l1_size.get(),
        id: text(id),
        name: text(name),
        date: (raw.date_sec.get(), raw.date_nsec.get()),
        vm_clock: raw.vm_clock_nsec.get(),
        vm_state_size: number(0).unwrap_or(raw.vm_state_size.get().into()),
        size: number(8),
        extra: extra.to_vec(),
    };
    let len = size_of::<RawSnapshot>() + extra.len() + id.len() + name.len();
    Ok(Some((snapshot, (len as u64).next_multiple_of(8))))
}

/// The sizes of an entry with too much extra data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Excess {
    /// Bytes of extra data.
    pub extra: u32,
    /// Offset of id and name from the start of the entry, in bytes.
    pub names_at: u64,
    /// Total length of id and name in bytes.
    pub names_len: usize,
}

impl Excess {
    /// The sizes of the entry that begins with `head`. `None` if the extra data is not too long, or if `head` is shorter than
    /// the fixed fields.
    pub fn of(head: &[u8]) -> Option<Self> {
        let (raw, _) = RawSnapshot::read_from_prefix(head).ok()?;
        let extra = raw.extra_size.get();
        let names_len = usize::from(raw.id_len.get()) + usize::from(raw.name_len.get());
        let names_at = size_of::<RawSnapshot>() as u64 + u64::from(extra);
        (extra > MAX_EXTRA).then_some(Self { extra, names_at, names_len })
    }

    /// The entry's length in bytes, including padding.
    pub fn entry_len(&self) -> u64 {
        (self.names_at + self.names_len as u64).next_multiple_of(8)
    }

    /// The entry with only the known extra data. `head` is the start of the entry, and `names` is its id and its name.
    pub fn removed(head: &[u8], names: &[u8]) -> Vec<u8> {
        let mut bytes = head.get(..SNAPSHOT_HEAD).unwrap_or_default().to_vec();
        if let Ok((raw, _)) = RawSnapshot::mut_from_prefix(&mut bytes) {
            raw.extra_size = KNOWN_EXTRA.into();
        }
        bytes.extend(names);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_data_that_is_too_long_can_be_removed() {
        let mut bytes = entry(2000, b"1", b"before");
        let excess = Excess::of(&bytes).unwrap();
        assert_eq!((excess.extra, excess.entry_len()), (2000, bytes.len() as u64));
        let names = bytes.split_off(usize::try_from(excess.names_at).unwrap());
        let removed = Excess::removed(&bytes, &names[..excess.names_len]);
        let (snapshot, len) = parse_snapshot(&removed).unwrap().unwrap();
        assert_eq!(len, removed.len() as u64);
        assert_eq!((snapshot.id.as_str(), snapshot.name.as_str()), ("1", "before"));
        assert_eq!((snapshot.vm_state_size, snapshot.size), (1, Some(2)));
        assert_eq!(Excess::of(&entry(1024, b"", b"")), None);
    }

    fn entry(extra: u32, id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0x5_0000u64.to_be_bytes());
        bytes.extend(7u32.to_be_bytes());
        bytes.extend(u16::try_from(id.len()).unwrap().to_be_bytes());
        bytes.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
        bytes.extend([0; 16]);
        bytes.extend(99u32.to_be_bytes());
        bytes.extend(extra.to_be_bytes());
        bytes.extend((1..=u64::from(extra / 8)).flat_map(u64::to_be_bytes));
        bytes.extend(id);
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn an_entry_parses_with_and_without_extra_data() {
        let bytes = entry(16, b"1", b"before");
        let (snapshot, len) = parse_snapshot(&bytes).unwrap().unwrap();
        assert_eq!(len, bytes.len() as u64);
        assert_eq!((snapshot.l1_offset, snapshot.l1_entries), (0x5_0000, 7));
        assert_eq!((snapshot.id.as_str(), snapshot.name.as_str()), ("1", "before"));
        assert_eq!((snapshot.vm_state_size, snapshot.size), (1, Some(2)));
        let (snapshot, _) = parse_snapshot(&entry(0, b"1", b"x")).unwrap().unwrap();
        assert_eq!((snapshot.vm_state_size, snapshot.size), (99, None));
    }

    #[test]
    fn an_entry_survives_parsing_and_encoding() {
        for extra in [0, 8, 16, 24, 40] {
            let bytes = entry(extra, b"17", b"some name");
            let (snapshot, _) = parse_snapshot(&bytes).unwrap().unwrap();
            let written = encode_snapshot(&snapshot);
            let (again, len) = parse_snapshot(&written).unwrap().unwrap();
            assert_eq!(len, written.len() as u64);
            assert_eq!(again.vm_state_size, snapshot.vm_state_size);
            assert_eq!((again.size, again.icount()), (snapshot.size, snapshot.icount()));
            assert_eq!((again.id, again.name), (snapshot.id, snapshot.name));
        }
    }

    #[test]
    fn a_truncated_entry_is_none_and_too_much_extra_data_is_an_error() {
        let bytes = entry(16, b"1", b"before");
        for len in 0..bytes.len() - 1 {
            assert_eq!(parse_snapshot(&bytes[..len]).unwrap(), None, "{len}");
        }
        assert!(parse_snapshot(&entry(1032, b"", b"")).is_err());
    }
}

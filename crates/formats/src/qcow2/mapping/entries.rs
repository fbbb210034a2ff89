//! Detecting invalid L2 entries, and reporting them as corruptions.

use oxblk_core::Error;

use super::Mapping;
use crate::qcow2::layout::{L2Entry, L2Kind};

/// The zero flag in an L2 entry of one word.
const ZERO: u64 = 1;

/// A number as QEMU's tools print it in hexadecimal: zero has no prefix.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

impl Mapping {
    /// Whether the image has a data file and an L2 entry of this kind is not valid for the guest cluster at `guest`. With a
    /// data file, the host offset must be equal to the guest offset, and the entry must not be compressed.
    #[inline]
    pub(in crate::qcow2) fn is_misplaced(&self, guest: u64, kind: L2Kind) -> bool {
        self.geometry.data_file
            && match kind {
                L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => {
                    host != self.geometry.cluster_start(guest)
                }
                L2Kind::Compressed { .. } => true,
                L2Kind::Unallocated | L2Kind::Zero { host: None } => false,
            }
    }

    /// Whether the new entry still refers to the host cluster of the old entry. Always false if one of the entries is
    /// compressed.
    pub(in crate::qcow2) fn keeps_host(&self, old: L2Entry, new: L2Entry) -> bool {
        let host_of = |entry: L2Entry| match entry.kind(self.geometry, self.version) {
            Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => Some(host),
            _ => None,
        };
        host_of(old).is_some_and(|host| host_of(new) == Some(host))
    }

    /// The host offset of an uncompressed entry, if this offset is not aligned.
    fn unaligned_host(&self, entry: L2Entry) -> Option<u64> {
        let host = entry.raw_offset();
        (!entry.is_compressed() && !self.geometry.is_aligned(host)).then_some(host)
    }

    /// Reports the invalid L2 entry of the guest offset `offset` as a corruption. If the host offset is not aligned, the text
    /// is the same as in QEMU's tools.
    pub(in crate::qcow2) async fn report_bad_entry(&self, offset: u64, entry: u64) -> Error {
        let text = if let Some(host) = self.unaligned_host(L2Entry(entry)) {
            let table = self.l1_entry(self.l1_index(offset)).raw_offset();
            let index = self.geometry.cluster_index(offset) & (self.geometry.l2_entries() - 1);
            format!(
                "Cluster allocation offset {} unaligned (L2 offset: {}, L2 index: {})",
                hex(host),
                hex(table),
                hex(index)
            )
        } else {
            format!("L2 entry {entry:#x} of guest offset {offset:#x} is invalid")
        };
        self.image_state.mark_corrupt(&text, offset).await
    }

    /// Like [`Self::report_bad_entry`], but for a write to the guest offset `offset`. If the host offset is not aligned and the
    /// copied flag is set, QEMU's tools have another text for a write.
    pub(in crate::qcow2) async fn report_bad_write_target(&self, offset: u64, entry: u64) -> Error {
        let entry = L2Entry(entry);
        let Some(host) = self.unaligned_host(entry).filter(|_| entry.copied()) else {
            return self.report_bad_entry(offset, entry.0).await;
        };
        let is_zero = !self.geometry.extended_l2 && entry.0 & ZERO != 0;
        let what = if is_zero { "Preallocated zero" } else { "Data" };
        let (host, guest) = (hex(host), hex(offset));
        let text = format!("{what} cluster offset {host} unaligned (guest offset: {guest})");
        self.image_state.mark_corrupt(&text, offset).await
    }
}

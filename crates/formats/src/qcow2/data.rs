//! Guest data at the place that the L2 tables give it.
//!
//! All reads and writes of uncompressed guest data that the map does not answer come through here, with the guest
//! offset beside the host offset: whatever depends on where data belongs, and which child holds it, is decided here.

use oxblk_core::{ChildIdx, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;
use super::allocator::Reserved;

impl Qcow2 {
    /// Whether guest data is stored as it is, so that who knows its host offset may read and write it there.
    pub(super) fn is_plain(&self) -> bool {
        self.encryption.is_none()
    }

    /// Whether what lies before a guest offset and what lies behind it can be written apart at once.
    pub(super) fn can_part_at(&self, guest: u64) -> bool {
        self.is_plain() || guest.is_multiple_of(oxblk_crypto::SECTOR as u64)
    }

    /// Whether what a guest is given of reserved clusters would be zeroes. What a file reads as zeroes stands for
    /// something else once it is decrypted.
    pub(super) fn reads_as_zeroes(&self, run: &Reserved<'_>) -> bool {
        run.is_untouched() && self.is_plain()
    }

    /// The child that holds uncompressed guest data.
    pub(super) fn data_child(&self) -> ChildIdx {
        ChildIdx::FILE
    }

    /// Fills `buf` with what lies at `host` for the guest offset `guest`.
    pub(super) async fn read_data(&self, guest: u64, host: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let child = self.children.require(self.data_child())?;
        match &self.encryption {
            None => child.read(host, buf).await,
            Some(encryption) => encryption.read(&child, guest, host, buf).await,
        }
    }

    /// Writes `data`, which belongs to the guest offset `guest`, to `host`.
    pub(super) async fn write_data(&self, guest: u64, host: u64, data: IoBuf) -> Result<()> {
        let child = self.children.require(self.data_child())?;
        match &self.encryption {
            None => child.write(host, data, WriteFlags::empty()).await,
            Some(encryption) => encryption.write(&child, guest, host, data).await,
        }
    }
}

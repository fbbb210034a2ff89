//! Guest data at the place that the L2 tables give it.
//!
//! All reads and writes of uncompressed guest data that the map does not answer come through here, with the guest
//! offset beside the host offset: whatever depends on where data belongs, and which child holds it, is decided here.

use oxblk_core::{ChildIdx, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;

impl Qcow2 {
    /// The child that holds uncompressed guest data.
    pub(super) fn data_child(&self) -> ChildIdx {
        ChildIdx::FILE
    }

    /// Fills `buf` with what lies at `host` for the guest offset `guest`.
    pub(super) async fn read_data(&self, guest: u64, host: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let _ = guest;
        self.children.require(self.data_child())?.read(host, buf).await
    }

    /// Writes `data`, which belongs to the guest offset `guest`, to `host`.
    pub(super) async fn write_data(&self, guest: u64, host: u64, data: IoBuf) -> Result<()> {
        let _ = guest;
        self.children.require(self.data_child())?.write(host, data, WriteFlags::empty()).await
    }
}

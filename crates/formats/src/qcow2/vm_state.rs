//! VM state: guest clusters behind the disk (section "Snapshots" of the qcow2 specification).
//!
//! The L1 and L2 tables of the disk also map these clusters. These clusters are allocated, shared and have refcounts like
//! all other guest clusters, so snapshots include them. Unallocated clusters read as zeroes, even if the backing file is
//! longer than the disk. The VM state begins at the first guest cluster whose L1 entry the disk does not need. A resize can
//! move this start, so a resize frees the VM state.

use oxblk_core::vm_state::VmState;
use oxblk_core::{BoxFuture, DebugEvent, Errno, Error, Result};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;

/// Maximum end of a guest range, in bytes.
const MAX_OFFSET: u64 = 1 << 63;

impl Qcow2 {
    /// The guest offset of a range of the VM state.
    fn vm_state_place(&self, offset: u64, len: usize) -> Result<u64> {
        let place = self.image_state.vm_state_offset().checked_add(offset);
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        let end = place.and_then(|place| place.checked_add(len)).filter(|end| *end <= MAX_OFFSET);
        match (place, end) {
            (Some(place), Some(_)) => Ok(place),
            _ => Err(Error::from_errno(Errno::FBIG)),
        }
    }

    async fn save_vm_state(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.image_state.check_writable()?;
        if self.geometry.data_file {
            // VM state would make the data file longer than the disk.
            return Err(Error::from_errno(Errno::OPNOTSUPP));
        }
        self.image_state.event(DebugEvent::VmstateSave).await;
        let place = self.vm_state_place(offset, data.len())?;
        let Some(last) = u64::try_from(data.len()).unwrap_or(u64::MAX).checked_sub(1) else {
            return Ok(());
        };
        let entries = self.mapping.l1_index(place.saturating_add(last)).saturating_add(1);
        self.metadata.grow_l1_to(Some(entries)).await?;
        self.write_guest(place, data).await
    }

    async fn load_vm_state(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        self.image_state.event(DebugEvent::VmstateLoad).await;
        let place = self.vm_state_place(offset, buf.len())?;
        self.read_guest(place, buf).await
    }
}

impl VmState for Qcow2 {
    fn save(&self, offset: u64, data: IoBuf) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.save_vm_state(offset, data))
    }

    fn load(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(self.load_vm_state(offset, buf))
    }
}

//! Writing new data together with the old contents of its clusters (copy-on-write).

use std::ops::Range;

use futures_util::future::try_join;
use oxblk_core::{ChildIdx, DebugEvent, Result, run_all};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;
use super::mapping::Extent;

/// Up to this size in bytes, new data and the old contents around the data are combined in memory and written with one write.
/// The limit does not apply if encryption requires one write.
const MAX_COMBINED_WRITE: u64 = 256 << 10;

/// Length of data in bytes.
pub(super) fn length(data: &[u8]) -> u64 {
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}

impl Qcow2 {
    /// Writes `data` of the guest offset `offset` to the host offset `at`. Writes the old contents of the rest of the guest
    /// range `whole` around `data`, unless these contents are zero and the clusters read as zeroes. `untouched`: all host
    /// clusters of this range read as zeroes.
    pub(super) async fn fill(
        &self,
        whole: Range<u64>,
        offset: u64,
        data: IoBuf,
        at: u64,
        untouched: bool,
    ) -> Result<()> {
        let (first, end) = (whole.start.min(offset), self.image_state.end_of_data(whole.end));
        let data_end = offset.saturating_add(length(&data));
        let head = self.old_contents(first, offset, untouched);
        // Bytes behind the end of the disk are invisible, so their contents do not matter.
        let tail = self.old_contents(data_end, end, untouched);
        let (head, tail) = try_join(head, tail).await?;
        let host = at.saturating_sub(offset - first);
        if head.is_none() && tail.is_none() {
            return self.data.write_data(offset, at, data).await;
        }
        self.image_state.event(DebugEvent::CowWrite).await;
        let total = head.as_ref().map_or(0, |head| head.len()).saturating_add(data.len());
        let total = total.saturating_add(tail.as_ref().map_or(0, |tail| tail.len()));
        let (guest, start) = if head.is_some() { (first, host) } else { (offset, at) };
        let can_part = self.data.can_part_at(offset) && self.data.can_part_at(data_end);
        if !can_part || u64::try_from(total).is_ok_and(|total| total <= MAX_COMBINED_WRITE) {
            let mut whole = IoBufMut::new(total);
            let mut rest: &mut [u8] = &mut whole;
            for part in [head.as_deref(), Some(&*data), tail.as_deref()].into_iter().flatten() {
                let (place, next) = std::mem::take(&mut rest).split_at_mut(part.len());
                place.copy_from_slice(part);
                rest = next;
            }
            return self.data.write_data(guest, start, whole.freeze()).await;
        }
        let mut writes = vec![self.data.write_data(offset, at, data.clone())];
        if let Some(head) = head {
            writes.push(self.data.write_data(first, host, head));
        }
        if let Some(tail) = tail {
            writes.push(self.data.write_data(data_end, at.saturating_add(length(&data)), tail));
        }
        run_all(writes).await
    }

    /// The contents of the guest disk from `from` to `to`. `None` if the range is empty, or if both the range and the new
    /// clusters read as zeroes (`untouched`).
    pub(super) async fn old_contents(
        &self,
        from: u64,
        to: u64,
        untouched: bool,
    ) -> Result<Option<IoBuf>> {
        if from >= to {
            return Ok(None);
        }
        let len = usize::try_from(to - from).unwrap_or(0);
        if self.reads_as_zero(from, to).await? {
            return Ok(if untouched { None } else { Some(IoBuf::zeroes(len)) });
        }
        self.image_state.event(DebugEvent::CowRead).await;
        let old = self.read_guest(from, IoBufMut::new(len)).await?.freeze();
        Ok(if untouched && oxblk_ring::is_zero(&old) { None } else { Some(old) })
    }

    /// Whether the L2 entries of this image and the size of the backing file alone show that a range reads as zeroes.
    pub(super) async fn reads_as_zero(&self, from: u64, to: u64) -> Result<bool> {
        let backing_end =
            self.image_state.children().get(ChildIdx::BACKING).map_or(0, |edge| edge.size());
        // VM state is never read from the backing file.
        let backing_end = backing_end.min(self.image_state.vm_state_offset());
        let mut at = from;
        while at < to {
            let extent = self.metadata.extent(at, to - at).await?;
            match extent {
                Extent::Zero { .. } => {}
                Extent::Unallocated { .. } if at >= backing_end => {}
                _ => return Ok(false),
            }
            at = at.saturating_add(extent.len());
        }
        Ok(true)
    }
}

//! Giving free space to the host: the end of the file is cut off, holes are punched in the middle.

use oxblk_core::{ChildIdx, ErrorKind, Preallocation, Result};

use super::super::Qcow2;

/// Holes that are punched at once.
const HOLES: usize = 4096;

impl Qcow2 {
    /// Cuts off what is free at the end (when `from` is 0), and punches holes from the byte offset `from` on; gives where to
    /// go on.
    pub(super) async fn release_space(&self, from: u64) -> Result<Option<u64>> {
        self.check_writable()?;
        // Clusters that a change of them takes are counted in memory first.
        let _bitmaps = self.bitmaps.hold().await;
        self.settle_metadata().await?;
        self.bitmaps.stay();
        let bits = self.geometry.cluster_bits;
        let used = self.used_clusters().await?;
        let file = self.children.require(ChildIdx::FILE)?;
        if from == 0 && used.end() << bits < file.size() {
            match file.resize(used.end() << bits, Preallocation::Off).await {
                Ok(()) => self.refcounts.allocator.note_cut_off(used.end()),
                // A device keeps its size.
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                Err(error) => return Err(error),
            }
        }
        let mut next = None;
        for (number, (start, end)) in used.gaps(from >> bits).enumerate() {
            if number == HOLES {
                next = Some(start << bits);
                break;
            }
            // It only saves space: the host may refuse.
            let _ = file.discard(start << bits, (end - start) << bits).await;
        }
        Ok(next)
    }
}

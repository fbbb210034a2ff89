//! Returning free space to the host: the file is truncated behind the last used cluster, and holes are punched in the
//! free clusters in front of that cluster.

use oxblk_core::{ErrorKind, Preallocation, Result};

use super::Compaction;

/// Maximum number of holes that one call punches.
const MAX_HOLES: usize = 4096;

impl Compaction<'_> {
    /// Truncates the file behind the last used cluster if `from` is 0, and punches holes from the byte offset `from`
    /// on. If there are more than [`MAX_HOLES`] holes to punch, returns the byte offset at which the next call must continue.
    pub(in crate::qcow2) async fn release_space(&self, from: u64) -> Result<Option<u64>> {
        self.image_state.check_writable()?;
        // A change of bitmaps first raises the refcounts of its clusters in memory, so these clusters would look free on disk.
        let _bitmaps = self.bitmaps.lock().await;
        self.metadata.write_all_metadata().await?;
        self.bitmaps.keep_unchanged_in_place();
        let bits = self.geometry.cluster_bits;
        let used = self.used_clusters().await?;
        let file = self.image_state.file()?;
        if from == 0 && used.end() << bits < file.size() {
            match file.resize(used.end() << bits, Preallocation::Off).await {
                Ok(()) => self.clusters.note_truncated(used.end()),
                // A block device cannot be truncated.
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                Err(error) => return Err(error),
            }
        }
        let mut next = None;
        for (number, (start, end)) in used.gaps(from >> bits).enumerate() {
            if number == MAX_HOLES {
                next = Some(start << bits);
                break;
            }
            // Punching a hole only saves space, so its errors are ignored.
            let _ = file.discard(start << bits, (end - start) << bits).await;
        }
        Ok(next)
    }
}

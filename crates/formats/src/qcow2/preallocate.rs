//! Giving guest clusters their place in the file before anything is written to them.
//!
//! Each run of clusters is made to read as zeroes, counted and linked, in the order of an ordinary write (see
//! [`super::write`]). How the file is made to read as zeroes is what the modes differ in.

use oxblk_core::{Edge, Preallocation, Result, WriteFlags, ZeroFlags};
use oxblk_ring::IoBuf;

use super::Qcow2;
use super::layout::{ExtendedEntry, L2Entry};

/// Bytes that are allocated at once.
const STEP: u64 = 1 << 30;
/// Bytes of zeroes written at once.
const WRITE: u64 = 1 << 20;

impl Qcow2 {
    /// Allocates all clusters that begin in the guest range; they read as zeroes.
    pub(super) async fn preallocate(&self, from: u64, to: u64, mode: Preallocation) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let file = self.children.require(self.data_child())?;
        let (mut at, end) = (self.cluster_end(from), self.cluster_end(to));
        while at < end {
            let count = (end - at).min(STEP.max(self.geometry.cluster_size())) >> bits;
            let count = self.table_before_data(at, count).await?;
            let mut run = self.reserve_data(at, count).await?;
            let (start, count) = (run.start, run.count);
            run.begin_write();
            // What a resize has added to a data file reads as zeroes, unless it was there before.
            let untouched = run.untouched || self.geometry.data_file && file.node().limits().grows;
            let host = start << bits;
            let end = start.saturating_add(count) << bits;
            // A data file ends with the disk as it will be.
            let end = if self.geometry.data_file { end.min(to) } else { end };
            let len = end.saturating_sub(host);
            let zeroed = if self.zeroes_as_entries() || self.is_plain() {
                zero(&file, host, len, mode, untouched).await
            } else {
                self.write_zero_ciphertext(at, host, len).await
            };
            let counted = run.count_if(zeroed, self).await?;
            let place = |index: u64| start.saturating_add(index) << bits;
            if self.geometry.extended_l2 {
                // The subclusters stay what they are: zero, or nothing.
                let kept = |index, old: ExtendedEntry| ExtendedEntry {
                    entry: L2Entry::data(place(index)),
                    bitmap: old.bitmap.without_data(),
                };
                self.link_extended(at, count, counted, kept).await?;
            } else if self.zeroes_as_entries() {
                let entry = |index| L2Entry::zero_allocated(place(index));
                self.link(at, count, counted, entry).await?;
            } else {
                self.link(at, count, counted, |index| L2Entry::data(place(index))).await?;
            }
            self.relieve().await?;
            at = at.saturating_add(count << bits);
        }
        self.write_back(true).await
    }

    /// Whether clusters are made to read as zeroes by their entries: zeroes in the file of an encrypted image are
    /// noise to the guest.
    fn zeroes_as_entries(&self) -> bool {
        !self.is_plain() && self.version >= 3
    }

    /// Writes clusters that decrypt to zeroes.
    async fn write_zero_ciphertext(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        let zeroes = IoBuf::zeroes(usize::try_from(WRITE).unwrap_or(0));
        let mut done = 0;
        while done < len {
            let step = usize::try_from((len - done).min(WRITE)).unwrap_or(0);
            let (guest, host) = (guest.saturating_add(done), host.saturating_add(done));
            self.write_data(guest, host, zeroes.slice(..step)).await?;
            done = done.saturating_add(WRITE);
        }
        Ok(())
    }
}

/// Makes a range of the file read as zeroes. `untouched` tells that it does, as far as the file goes.
async fn zero(
    file: &Edge,
    offset: u64,
    len: u64,
    mode: Preallocation,
    untouched: bool,
) -> Result<()> {
    match mode {
        Preallocation::Off | Preallocation::Metadata if untouched => {
            // The file only gets longer: core has drained the node, so nobody else makes it so meanwhile.
            let end = offset.saturating_add(len);
            if end > file.size() { file.resize(end, Preallocation::Off).await } else { Ok(()) }
        }
        Preallocation::Off | Preallocation::Metadata => {
            file.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await
        }
        Preallocation::Falloc => file.write_zeroes(offset, len, ZeroFlags::empty()).await,
        Preallocation::Full => {
            let zeroes = IoBuf::zeroes(usize::try_from(WRITE).unwrap_or(0));
            let mut done = 0;
            while done < len {
                let step = usize::try_from((len - done).min(WRITE)).unwrap_or(0);
                let piece = zeroes.slice(..step);
                file.write(offset.saturating_add(done), piece, WriteFlags::empty()).await?;
                done = done.saturating_add(WRITE);
            }
            Ok(())
        }
    }
}

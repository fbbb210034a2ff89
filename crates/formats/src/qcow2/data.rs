//! Guest data at the place that the L2 tables give it.
//!
//! All reads and writes of uncompressed guest data that the map does not answer come through here, with the guest
//! offset beside the host offset: whatever depends on where data belongs, and which child holds it, is decided here.
//! Where new data goes is decided here too ([`Qcow2::reserve_data`]): into clusters of the image, or, with a data file,
//! to the place there that is the guest's own offset. Nothing counts the clusters of a data file, and nothing else than
//! that guest cluster can ever be there, so that they need not rest when they are given up; whoever gives them up holds
//! the guest range lock until the host knows.

use oxblk_core::{ChildIdx, Result, WriteFlags, ZeroFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;
use super::allocator::Reserved;
use super::counted::Counted;
use super::layout::L2Kind;
use super::run_options::Modes;
use super::write_back::ReleaseReason;

/// Clusters for guest data that nobody else can have.
pub(super) struct NewData<'a> {
    /// First cluster.
    pub(super) start: u64,
    /// How many.
    pub(super) count: u64,
    /// They have never been written and read as zeroes.
    pub(super) untouched: bool,
    /// `None` in a data file.
    reserved: Option<Reserved<'a>>,
}

impl<'a> NewData<'a> {
    /// Writing to them begins; see [`Reserved::begin_write`].
    pub(super) fn begin_write(&mut self) {
        if let Some(reserved) = &mut self.reserved {
            reserved.begin_write();
        }
    }

    /// Counts a reference to each of them if `written` says that they hold what they are to hold; they are free again if
    /// not. All writes to them have ended.
    pub(super) async fn count_if(
        self,
        written: Result<()>,
        image: &'a Qcow2,
    ) -> Result<Option<Counted<'a>>> {
        match (self.reserved, written) {
            (None, written) => written.map(|()| None),
            (Some(reserved), Ok(())) => image.count(reserved, ReleaseReason::Data).await.map(Some),
            (Some(reserved), Err(error)) => {
                reserved.give_back();
                Err(error)
            }
        }
    }
}

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
    pub(super) fn reads_as_zeroes(&self, run: &NewData<'_>) -> bool {
        run.untouched && self.is_plain()
    }

    /// The child that holds uncompressed guest data.
    pub(super) fn data_child(&self) -> ChildIdx {
        if self.geometry.data_file { ChildIdx::DATA } else { ChildIdx::FILE }
    }

    /// Whether the data file must be what the guest reads, without a look at the tables.
    pub(super) fn has_raw_data(&self) -> bool {
        self.geometry.data_file && self.modes().contains(Modes::RAW_DATA)
    }

    /// Whether a new image reads as zeroes: one whose data file must be what the guest reads is what that file is.
    pub(super) fn new_data_is_zero(&self) -> bool {
        let data = self.children.get(ChildIdx::DATA);
        !self.has_raw_data() || data.is_some_and(|data| data.node().limits().has_zero_init)
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

    /// Finds room for up to `count` guest clusters from `guest` on, one at least: from host cluster `behind` on, if there
    /// is any.
    pub(super) async fn reserve_data(
        &self,
        guest: u64,
        count: u64,
        behind: Option<u64>,
    ) -> Result<NewData<'_>> {
        if self.geometry.data_file {
            let start = self.geometry.cluster_index(guest);
            return Ok(NewData { start, count, untouched: false, reserved: None });
        }
        let run = self.reserve_to_use_behind(behind, count).await?;
        let (start, count, untouched) = (run.start(), run.count(), run.is_untouched());
        Ok(NewData { start, count, untouched, reserved: Some(run) })
    }

    /// Whether what an entry says of the guest cluster at `guest` cannot be with a data file.
    #[inline]
    pub(super) fn is_misplaced(&self, guest: u64, kind: L2Kind) -> bool {
        self.geometry.data_file
            && match kind {
                L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => {
                    host != self.geometry.cluster_start(guest)
                }
                L2Kind::Compressed { .. } => true,
                L2Kind::Unallocated | L2Kind::Zero { host: None } => false,
            }
    }

    /// How far data is written that ends at `end`: a data file has nothing behind the end of the disk.
    pub(super) fn end_of_data(&self, end: u64) -> u64 {
        if self.geometry.data_file { end.min(self.size()) } else { end }
    }

    /// Makes guest data durable that lies in a data file.
    pub(super) async fn flush_data(&self) -> Result<()> {
        match self.children.get(ChildIdx::DATA) {
            Some(data) => data.flush().await,
            None => Ok(()),
        }
    }

    /// Has a data file that must be what the guest reads read as zeroes, before the tables say so. The caller holds the
    /// range lock.
    pub(super) async fn zero_raw_data(&self, from: u64, to: u64, unmap: bool) -> Result<()> {
        let to = self.end_of_data(to);
        if !self.has_raw_data() || from >= to {
            return Ok(());
        }
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, unmap);
        self.children.require(ChildIdx::DATA)?.write_zeroes(from, to - from, flags).await
    }

    /// Gives the space back that a data file has for whole clusters, after the tables have ceased to refer to them. The
    /// caller holds the range lock.
    pub(super) async fn give_up_data(&self, from: u64, to: u64) {
        let to = self.end_of_data(to);
        if self.has_raw_data() || from >= to {
            return;
        }
        if let Some(data) = self.children.get(ChildIdx::DATA) {
            let to = to.min(data.size());
            if from < to {
                // It only saves space: the host may refuse.
                let _ = data.discard(from, to - from).await;
            }
        }
    }
}

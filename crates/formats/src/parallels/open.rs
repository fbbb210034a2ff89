//! Opening an image. If an image is opened for writing and not for a check, its complete BAT is checked, and the image is
//! repaired if it was not closed or has a fault.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Release};

use oxblk_core::check::{Finding, Fix};
use oxblk_core::{ChildIdx, Edge, Error, ErrorKind, OpenContext, Result};
use oxblk_ring::{IoBufMut, Mutex as AsyncMutex, RangeLock};

use super::Parallels;
use super::header::{HEADER_BYTES, Header};
use super::survey::Survey;
use crate::blocks::reopen::WriteAccess;
use crate::blocks::{Allocator, DirtySectors, EntryMap, FreedBlocks};
use crate::header_mark::Mark;
use crate::write_barrier::WriteBarrier;

/// Message for an image with a format extension. Such an image cannot be opened for writing.
pub(super) const HAS_EXTENSION: &str =
    "Images with a format extension (dirty bitmaps) can only be opened read-only";

/// Reads the header.
pub(super) async fn read_header(file: &Edge) -> Result<Header> {
    let size = file.size();
    let len = usize::try_from(size.min(HEADER_BYTES)).unwrap_or(0);
    let bytes = file.read(0, IoBufMut::new(len)).await;
    let bytes = bytes.map_err(|error| error.prefix("Could not read the parallels header"))?;
    Header::parse(&bytes, size)
}

/// Opens the image that is stored in the file child of `context`.
pub(super) async fn open(context: &mut OpenContext) -> Result<Parallels> {
    let file = context.file()?;
    let header = read_header(&file).await?;
    if header.has_extension {
        context.fall_back_to_read_only(HAS_EXTENSION)?;
    }
    let image = Parallels {
        whole_clusters: AtomicU32::new(whole_clusters(&header, &file)),
        header,
        children: Arc::clone(&context.children),
        access: WriteAccess::new(context.flags.read_only),
        map: EntryMap::new(header.entries),
        allocator: Allocator::new(header.max_clusters(), Arc::clone(&context.epochs)),
        mark: Mark::new(header.in_use),
        unclean: AtomicBool::new(header.in_use),
        data_offset_is_valid: AtomicBool::new(header.data_offset_is_valid),
        dirty: DirtySectors::default(),
        freed: FreedBlocks::default(),
        guest: RangeLock::new(),
        growing: AsyncMutex::new(()),
        writing_back: AsyncMutex::new(()),
        barrier: WriteBarrier::default(),
    };
    if !context.flags.read_only && !context.flags.check {
        image.repair_metadata().await?;
        let survey = image.survey_sound().await?;
        image.allow_allocations(&file, &survey);
    }
    Ok(image)
}

/// The number of clusters that the file contains completely.
fn whole_clusters(header: &Header, file: &Edge) -> u32 {
    let whole = file.size().saturating_sub(header.data_offset) / header.cluster;
    u32::try_from(whole).unwrap_or(u32::MAX)
}

impl Parallels {
    /// Checks the image, and repairs it if it was not closed or has a fault.
    ///
    /// # Errors
    /// `Corrupt` if the repair leaves faults, and the errors of the check and of requests to the image file.
    async fn repair_metadata(&self) -> Result<()> {
        if !self.header.in_use && self.header.data_offset_is_valid {
            let mut faults = 0_u32;
            self.survey(|_| faults = faults.saturating_add(1)).await?;
            if faults == 0 {
                return Ok(());
            }
        }
        let report_finding = |finding: Finding| tracing::error!("parallels: {finding}");
        let report = self.check_image(Fix::All, &report_finding).await;
        let report = report.map_err(|error| error.prefix("Could not repair corrupted image"))?;
        if report.corruptions > 0 {
            return Err(Error::new(ErrorKind::Corrupt, "Could not repair corrupted image"));
        }
        Ok(())
    }

    /// Checks the complete BAT of an image that will be written.
    ///
    /// # Errors
    /// `Corrupt` if an entry of the BAT is faulty, and the errors of requests to the image file.
    pub(super) async fn survey_sound(&self) -> Result<Survey> {
        let mut fault = None;
        let survey = self.survey(|finding| {
            fault.get_or_insert(finding);
        });
        let survey = survey.await?;
        match fault {
            Some(finding) => {
                Err(Error::corrupt(format!("Image is corrupt: BAT entry {}", finding.index)))
            }
            None => Ok(survey),
        }
    }

    /// Tells the allocator which clusters of the file are in use, so that clusters can be allocated.
    pub(super) fn allow_allocations(&self, file: &Edge, survey: &Survey) {
        self.allocator.set_used(&survey.used, self.fresh_from(file), 0);
    }

    /// The first cluster that lies completely behind the end of the file. `None` if the file cannot grow.
    fn fresh_from(&self, file: &Edge) -> Option<u32> {
        let behind = file.size().saturating_sub(self.header.data_offset);
        let fresh = u32::try_from(behind.div_ceil(self.header.cluster)).unwrap_or(u32::MAX);
        file.node().limits().grows.then_some(fresh)
    }

    /// Takes over the size of the file, and whether it can grow. No request is in flight.
    pub(super) fn file_changed(&self) {
        if let Some(file) = self.children.get(ChildIdx::FILE) {
            self.allocator.set_fresh(self.fresh_from(&file));
            self.whole_clusters.store(whole_clusters(&self.header, &file), Release);
        }
    }
}

//! Opening an image. If an image is opened for writing and not for a check, its complete map is checked, for two reasons.
//! First, the allocator must know the free blocks. Second, if two entries refer to one block of the file, a write to this
//! block would change two blocks of the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Release};

use oxblk_core::{ChildIdx, Edge, Error, OpenContext, Result};
use oxblk_ring::{IoBufMut, Mutex as AsyncMutex, RangeLock};

use super::Vdi;
use super::header::{BLOCK, HEADER_BYTES, Header};
use super::survey::{Fault, Finding, Survey};
use crate::blocks::reopen::WriteAccess;
use crate::blocks::{Allocator, DirtySectors, EntryMap, FreedBlocks};
use crate::write_barrier::WriteBarrier;

/// Reads the header.
pub(super) async fn read_header(file: &Edge) -> Result<Header> {
    let size = file.size();
    let len = usize::try_from(size.min(HEADER_BYTES)).unwrap_or(0);
    let bytes = file.read(0, IoBufMut::new(len)).await;
    Header::parse(&bytes.map_err(|error| error.prefix("Could not read the VDI header"))?, size)
}

/// Opens the image that is stored in the file child of `context`.
pub(super) async fn open(context: &mut OpenContext) -> Result<Vdi> {
    let file = context.file()?;
    let header = read_header(&file).await?;
    let image = Vdi {
        whole_blocks: AtomicU32::new(whole_blocks(&header, &file)),
        header,
        children: Arc::clone(&context.children),
        access: WriteAccess::new(context.flags.read_only),
        map: EntryMap::new(header.blocks),
        allocator: Allocator::new(header.blocks, Arc::clone(&context.epochs)),
        allocated_on_disk: AtomicU64::new(header.allocated.into()),
        dirty: DirtySectors::default(),
        freed: FreedBlocks::default(),
        guest: RangeLock::new(),
        growing: AsyncMutex::new(()),
        writing_back: AsyncMutex::new(()),
        barrier: WriteBarrier::default(),
    };
    if !context.flags.read_only && !context.flags.check {
        let survey = image.survey_sound().await?;
        image.allow_allocations(&file, &survey);
    }
    Ok(image)
}

/// The number of blocks that the file contains completely.
fn whole_blocks(header: &Header, file: &Edge) -> u32 {
    let whole = file.size().saturating_sub(header.data_offset) / BLOCK;
    u32::try_from(whole).unwrap_or(u32::MAX)
}

impl Vdi {
    /// Checks the complete map of an image that will be written.
    ///
    /// # Errors
    /// Fails if two entries refer to the same block, or an entry refers to a block number that is too large. Also returns
    /// the errors of requests to the image file.
    pub(super) async fn survey_sound(&self) -> Result<Survey> {
        let mut fault = None;
        let survey = self.survey(|Finding { fault: found, index, block, .. }| {
            let what = match found {
                Fault::Shared => "another entry refers to this block too",
                Fault::TooLarge => "this number is too large",
                // Not an error: a write to the block extends the file.
                Fault::CutOff => return true,
            };
            fault = Some(format!(
                "Image is corrupt: the map entry of block {index} refers to block {block} of the file, but {what}"
            ));
            false
        });
        let survey = survey.await?;
        match fault {
            Some(text) => Err(Error::corrupt(text)
                .with_hint("It can be read; 'check -r all' repairs it without loss.")),
            None => Ok(survey),
        }
    }

    /// Tells the allocator which blocks of the file are in use, so that blocks can be allocated.
    pub(super) fn allow_allocations(&self, file: &Edge, survey: &Survey) {
        self.allocator.set_used(&survey.used, self.fresh_from(file), 0);
    }

    /// The first block that lies completely behind the end of the file. `None` if the file cannot grow.
    fn fresh_from(&self, file: &Edge) -> Option<u32> {
        let behind = file.size().saturating_sub(self.header.data_offset).div_ceil(BLOCK);
        file.node().limits().grows.then(|| u32::try_from(behind).unwrap_or(u32::MAX))
    }

    /// Takes over the size of the file, and whether it can grow. No request is in flight.
    pub(super) fn file_changed(&self) {
        if let Some(file) = self.children.get(ChildIdx::FILE) {
            self.allocator.set_fresh(self.fresh_from(&file));
            self.whole_blocks.store(whole_blocks(&self.header, &file), Release);
        }
    }
}

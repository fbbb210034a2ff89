//! Opening an image. If a dynamic image is opened for writing and not for a check, its complete BAT is checked, for two
//! reasons. First, the allocator must know which slots (places for blocks in the file) are free. Second, if two entries
//! refer to one block of the file, a write to this block would change two blocks of the disk.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use oxblk_core::{Driver, Error, OpenContext, Result};
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

use super::Vpc;
use super::file_end::FileEnd;
use super::fixed::Fixed;
use super::footer::{FOOTER_BYTES, SizeRule};
use super::metadata::{Found, Metadata, read_metadata};
use super::sector_bitmap::FullBitmaps;
use super::survey::Survey;
use crate::blocks::reopen::WriteAccess;
use crate::blocks::{Allocator, DirtySectors, EntryMap, FreedBlocks};
use crate::write_barrier::WriteBarrier;

/// An entry contains a 32-bit sector number, so every block starts before this byte offset.
const REACH: u64 = (1 << 32) * FOOTER_BYTES;

/// Opens the image that is stored in the file child of `context`.
pub(super) async fn open(context: &mut OpenContext) -> Result<Box<dyn Driver>> {
    let file = context.file()?;
    let rule = SizeRule::take(&mut context.options)?.unwrap_or_default();
    match read_metadata(&file, rule).await? {
        Found::Fixed { footer, size } => Ok(Box::new(Fixed::new(context, *footer, size, rule))),
        Found::Dynamic { metadata, size } => {
            let image = new(context, *metadata, (size, rule), file.size());
            if !context.flags.read_only && !context.flags.check {
                let survey = image.survey_sound().await?;
                image.allow_allocations(&file, &survey);
            }
            Ok(Box::new(image))
        }
    }
}

fn new(
    context: &OpenContext,
    metadata: Metadata,
    (size, rule): (u64, SizeRule),
    file_size: u64,
) -> Vpc {
    let header = &metadata.header;
    let max_slots = u32::try_from(REACH / header.stride()).unwrap_or(u32::MAX);
    Vpc {
        metadata,
        size,
        rule,
        children: Arc::clone(&context.children),
        access: WriteAccess::new(context.flags.read_only),
        map: EntryMap::new(header.blocks),
        allocator: Allocator::new(max_slots, Arc::clone(&context.epochs)),
        first_slot: AtomicU64::new(header.metadata_end()),
        file_len: AtomicU64::new(file_size),
        end: FileEnd::default(),
        full: FullBitmaps::new(header.blocks),
        dirty: DirtySectors::default(),
        freed: FreedBlocks::default(),
        guest: RangeLock::new(),
        growing: AsyncMutex::new(()),
        writing_back: AsyncMutex::new(()),
        barrier: WriteBarrier::default(),
    }
}

impl Vpc {
    /// Checks the complete BAT of an image that will be written.
    ///
    /// # Errors
    /// `Corrupt` if an entry of the BAT is faulty, and the errors of requests to the image file.
    pub(super) async fn survey_sound(&self) -> Result<Survey> {
        let mut fault = None;
        let survey = self.survey(|finding| {
            fault = Some(finding);
            false
        });
        let survey = survey.await?;
        match fault {
            Some(finding) => Err(Error::corrupt(format!("Image is corrupt: {finding}"))
                .with_hint("It can be read; 'check -r all' repairs it without loss.")),
            None => Ok(survey),
        }
    }
}

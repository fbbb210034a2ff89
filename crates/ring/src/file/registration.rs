//! The registration of files with rings.
//!
//! Each open file has a dense id: its index in the registered-file table of every ring. A ring registers a file when
//! the ring first uses it. When the file is closed, a request to unregister the file is sent to the rings that have
//! registered it. Another file may get the id after all these rings have unregistered the file.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::runtime::shared::{Message, send_to};

/// A small number that no other open file has. When it is dropped, another file may get the number.
struct FileId(u32);

struct FreeIds {
    next: u32,
    free: Vec<u32>,
}

static IDS: Mutex<FreeIds> = Mutex::new(FreeIds { next: 0, free: Vec::new() });

impl FileId {
    fn new() -> FileId {
        let mut ids = IDS.lock().unwrap_or_else(PoisonError::into_inner);
        let id = ids.free.pop().unwrap_or_else(|| {
            let id = ids.next;
            ids.next += 1;
            id
        });
        FileId(id)
    }
}

impl Drop for FileId {
    fn drop(&mut self) {
        IDS.lock().unwrap_or_else(PoisonError::into_inner).free.push(self.0);
    }
}

/// The file's index in the registered-file tables of rings.
pub(super) struct Registration {
    id: Arc<FileId>,
    /// I/O threads whose ring may have registered the file, by index.
    rings: AtomicU64,
}

impl Registration {
    /// The registration of a file that no ring has registered yet.
    pub(super) fn new() -> Registration {
        Registration { id: Arc::new(FileId::new()), rings: AtomicU64::new(0) }
    }

    /// The dense id of the file.
    pub(super) fn id(&self) -> u32 {
        self.id.0
    }

    /// Records that the ring of the I/O thread `index` has registered the file.
    pub(super) fn note_ring(&self, index: usize) {
        self.rings.fetch_or(1 << index, Ordering::Relaxed);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // The id becomes free when the last ring has unregistered the file.
        let rings = *self.rings.get_mut();
        send_to(rings, || Message::Unregister(self.id.0, Arc::clone(&self.id) as _));
    }
}

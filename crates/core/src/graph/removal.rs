//! Removes the files of images that could not be completed.
//!
//! A file is removed only under its locks, because another process may have opened the file since it was created. A file
//! that cannot be opened or locked is kept.

use super::{Graph, OpenFlags};
use crate::control::run_to_completion;
use crate::create::{Created, CreatedFile, FileRemoval, NewFile, Removal};
use crate::perm::{Perm, Permissions};
use crate::{Attachment, ChildIdx, Errno, Options, Result};

impl Created {
    /// Removes the files that the creation has made. Call this only after all users in this process have closed the files. A
    /// file is kept if it existed before, if it is a device, if another program has replaced it, or if another program uses
    /// it. The image file comes first in the result. Once begun, the removal runs to its end even if the returned future is
    /// dropped.
    pub async fn remove(self, graph: &Graph) -> Vec<FileRemoval> {
        let graph = graph.clone();
        run_to_completion(async move {
            let mut removals = Vec::new();
            for NewFile { filename, file } in self.files {
                let outcome = match file {
                    Ok(Some(file)) => remove_unused(&graph, &filename, &*file).await,
                    Ok(None) => Ok(Removal::Kept),
                    Err(error) => Err(error),
                };
                removals.push(FileRemoval { filename, outcome });
            }
            removals
        })
        .await
    }

    /// Like [`Self::remove`], for a caller that already reports another error. The log reports files that should have
    /// been removed but are kept.
    pub async fn remove_incomplete(self, graph: &Graph) {
        self.remove(graph).await.into_iter().for_each(log);
    }

    /// Like [`Self::remove_incomplete`], for a caller whose permissions keep other users from writing to the files.
    pub(super) fn remove_locked(self) {
        for NewFile { filename, file } in self.files {
            let outcome =
                file.and_then(|file| file.map_or(Ok(Removal::Kept), |file| file.remove()));
            log(FileRemoval { filename, outcome });
        }
    }
}

/// Removes a file that nobody uses. The permissions of the removal keep other users and processes from writing to the
/// file meanwhile.
async fn remove_unused(graph: &Graph, filename: &str, file: &dyn CreatedFile) -> Result<Removal> {
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let node = match graph.open_protocol(filename, Options::new(), flags).await {
        Ok(node) => node,
        Err(error) if error.raw_errno() == Errno::NOENT => return Ok(Removal::Replaced),
        Err(error) => return Err(error),
    };
    let changes = Perm::WRITE | Perm::RESIZE;
    let permissions = Permissions { taken: changes, shared: Perm::all() - changes };
    let user = format!("removal of '{filename}'");
    // The file is removed while the attachment holds its locks.
    let attached = Attachment::new(&node, user, ChildIdx::FILE.name(), permissions);
    let outcome = attached.and_then(|attached| {
        let outcome = file.remove();
        drop(attached);
        outcome
    });
    graph.release_after_failure(node).await;
    outcome
}

fn log(removal: FileRemoval) {
    let FileRemoval { filename, outcome } = removal;
    match outcome {
        Ok(Removal::Removed | Removal::Kept) => {}
        Ok(Removal::Replaced) => {
            tracing::warn!(
                filename,
                "another program has replaced the incomplete image; nothing was removed"
            );
        }
        Err(error) => tracing::warn!(filename, %error, "cannot remove an incomplete image"),
    }
}

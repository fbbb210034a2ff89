//! `--untrusted`: whether the images of the command line may refer to other files.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::Gate;

static REFUSES_OTHER_FILES: AtomicBool = AtomicBool::new(false);

/// Makes [`chosen`] return a gate that refuses all files to which images refer.
pub(crate) fn refuse_other_files() {
    REFUSES_OTHER_FILES.store(true, Relaxed);
}

/// The gate that the user chose. The gate accepts every name, as QEMU does, or no name.
pub(crate) fn chosen() -> Gate {
    if REFUSES_OTHER_FILES.load(Relaxed) { Gate::Nothing } else { Gate::Anything }
}

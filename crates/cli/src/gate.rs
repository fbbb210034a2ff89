//! `--untrusted`: which other files the images of this command line may refer to.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::Gate;

static DISTRUSTED: AtomicBool = AtomicBool::new(false);

/// From now on, refuses all files that images refer to.
pub(crate) fn distrust() {
    DISTRUSTED.store(true, Relaxed);
}

/// The gate that the user chose: it accepts every name, as QEMU does, or none.
pub(crate) fn chosen() -> Gate {
    if DISTRUSTED.load(Relaxed) { Gate::Nothing } else { Gate::Anything }
}

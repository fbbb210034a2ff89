//! `--untrusted`: what the images of this command line may pull in.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::Gate;

use crate::getopt::{Opt, long};

/// What the parser returns for the option.
pub(crate) const UNTRUSTED: char = '\u{1}';

/// The option, which every command that opens images has.
pub(crate) const OPTIONS: &[Opt] = &[long(UNTRUSTED, "untrusted", false)];

static DISTRUSTED: AtomicBool = AtomicBool::new(false);

/// Images may name no other files from now on.
pub(crate) fn distrust() {
    DISTRUSTED.store(true, Relaxed);
}

/// What the user chose: what QEMU follows, or nothing.
pub(crate) fn chosen() -> Gate {
    if DISTRUSTED.load(Relaxed) { Gate::Nothing } else { Gate::Anything }
}

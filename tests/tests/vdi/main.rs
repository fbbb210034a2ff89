//! vdi images: made as the QEMU tools make them, continued by either, checked, and repaired without loss.

mod check;
mod create;
mod reopen;

//! VDI images: created as by the QEMU tools, used alternately by both programs, checked, and repaired without loss.

mod check;
mod create;
mod faults;
mod reopen;

//! VPC (VHD) images: created as by the QEMU tools, used alternately by both programs, checked, and repaired without loss.

mod check;
mod create;
mod foreign;
mod reopen;

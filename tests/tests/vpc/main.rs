//! Tests of VPC (VHD) images: creation gives the same bytes as QEMU's tools, oxblk and QEMU use an image alternately, and check
//! and repair lose no data.

mod check;
mod create;
mod footers;
mod foreign;
mod reopen;

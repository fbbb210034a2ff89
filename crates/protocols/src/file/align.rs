//! The alignment of offsets, lengths and memory that `O_DIRECT` requires.
//!
//! The first source is `statx` (since Linux 6.1), the second is the sector size of a block device. If neither reports
//! the alignment, small reads are tried. A file system that accepts a read of one byte does not check the alignment,
//! and may use the page cache. In this case, requests are aligned to 4096 bytes.

use std::os::fd::BorrowedFd;

use oxblk_core::{Error, Result};
use oxblk_ring::{File, IoBufMut};
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::handle;

/// Alignments in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) request: u32,
    pub(super) memory: u32,
}

impl Alignment {
    /// No requirement: the file was opened without `O_DIRECT`, or it is a simulated disk.
    pub(super) const NONE: Self = Self { request: 1, memory: 1 };
}

const PAGE: u32 = 4096;

/// The alignment that `file`, opened with `O_DIRECT`, requires.
pub(super) async fn probe(file: &File) -> Result<Alignment> {
    let Some(fd) = file.as_fd() else { return Ok(Alignment::NONE) };
    if let Some(reported) = query_statx(fd)? {
        return Ok(reported);
    }
    if let Some(sector) = handle::sector_size(fd) {
        return Ok(Alignment { request: sector, memory: sector.max(512) });
    }
    let request = probe_request(file).await?;
    let memory = if reads(file, request, 512).await { 512 } else { PAGE };
    Ok(Alignment { request, memory })
}

fn query_statx(fd: BorrowedFd<'_>) -> Result<Option<Alignment>> {
    let stat = match rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) => stat,
        // An old kernel, or a sandbox that does not allow the call.
        Err(Errno::NOSYS | Errno::INVAL | Errno::PERM) => return Ok(None),
        Err(errno) => return Err(Error::from_errno(errno.raw_os_error())),
    };
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(None);
    }
    let valid = |size: u32| size.is_power_of_two() && size <= 1 << 20;
    let reported = Alignment { request: stat.stx_dio_offset_align, memory: stat.stx_dio_mem_align };
    Ok((valid(reported.request) && valid(reported.memory)).then_some(reported))
}

async fn probe_request(file: &File) -> Result<u32> {
    for request in [1, 512, 1024, 2048, PAGE] {
        if reads(file, request, 0).await {
            return Ok(if request == 1 { PAGE } else { request });
        }
    }
    Err(Error::invalid("Could not find working O_DIRECT alignment")
        .with_hint("Try cache.direct=off"))
}

/// Whether a read of `len` bytes at offset 0, into memory that starts `skew` bytes after a page boundary, does not fail
/// with `EINVAL`.
async fn reads(file: &File, len: u32, skew: usize) -> bool {
    let mut page = IoBufMut::new(2 * PAGE as usize);
    let mut buf = page.split_off(skew);
    buf.truncate(len as usize);
    match file.read_at(buf, 0).await.0 {
        Ok(_) => true,
        // Another error, such as a bad sector, does not depend on alignment.
        Err(error) => error.raw_os_error() != Some(Errno::INVAL.raw_os_error()),
    }
}

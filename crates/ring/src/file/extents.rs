//! Finds the data and the holes of files.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use super::{File, Inner, bad_descriptor, check, signed};
use crate::runtime::offload::on_file;

/// A run of a file that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Whether the extent is data. A hole reads as zeroes.
    pub is_data: bool,
    /// The end of the extent, in bytes from the start of the file.
    pub end: u64,
}

impl File {
    /// Finds the extent that contains `offset`.
    ///
    /// # Errors
    /// `ENXIO` at and past the end of the file; otherwise the error of the file system. If the file system does not
    /// report holes, the whole file is data.
    pub async fn seek_extent(&self, offset: u64) -> io::Result<Extent> {
        match &self.0 {
            Inner::Sim(disk) => disk.seek_extent(offset),
            Inner::Closed => Err(bad_descriptor()),
            Inner::Host(host) => {
                let host = Arc::clone(host);
                on_file(move || seek_extent(host.fd.as_fd(), offset)).await
            }
        }
    }

    /// Finds the extent that contains `offset`, and the following extents until `data_extents` extents of data are
    /// found.
    ///
    /// # Errors
    /// The errors of [`File::seek_extent`] at `offset`. If a later extent cannot be found, the list ends before it.
    pub async fn seek_extents(&self, offset: u64, data_extents: usize) -> io::Result<Vec<Extent>> {
        match &self.0 {
            Inner::Sim(disk) => extents_with(offset, data_extents, |at| disk.seek_extent(at)),
            Inner::Closed => Err(bad_descriptor()),
            Inner::Host(host) => {
                let host = Arc::clone(host);
                let seek = move |at| seek_extent(host.fd.as_fd(), at);
                on_file(move || extents_with(offset, data_extents, seek)).await
            }
        }
    }
}

fn extents_with(
    offset: u64,
    data_extents: usize,
    seek: impl Fn(u64) -> io::Result<Extent>,
) -> io::Result<Vec<Extent>> {
    let mut last = seek(offset)?;
    let mut extents = vec![last];
    let mut data = usize::from(last.is_data);
    while data < data_extents {
        // The usual error is `ENXIO`, at the end of the file.
        let Ok(next) = seek(last.end) else { break };
        data = data.saturating_add(usize::from(next.is_data));
        extents.push(next);
        last = next;
    }
    Ok(extents)
}

fn seek_extent(fd: BorrowedFd<'_>, offset: u64) -> io::Result<Extent> {
    let at = signed(offset)?;
    // SAFETY: no memory involved. Nothing uses the descriptor's position.
    let seek = |at, whence| check(unsafe { libc::lseek(fd.as_raw_fd(), at, whence) });
    match seek(at, libc::SEEK_DATA) {
        Ok(data) if data > offset => Ok(Extent { is_data: false, end: data }),
        Ok(_) => match seek(at, libc::SEEK_HOLE) {
            Ok(hole) if hole > offset => Ok(Extent { is_data: true, end: hole }),
            // The range was punched between the two calls, and the length of the hole is unknown. One byte is a safe
            // lower bound.
            Ok(_) => Ok(Extent { is_data: false, end: offset.saturating_add(1) }),
            Err(error) => Err(error),
        },
        // There is no data after the offset, or the offset is past the end of the file.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => match seek(0, libc::SEEK_END)? {
            size if size > offset => Ok(Extent { is_data: false, end: size }),
            _ => Err(error),
        },
        // The file system does not support the call, so the whole file is data.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            match seek(0, libc::SEEK_END)? {
                size if size > offset => Ok(Extent { is_data: true, end: size }),
                _ => Err(io::Error::from_raw_os_error(libc::ENXIO)),
            }
        }
        Err(error) => Err(error),
    }
}

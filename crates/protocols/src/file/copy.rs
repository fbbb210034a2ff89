//! Copy offload: the kernel copies between two files. `copy_file_range` shares the blocks (reflink) if the file system
//! can do this, and otherwise copies the data.

use oxblk_core::driver::CopyRange;
use oxblk_core::{BoxFuture, Driver, Error, Result};
use rustix::io::Errno;

use super::FileDriver;

impl CopyRange for FileDriver {
    fn copy_to<'a>(
        &'a self,
        offset: u64,
        target: &'a dyn Driver,
        target_offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let from = self.current();
            let Some(to) = target.host_file().map(|file| file.clone()) else {
                return Err(Error::unsupported("Copy offload is not possible here"));
            };
            let mut done = 0;
            while done < len {
                let (source, dest) =
                    (offset.saturating_add(done), target_offset.saturating_add(done));
                match from.copy_range_to(source, &to, dest, len - done).await {
                    // The source file ends here. The rest of the source reads as zeroes, so the rest must be copied
                    // through buffers.
                    Ok(0) => return Err(Error::unsupported("Copy offload ended early")),
                    Ok(copied) => done = done.saturating_add(copied),
                    Err(error) => return Err(converted(error)),
                }
            }
            Ok(())
        })
    }
}

/// Converts an error. If the errno means that the kernel cannot copy between these files, the caller gets
/// "unsupported" and copies through buffers.
fn converted(error: std::io::Error) -> Error {
    let impossible = [
        Errno::XDEV,
        Errno::OPNOTSUPP,
        Errno::INVAL,
        Errno::NOSYS,
        Errno::BADF,
        Errno::TXTBSY,
        Errno::PERM,
    ];
    if impossible.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) {
        return Error::unsupported("Copy offload is not possible here");
    }
    error.into()
}

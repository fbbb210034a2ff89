//! [`Sharing`]: the operations that other users of an image may perform while a disk is open.

use oxblk_core::{Perm, Permissions};

/// The operations that other users of the image may perform while the disk is open. In addition, the format can forbid
/// operations: while this process writes to an image of a format with metadata, no other process may write to the image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Others may read and write. This is the default, as in QEMU's tools.
    #[default]
    ReadWrite,
    /// Others may only read if this disk is writable. They may write as well if this disk is read-only.
    OneWriter,
    /// Others may only read, so no other user changes the contents while the disk is open.
    ReadOnly,
}

impl Sharing {
    /// The permissions of a user that takes `taken`.
    pub(super) fn permissions(self, taken: Perm) -> Permissions {
        let others_write = match self {
            Self::ReadWrite => true,
            Self::OneWriter => !taken.contains(Perm::WRITE),
            Self::ReadOnly => false,
        };
        if others_write {
            Permissions::sharing_all(taken)
        } else {
            Permissions { taken, shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_excludes_others_only_if_it_writes() {
        let others_write =
            |sharing: Sharing, taken| sharing.permissions(taken).shared.contains(Perm::WRITE);
        let writes = Perm::CONSISTENT_READ | Perm::WRITE;
        assert!(others_write(Sharing::OneWriter, Perm::CONSISTENT_READ));
        assert!(!others_write(Sharing::OneWriter, writes));
        assert!(others_write(Sharing::ReadWrite, writes));
        assert!(!others_write(Sharing::ReadOnly, Perm::CONSISTENT_READ));
    }
}

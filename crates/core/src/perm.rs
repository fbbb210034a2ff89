//! Permissions: the operations that each user of a node performs, and the operations that this user allows other users.
//!
//! Every [`crate::Edge`] takes some permissions on its node and shares some. Two users conflict when one user takes a
//! permission that the other user does not share. The permissions that a node takes on its children follow from the
//! permissions that its own parents take on the node, and from the needs of its driver. Protocol drivers convert the
//! resulting permissions to file locks. Other processes see these locks.

use crate::{Error, ErrorKind, Result};

/// Guests see sizes in units of sectors, so size checks use sectors too.
pub(crate) const SECTOR: u64 = 512;

bitflags::bitflags! {
    /// Operations that a user performs on a node. Protocols use the bit numbers for file locks, as in QEMU: the
    /// permission with bit number `n` has the lock bytes `100 + n` and `200 + n`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Perm: u8 {
        /// Reads. The data must be the data that a guest would see.
        const CONSISTENT_READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Writes that do not change the data that readers see.
        const WRITE_UNCHANGED = 4;
        /// Changes the size.
        const RESIZE = 8;
    }
}

impl Perm {
    /// The names that messages use, joined by `", "`.
    pub fn names(self) -> String {
        const NAMES: [(Perm, &str); 4] = [
            (Perm::CONSISTENT_READ, "consistent read"),
            (Perm::WRITE, "write"),
            (Perm::WRITE_UNCHANGED, "write unchanged"),
            (Perm::RESIZE, "resize"),
        ];
        let held: Vec<_> =
            NAMES.iter().filter(|(p, _)| self.contains(*p)).map(|(_, name)| *name).collect();
        held.join(", ")
    }
}

/// The permissions that a user takes, and the permissions that this user allows other users to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    /// The operations of this user.
    pub taken: Perm,
    /// The operations allowed to other users.
    pub shared: Perm,
}

impl Permissions {
    /// Takes no permission and shares all permissions.
    pub const NONE: Self = Self { taken: Perm::empty(), shared: Perm::all() };

    /// Takes `taken` and shares all permissions, as tools do.
    pub fn sharing_all(taken: Perm) -> Self {
        Self { taken, shared: Perm::all() }
    }

    /// The permissions of two users together: the union of `taken` and the intersection of `shared`.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { taken: self.taken | other.taken, shared: self.shared & other.shared }
    }

    /// The default permissions on a child with `roles` of a node whose parents use the node with `parents`.
    ///
    /// - A filter passes the permissions of its parents to its child.
    /// - A backing file is only read, and may change only if the parents share write permission on the overlay.
    /// - A format takes read permission on a file with metadata, unless the node only looks at its header (`no_io`). A writable
    ///   format takes write and resize permission too, even if no parent writes yet. The format shares neither of these two
    ///   permissions.
    /// - A file with guest data only is used as the parents use the node. A parent that writes may make the file grow, a parent
    ///   that changes the size may have to write zeroes, and nobody else may change the size.
    pub fn for_child(roles: Roles, parents: Self, access: NodeAccess) -> Self {
        if roles.contains(Roles::FILTERED) {
            parents
        } else if roles.contains(Roles::COW) {
            Self::for_backing(parents)
        } else if roles.contains(Roles::METADATA) {
            Self::for_metadata(parents, access)
        } else {
            Self::for_data(parents)
        }
    }

    /// Checks whether a node of `size` bytes with a request alignment of `alignment` bytes can be used with these
    /// permissions. Writes cover whole blocks, so a write to an incomplete last block would enlarge the node.
    ///
    /// # Errors
    /// When the user takes write but not resize permission, and the size, rounded up to sectors, is not a multiple of
    /// `alignment`.
    pub fn check_size(self, size: u64, alignment: u32) -> Result<()> {
        let writes = self.taken.contains(Perm::WRITE) && !self.taken.contains(Perm::RESIZE);
        let end = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
        if writes && !end.is_multiple_of(u64::from(alignment.max(1))) {
            let text = "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment";
            return Err(Error::new(ErrorKind::Denied, text));
        }
        Ok(())
    }

    fn for_backing(parents: Self) -> Self {
        let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        if parents.shared.contains(Perm::WRITE) {
            shared |= Perm::WRITE | Perm::RESIZE;
        }
        Self { taken: parents.taken & Perm::CONSISTENT_READ, shared }
    }

    fn for_data(parents: Self) -> Self {
        let mut taken = parents.taken;
        if taken.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) {
            taken |= Perm::RESIZE;
        }
        if taken.contains(Perm::RESIZE) {
            // New space that must read as zeroes is written.
            taken |= Perm::WRITE;
        }
        Self { taken, shared: parents.shared - Perm::RESIZE }
    }

    fn for_metadata(parents: Self, access: NodeAccess) -> Self {
        let mut taken = parents.taken;
        taken.set(Perm::CONSISTENT_READ, !access.no_io || taken.contains(Perm::CONSISTENT_READ));
        if access.writable {
            taken |= Perm::WRITE | Perm::RESIZE;
        }
        let shared = (parents.shared | Perm::WRITE_UNCHANGED | Perm::CONSISTENT_READ)
            - (Perm::WRITE | Perm::RESIZE);
        Self { taken, shared }
    }
}

/// How a node was opened, as far as the permissions on its children depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeAccess {
    /// The node is writable.
    pub writable: bool,
    /// The node was opened only to look at its header and metadata ([`OpenFlags::no_io`](crate::OpenFlags::no_io)).
    pub no_io: bool,
}

bitflags::bitflags! {
    /// The purposes for which a node uses a child. The roles determine the default permissions
    /// ([`Permissions::for_child`]) and the links of a backing chain.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Roles: u8 {
        /// The child stores guest data.
        const DATA = 1;
        /// The child stores metadata of the image.
        const METADATA = 2;
        /// The node shows the data of the child unchanged.
        const FILTERED = 4;
        /// The node reads the child where the node itself has allocated no data (a backing file).
        const COW = 8;
        /// The child whose file name identifies the image.
        const PRIMARY = 16;
    }
}

impl Roles {
    /// The file of an image.
    pub const IMAGE: Self = Self::DATA.union(Self::METADATA).union(Self::PRIMARY);
    /// The child of a filter.
    pub const FILTER: Self = Self::FILTERED.union(Self::PRIMARY);
}

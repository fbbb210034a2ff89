//! Permissions: what each user of a node does with it and lets others do.
//!
//! Every [`crate::Edge`] takes some permissions on its node and shares some. Two users conflict when
//! one takes what the other does not share. A node asks of its children what its own parents ask of it,
//! plus what its driver needs for itself; protocols turn the outcome into locks that exclude other
//! processes.

use crate::{DriverKind, Error, ErrorKind, Result};

/// Sizes of nodes are looked at in sectors, as guests see them.
const SECTOR: u64 = 512;

bitflags::bitflags! {
    /// Things that a user does with a node. The bit numbers are those of the lock bytes that processes
    /// exclude one another with.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Perm: u8 {
        /// Reads, and relies on what it reads being what a guest would see.
        const CONSISTENT_READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Writes that do not change what a reader sees.
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

/// What a user takes and what it lets others take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    /// What it does.
    pub taken: Perm,
    /// What others may do.
    pub shared: Perm,
}

impl Permissions {
    /// No use at all: takes nothing, shares everything.
    pub const NONE: Self = Self { taken: Perm::empty(), shared: Perm::all() };

    /// Takes `taken` and shares everything, as tools do.
    pub fn sharing_all(taken: Perm) -> Self {
        Self { taken, shared: Perm::all() }
    }

    /// Both uses at once.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { taken: self.taken | other.taken, shared: self.shared & other.shared }
    }

    /// The usual permissions on a child in `role` of a node whose parents use it with `parents`.
    ///
    /// A filter asks what is asked of it. A format that is writable writes and resizes its file even
    /// where no parent writes yet (metadata), and lets nobody else do so. A backing file is only read,
    /// and may change only if the parents say that the overlay may.
    pub fn for_child(kind: DriverKind, role: Role, parents: Self, writable: bool) -> Self {
        match (kind, role) {
            (DriverKind::Filter, Role::Primary) => parents,
            (_, Role::Backing) => Self::for_backing(parents),
            _ => Self::for_storage(parents, writable),
        }
    }

    /// Whether a node of `size` bytes whose requests are aligned to `alignment` bytes can be used like this. Writes are
    /// whole blocks, so that a write to a last block that is not whole would enlarge the node.
    ///
    /// # Errors
    /// When it is written, may not be resized, and does not end at a multiple of `alignment`.
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

    fn for_storage(parents: Self, writable: bool) -> Self {
        let mut taken = Perm::CONSISTENT_READ | parents.taken;
        if writable {
            taken |= Perm::WRITE | Perm::RESIZE;
        }
        let shared = (parents.shared | Perm::WRITE_UNCHANGED | Perm::CONSISTENT_READ)
            - (Perm::WRITE | Perm::RESIZE);
        Self { taken, shared }
    }
}

/// What a child is to its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The child that the node's own data and metadata live in (`file`).
    Primary,
    /// Guest data only (external data file).
    Data,
    /// Metadata only.
    Metadata,
    /// Read where the node itself has nothing allocated.
    Backing,
}

//! Adds and removes children of a quorum.

use std::sync::{MutexGuard, PoisonError};

use oxblk_core::{ChildList, Error, Node, Result};

use super::Quorum;

const SECTOR: u64 = 512;

/// The name of the child with this number.
pub(super) fn name(number: u32) -> String {
    format!("children.{number}")
}

pub(super) fn too_many() -> Error {
    Error::invalid("Too many children")
}

impl Quorum {
    /// Whether `node` has the size of the quorum.
    pub(super) fn fits(&self, node: &Node) -> bool {
        use oxblk_core::Driver as _;
        let sectors = |size: u64| size.div_ceil(SECTOR);
        sectors(node.size()) == sectors(self.size())
    }

    fn next(&self) -> MutexGuard<'_, u32> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ChildList for Quorum {
    fn check_new(&self, node: &Node) -> Result<String> {
        if self.settings.verifies {
            return Err(Error::invalid("Cannot add a child to a quorum in blkverify mode"));
        }
        if !self.fits(node) {
            let (quorum, node) = (&self.name, node.name());
            return Err(Error::invalid(format!(
                "Node '{node}' and the children of '{quorum}' have different sizes"
            )));
        }
        let next = *self.next();
        if next == u32::MAX {
            return Err(too_many());
        }
        Ok(name(next))
    }

    fn added(&self, _name: &str) {
        let mut next = self.next();
        *next = next.saturating_add(1);
    }

    fn check_removal(&self, _name: &str) -> Result<()> {
        let threshold = self.settings.threshold;
        if self.members().len() <= threshold {
            return Err(Error::invalid(format!(
                "The number of children cannot be lower than the vote threshold {threshold}"
            )));
        }
        Ok(())
    }

    /// The number of the child that was added last is used again after its removal, as in QEMU.
    fn removed(&self, removed: &str) {
        let mut next = self.next();
        if let Some(last) = next.checked_sub(1).filter(|last| name(*last) == removed) {
            *next = last;
        }
    }
}

//! The amount of work that a random test did, for the report of a long run.

/// Counts of one or more runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Operations on the active image.
    pub operations: u64,
    /// The number of these operations that were cancelled.
    pub cancelled: u64,
    /// Operations that reported an error on a failing disk.
    pub failed: u64,
    /// The numbers of chains of one, two, three and four images.
    pub chains: [u64; 4],
    /// Power cuts.
    pub cuts: u64,
    /// Disks left by power cuts that were opened, checked and compared.
    pub disks: u64,
    /// Images that `qemu-img check` examined.
    pub checked_by_qemu: u64,
}

impl Tally {
    /// Counts a chain with this number of images.
    pub fn chain(&mut self, images: usize) {
        if let Some(count) = images.checked_sub(1).and_then(|index| self.chains.get_mut(index)) {
            *count += 1;
        }
    }

    /// Adds the counts of `other`.
    pub fn add(&mut self, other: &Tally) {
        self.operations += other.operations;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        for (count, more) in self.chains.iter_mut().zip(other.chains) {
            *count += more;
        }
        self.cuts += other.cuts;
        self.disks += other.disks;
        self.checked_by_qemu += other.checked_by_qemu;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_counted_by_their_length() {
        let mut tally = Tally::default();
        for images in [1, 4, 4, 2, 5, 0] {
            tally.chain(images);
        }
        assert_eq!(tally.chains, [1, 1, 0, 2]);
        let one = tally;
        tally.add(&one);
        assert_eq!(tally.chains, [2, 2, 0, 4]);
    }
}

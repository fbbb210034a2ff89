//! Counting the aligned writes of a node; see [`crate::writes_in_flight`].

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use oxblk_ring::perturb::point;
use oxblk_ring::{Shard, Sharded};

use crate::Node;
use crate::writes_in_flight::{Entered, SLOTS, Slots};

/// The aligned writes in flight at a node. Nodes without such writes need no memory for them.
#[derive(Debug, Default)]
pub(crate) struct AlignedWrites(OnceLock<Sharded<OnceLock<Slots>>>);

/// A write that is counted.
#[derive(Debug, Clone, Copy)]
struct Place {
    shard: Shard,
    entered: Entered,
}

impl AlignedWrites {
    /// Counts a write. `None`: the calling thread has too many writes in flight.
    fn enter(&self, range: &Range<u64>) -> Option<Place> {
        let shard = Shard::current();
        let slots = self.0.get_or_init(Sharded::default).at(shard);
        let entered = slots.get_or_init(|| Slots::new(SLOTS)).enter(range)?;
        point();
        Some(Place { shard, entered })
    }

    fn leave(&self, place: Place) {
        if let Some(slots) = self.0.get().and_then(|shards| shards.at(place.shard).get()) {
            slots.leave(place.entered);
        }
    }

    /// Waits until the writes that overlap `range` have ended. The caller has announced a serialising request: it has called
    /// [`Node::begin_serialising`].
    pub(crate) async fn wait_for(&self, range: Range<u64>) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        point();
        let Some(shards) = self.0.get() else { return };
        for slots in shards.iter().filter_map(OnceLock::get) {
            for write in slots.overlapping(&range) {
                let mut round = 0_u32;
                while slots.is_in_flight(write) {
                    if round < 16 {
                        oxblk_ring::yield_now().await;
                    } else {
                        oxblk_ring::sleep(Duration::from_micros(50)).await;
                    }
                    round = round.saturating_add(1);
                }
            }
        }
    }
}

impl Node {
    /// Counts an aligned write of the range, unless a serialising request is in progress or the thread has too many writes in
    /// flight. In this case the write takes the range lock.
    pub(crate) fn count_write(self: &Arc<Self>, offset: u64, len: u64) -> Option<CountedWrite> {
        let place = self.aligned_writes.enter(&(offset..offset.saturating_add(len)))?;
        let write = CountedWrite { node: Arc::clone(self), place };
        // Dropping the value ends the count.
        (!self.is_serialising()).then_some(write)
    }
}

/// A write that is counted until this value is dropped.
#[derive(Debug)]
pub(crate) struct CountedWrite {
    node: Arc<Node>,
    place: Place,
}

impl Drop for CountedWrite {
    fn drop(&mut self) {
        self.node.aligned_writes.leave(self.place);
    }
}

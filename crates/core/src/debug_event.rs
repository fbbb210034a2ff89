//! Debug events: steps of a driver or of the request path that the filter `blkdebug` reacts to.
//!
//! A driver reports a step to the child that the step will access, with [`Edge::debug_event`](crate::Edge::debug_event),
//! before the access. The request path reports its own steps to the node that they concern. A node whose driver has the
//! capability [`DebugEvents`] receives the events; for any other node, a report costs one test of a flag. A report returns no
//! error: the filter fails a later request instead.

use crate::BoxFuture;

macro_rules! events {
    ($($event:ident $name:literal,)*) => {
        /// A step, with QEMU's name ([`DebugEvent::name`]).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum DebugEvent {
            $(
                #[doc = concat!("`", $name, "`")]
                $event,
            )*
        }

        impl DebugEvent {
            /// All events.
            pub const ALL: &'static [Self] = &[$(Self::$event,)*];

            /// QEMU's name of the event.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$event => $name,)*
                }
            }
        }
    };
}

events! {
    L1Update "l1_update",
    L1GrowAllocTable "l1_grow_alloc_table",
    L1GrowWriteTable "l1_grow_write_table",
    L1GrowActivateTable "l1_grow_activate_table",
    L2Load "l2_load",
    L2Update "l2_update",
    L2UpdateCompressed "l2_update_compressed",
    L2AllocCowRead "l2_alloc_cow_read",
    L2AllocWrite "l2_alloc_write",
    ReadAio "read_aio",
    ReadBackingAio "read_backing_aio",
    ReadCompressed "read_compressed",
    WriteAio "write_aio",
    WriteCompressed "write_compressed",
    VmstateLoad "vmstate_load",
    VmstateSave "vmstate_save",
    CowRead "cow_read",
    CowWrite "cow_write",
    ReftableLoad "reftable_load",
    ReftableGrow "reftable_grow",
    ReftableUpdate "reftable_update",
    RefblockLoad "refblock_load",
    RefblockUpdate "refblock_update",
    RefblockUpdatePart "refblock_update_part",
    RefblockAlloc "refblock_alloc",
    RefblockAllocHookup "refblock_alloc_hookup",
    RefblockAllocWrite "refblock_alloc_write",
    RefblockAllocWriteBlocks "refblock_alloc_write_blocks",
    RefblockAllocWriteTable "refblock_alloc_write_table",
    RefblockAllocSwitchTable "refblock_alloc_switch_table",
    ClusterAlloc "cluster_alloc",
    ClusterAllocBytes "cluster_alloc_bytes",
    ClusterFree "cluster_free",
    FlushToOs "flush_to_os",
    FlushToDisk "flush_to_disk",
    PwritevRmwHead "pwritev_rmw_head",
    PwritevRmwAfterHead "pwritev_rmw_after_head",
    PwritevRmwTail "pwritev_rmw_tail",
    PwritevRmwAfterTail "pwritev_rmw_after_tail",
    Pwritev "pwritev",
    PwritevZero "pwritev_zero",
    PwritevDone "pwritev_done",
    EmptyImagePrepare "empty_image_prepare",
    L1ShrinkWriteTable "l1_shrink_write_table",
    L1ShrinkFreeL2Clusters "l1_shrink_free_l2_clusters",
    CorWrite "cor_write",
    ClusterAllocSpace "cluster_alloc_space",
    None "none",
}

impl DebugEvent {
    /// The event with QEMU's name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|event| event.name() == name)
    }
}

/// Receives debug events.
pub trait DebugEvents: Send + Sync {
    /// Reacts to an event. The step begins when the future has completed, so the future can suspend the step.
    fn raise(&self, event: DebugEvent) -> BoxFuture<'_, ()>;
}

/// Suspends requests at debug events.
pub trait Breakpoints: Send + Sync {
    /// Suspends the next request that raises `event`, and gives it the name `tag`. `report` receives a line of text for the user
    /// when the request is suspended and when it is resumed.
    fn set(&self, event: DebugEvent, tag: &str, report: fn(&str));

    /// Removes all breakpoints with this name and resumes the requests that they have suspended. Returns whether there was a
    /// breakpoint that has not suspended a request yet.
    fn remove(&self, tag: &str) -> bool;

    /// Resumes a request. Returns whether a request with this name was suspended.
    fn resume(&self, tag: &str) -> bool;

    /// Whether a request with this name is suspended.
    fn is_suspended(&self, tag: &str) -> bool;

    /// Waits until a request with this name is suspended.
    fn wait<'a>(&'a self, tag: &'a str) -> BoxFuture<'a, ()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_is_found_by_its_name() {
        for event in DebugEvent::ALL {
            assert_eq!(DebugEvent::parse(event.name()), Some(*event));
        }
        assert_eq!(DebugEvent::parse("read"), None);
    }
}

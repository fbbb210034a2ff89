//! Images with extended L2 entries, that is, with subclusters.
//!
//! | file | concern |
//! |---|---|
//! | `fill` | filling new clusters |
//! | `write` | writes that allocate clusters or subclusters, and copy-on-write |
//! | `zero` | zero writes and discards |
//!
//! The unit of allocation is the cluster, but each subcluster has its own state in the bitmap of the L2 entry. A write
//! changes only the subclusters that it touches. If the cluster is unallocated, shared with a snapshot, or compressed, the
//! write goes to a new cluster, and the data of the other subclusters is copied there.
//!
//! In a cluster with the copied flag, data is written first, and the bitmap changes afterwards. The write-back flushes the
//! data before it writes the entry, so that a subcluster never refers to unwritten data after a crash.
//!
//! Code in this module reads and changes entries only while it holds the guest range lock on their clusters. Lookups
//! take no lock: they see either both old words or both new words of an entry (see `mapping/lookup`).

mod fill;
mod write;
mod zero;

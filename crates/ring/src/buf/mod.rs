//! Owned I/O memory.
//!
//! The kernel may access a buffer long after the future of the operation was dropped. Therefore an operation never
//! borrows a buffer: it takes the buffer by value and returns it on completion.
//!
//! * [`IoBufMut`] is the unique view of a range of refcounted memory; it can be split into disjoint
//!   views, joined again, and frozen.
//! * [`IoBuf`] is a shared, immutable view. The last view of a block can become an [`IoBufMut`] again, unless the
//!   memory is static.
//!
//! Invariant: the ranges of all `IoBufMut`s of one block of memory are disjoint from each other and from the ranges
//! of all its `IoBuf`s. All constructors, and all methods that split or join views, preserve the invariant. Therefore
//! `&mut [u8]` from an `IoBufMut` is sound.
//!
//! [`ForeignVec`] and [`ForeignVecMut`] are for memory that others may change.
//!
//! Memory comes from [`pool`]: on an I/O thread, buffers of up to 64 KiB usually come from an arena that the thread has
//! registered with its ring. Other buffers come from bounded caches of free blocks, or are allocated.

mod block;
mod foreign;
mod free;
mod pool;
mod references;
mod returned;
mod shared;
mod unique;
mod words;
mod zero;

use crate::runtime::atomics;

pub use foreign::{ForeignOwner, ForeignVec, ForeignVecMut};
pub(crate) use pool::{Arena, install_arena, trim_shared, trim_thread, uninstall_arena};
pub use shared::IoBuf;
pub use unique::IoBufMut;
pub use words::{WordMemory, Words};
pub use zero::is_zero;

/// Several shared buffers, written one after another.
pub type IoVec = smallvec::SmallVec<[IoBuf; 4]>;
/// Several unique buffers, filled one after another.
pub type IoVecMut = smallvec::SmallVec<[IoBufMut; 4]>;

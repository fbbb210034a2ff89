//! The `file` and `host_device` drivers: files and block devices of the host.
//!
//! | file | what |
//! |---|---|
//! | `options` | option struct, file name prefixes |
//! | `open` | the two factories: opening, what sort of file it may be, read-only fallback |
//! | `handle` | an open descriptor and what is known of it |
//! | `locks` | keeping other processes out |
//! | `align` | which alignment `O_DIRECT` wants |
//! | `driver` | [`FileDriver`]: requests |
//! | `zero` | zeroing and discarding, and remembering what the host cannot do |
//! | `extents` | data and holes |
//! | `resize`, `create` | size, preallocation, new files |
//! | `copy` | copy offload |
//! | `reopen` | the same node with another descriptor |
//!
//! Reads and writes inside the file never come here: [`FileDriver`] answers `map` with "in the host file, at the
//! same offset" and core submits the operation itself. What comes here is the rest: growth, zeroes,
//! discards, status, flushes.

mod align;
mod copy;
mod create;
mod driver;
mod extents;
mod handle;
pub mod locks;
mod open;
mod options;
mod reopen;
mod resize;
mod temporary;
mod zero;

pub use driver::FileDriver;
pub use open::{FILE, FileFactory, HOST_DEVICE};
pub use options::{AioOption, FileOptions, Locking};
pub use temporary::temporary;

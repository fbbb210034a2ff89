//! The `file` and `host_device` drivers: files and block devices of the host.
//!
//! | file | concern |
//! |---|---|
//! | `options` | option struct, file name prefixes |
//! | `open` | the two factories: opening, accepted file types, read-only fallback |
//! | `handle` | an open descriptor and its properties |
//! | `locks` | file locks against other processes |
//! | `align` | the alignment that `O_DIRECT` requires |
//! | `driver` | [`FileDriver`]: requests |
//! | `durable` | flushes, and the record of failed flushes |
//! | `zero` | zeroing and discarding; records which operations the host does not support |
//! | `extents` | data and holes |
//! | `resize`, `create` | size, preallocation, new files |
//! | `created` | identity of a new file, for its removal |
//! | `temporary` | temporary files without a name |
//! | `copy` | copy offload |
//! | `reopen` | replacing the descriptor of a node |
//!
//! Most reads and writes inside the file are not executed by the driver: `map` of [`FileDriver`] returns the same
//! offset in the host file, and `oxblk_core` submits the operation. The driver executes all other requests: reads and
//! writes on the slow path, growth, zero writes, discards, status, flushes.

mod align;
mod copy;
mod create;
mod created;
mod driver;
mod durable;
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

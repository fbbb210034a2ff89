//! [`Aio`]: the mechanism that executes the reads and writes of a file.

/// The mechanism that executes the reads and writes of a file (QEMU's `aio=`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// io_uring. On an I/O thread without io_uring: the same as [`Threads`](Aio::Threads).
    #[default]
    IoUring,
    /// Linux AIO, for files opened with `O_DIRECT`. If the kernel refuses Linux AIO: the same as
    /// [`Threads`](Aio::Threads).
    Native,
    /// Blocking calls on worker threads.
    Threads,
}

impl Aio {
    /// The mode with this QEMU name: `io_uring`, `native` or `threads`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "io_uring" => Some(Self::IoUring),
            "native" => Some(Self::Native),
            "threads" => Some(Self::Threads),
            _ => None,
        }
    }
}

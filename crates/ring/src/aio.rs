//! [`Aio`]: how the reads and writes of a file are carried out.

/// How a file's reads and writes are carried out (QEMU's `aio=`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// io_uring; on an I/O thread without one it means [`Threads`](Aio::Threads).
    #[default]
    IoUring,
    /// Linux AIO. For files opened with `O_DIRECT`.
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

//! The io_uring of an I/O thread.
//!
//! A file gets an index in the table of registered files when the ring first uses the file. Buffers from the arena of the
//! thread are registered memory. If the submission queue is full, entries wait in a backlog, in order.
//!
//! One multishot poll watches the bell (an eventfd), so that a wake-up needs no additional system call on this
//! thread.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::slots::{Key, Op, Payload, Slot};
use super::{Target, Wait};
use crate::buf::{Arena, install_arena};
use crate::file::{File, WeakFile};
use crate::runtime::shared::Shared;
use crate::runtime::{Config, real_now};

/// `user_data` of the bell. Generations have 31 bits, so no key has this value, or the value of `CANCEL` or `TIMER`.
const BELL: u64 = u64::MAX;
/// `user_data` of cancellations.
const CANCEL: u64 = u64::MAX - 1;
/// `user_data` of timers.
const TIMER: u64 = u64::MAX - 2;
/// Maximum size of the table of registered files.
const FILES: u32 = 1024;
/// Maximum number of bytes that the kernel transfers in one operation.
const MAX_TRANSFER: usize = 0x7fff_f000;

/// Files registered with the ring, by their dense id.
struct FileTable {
    capacity: u32,
    registered: Vec<Option<WeakFile>>,
    /// Ids that are unregistered after all queued entries have been submitted.
    leaving: Vec<(u32, Arc<dyn Any + Send + Sync>)>,
}

pub(super) struct Uring {
    ring: IoUring,
    backlog: VecDeque<squeue::Entry>,
    files: FileTable,
    /// The arena, which is registered with the ring as buffer 0. `None`: the ring has no registered buffer.
    arena: Option<Arc<Arena>>,
    bell: RawFd,
    index: usize,
    /// Deadlines of the armed timers, the earliest last. Timers are armed in descending order and fire in ascending
    /// order.
    armed: Vec<Duration>,
    /// The kernel reads the time of a timer from this field when the entry of the timer is submitted. If the submission
    /// is delayed, a timer that is armed later may have overwritten the field with an earlier time. The first timer
    /// then fires early, which is harmless.
    timespec: Box<types::Timespec>,
    /// The kernel refuses `io_uring_enter`, and the error has been logged.
    refused: bool,
}

impl Uring {
    pub(super) fn new(config: &Config, shared: &Arc<Shared>) -> io::Result<Uring> {
        let ring = build(config.entries)?;
        let capacity = file_capacity();
        let capacity = if capacity > 0 && ring.submitter().register_files_sparse(capacity).is_ok() {
            capacity
        } else {
            0
        };
        let arena = if config.registered_buffers > 0 {
            register_arena(&ring, config.registered_buffers)
        } else {
            None
        };
        let mut uring = Uring {
            ring,
            refused: false,
            backlog: VecDeque::new(),
            files: FileTable { capacity, registered: Vec::new(), leaving: Vec::new() },
            arena,
            bell: shared.bell(),
            index: shared.index(),
            armed: Vec::new(),
            timespec: Box::default(),
        };
        uring.watch_bell();
        uring.enter()?;
        Ok(uring)
    }

    /// Submits the first entry. Some systems allow the creation of a ring, but refuse `io_uring_enter`. Such a ring
    /// is not used.
    fn enter(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                outcome => return outcome.map(drop),
            }
        }
    }

    fn watch_bell(&mut self) {
        let poll =
            opcode::PollAdd::new(types::Fd(self.bell), u32::from(libc::POLLIN.cast_unsigned()))
                .multi(true);
        self.push(poll.build().user_data(BELL));
    }

    /// The index of a file in the table of the ring. Registers the file if the ring has not registered it yet. `None` if
    /// the table has no such index or the kernel refuses the registration.
    pub(super) fn fixed(&mut self, file: &File) -> Option<u32> {
        let id = file.id();
        if self.is_registered(id) {
            return Some(id);
        }
        if id >= self.files.capacity {
            return None;
        }
        self.ring.submitter().register_files_update(id, &[file.raw_fd()]).ok()?;
        if self.files.registered.len() <= id as usize {
            self.files.registered.resize_with(id as usize + 1, || None);
        }
        *self.files.registered.get_mut(id as usize)? = Some(file.downgrade());
        file.note_ring(self.index);
        Some(id)
    }

    fn is_registered(&self, id: u32) -> bool {
        matches!(self.files.registered.get(id as usize), Some(Some(_)))
    }

    /// The file at an index of the table; `None` if all its handles are dropped.
    pub(super) fn file(&self, id: u32) -> Option<File> {
        self.files.registered.get(id as usize)?.as_ref()?.upgrade()
    }

    /// Removes a file from the table after the queued entries have been submitted, because they may still refer to the
    /// file.
    pub(super) fn unregister(&mut self, id: u32, keep: Arc<dyn Any + Send + Sync>) {
        if self.is_registered(id) {
            self.files.leaving.push((id, keep));
        }
    }

    fn forget_files(&mut self) {
        if self.files.leaving.is_empty()
            || !self.backlog.is_empty()
            || !self.ring.submission().is_empty()
        {
            return;
        }
        for (id, keep) in self.files.leaving.drain(..) {
            let _ = self.ring.submitter().register_files_update(id, &[-1]);
            if let Some(place) = self.files.registered.get_mut(id as usize) {
                *place = None;
            }
            drop(keep);
        }
    }

    /// Queues an operation. The slot owns all memory to which the entry points.
    pub(super) fn start(&mut self, key: Key, slot: &mut Slot) {
        let entry = build_entry(slot, self.arena.as_deref());
        self.push(entry.user_data(key.to_bits()));
    }

    pub(super) fn cancel(&mut self, key: Key) {
        self.push(opcode::AsyncCancel::new(key.to_bits()).build().user_data(CANCEL));
    }

    fn push(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() || self.ring.submission().is_full() {
            self.flush_backlog();
            if !self.backlog.is_empty() || (self.ring.submission().is_full() && !self.submit()) {
                self.backlog.push_back(entry);
                return;
            }
        }
        // SAFETY: the operation's slot owns all memory that the entry points to until the completion is harvested,
        // and the slot or the table keeps the descriptor open.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    fn flush_backlog(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.backlog.pop_front();
            } else if !self.submit() {
                return;
            }
        }
    }

    /// Submits the queue without waiting. Returns false if the queue is still full.
    fn submit(&mut self) -> bool {
        let _ = self.ring.submit();
        !self.ring.submission().is_full()
    }

    /// Ensures that a completion arrives at `deadline`. An operation is needed only if `deadline` is earlier than all
    /// armed timers. A timer is never cancelled; an obsolete timer wakes the thread once.
    fn arm_timer(&mut self, deadline: Duration) {
        if self.armed.last().is_some_and(|&armed| armed <= deadline) {
            return;
        }
        self.armed.push(deadline);
        *self.timespec = types::Timespec::from(deadline.saturating_sub(real_now()));
        let timer = opcode::Timeout::new(&raw const *self.timespec).build().user_data(TIMER);
        self.push(timer);
    }

    /// Submits the queued entries, waits for `least` completions (at least one) if `wait` allows it, and harvests the
    /// completions.
    ///
    /// While the thread waits for more than one completion, neither the bell nor a timer wakes it. So `least` may be
    /// greater than 1 only if this number of operations completes without any action of this thread, other threads or
    /// peers. `least` is a fraction of the number of such operations ([`Slots::soon`](super::slots::Slots)). Such
    /// operations are transfers on tmpfs, which need only kernel workers. When the thread waits, the kernel has
    /// accepted all of them, because the thread does not wait with a backlog, and the kernel does not wait if it
    /// accepts fewer entries than are queued. Each operation posts a completion, also on an error (the ring has
    /// neither linked entries nor entries without completions). Completions that are posted and not yet harvested are
    /// included in the number.
    pub(super) fn turn(&mut self, wait: Wait, least: usize, done: &mut Vec<(Key, i32)>) {
        self.flush_backlog();
        if let Wait::Until(deadline) = wait {
            self.arm_timer(deadline);
        }
        let queue = self.ring.submission();
        let idle = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow();
        drop(queue);
        let outcome = match wait {
            Wait::No if idle => Ok(0),
            Wait::Forever | Wait::Until(_) if self.backlog.is_empty() => {
                self.ring.submit_and_wait(least.max(1))
            }
            _ => self.ring.submit(),
        };
        match outcome {
            Ok(_) => self.refused = false,
            Err(error) if is_passing(&error) => {}
            Err(error) => self.report_refusal(&error),
        }
        self.forget_files();
        self.harvest(done);
    }

    /// Handles an error of `io_uring_enter` on a ring that worked before. Entries cannot be removed from the ring, so
    /// the thread tries again. A pause before the next attempt avoids a busy loop.
    fn report_refusal(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.refused, true) {
            tracing::error!("io_uring_enter: {error}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }

    fn harvest(&mut self, done: &mut Vec<(Key, i32)>) {
        let mut rearm = false;
        for entry in self.ring.completion() {
            match entry.user_data() {
                BELL => rearm |= !cqueue::more(entry.flags()),
                CANCEL => {}
                TIMER => drop(self.armed.pop()),
                bits => done.push((Key::from_bits(bits), entry.result())),
            }
        }
        if rearm {
            self.watch_bell();
        }
    }
}

/// The kernel destroys a ring some time after the close of its descriptor, and then closes the registered files.
/// Until then, a file system cannot be unmounted, and a deleted file occupies space. Therefore `drop` unregisters the
/// files, so that they are closed when it returns.
impl Drop for Uring {
    fn drop(&mut self) {
        let _ = self.ring.submitter().unregister_files();
    }
}

/// Whether the error is temporary: the call was interrupted, the kernel wants completions harvested first, or it has
/// no memory at the moment. The next turn tries again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

/// Creates a ring with the best flags that the kernel supports.
fn build(entries: u32) -> io::Result<IoUring> {
    let entries = entries.clamp(8, 4096);
    let mut builder = IoUring::builder();
    builder.setup_clamp().setup_cqsize(entries.saturating_mul(4)).dontfork();
    let best = builder
        .clone()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_defer_taskrun()
        .build(entries);
    let ring = match best {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            match builder
                .clone()
                .setup_submit_all()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .build(entries)
            {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    builder.build(entries)?
                }
                other => other?,
            }
        }
        other => other?,
    };
    let params = ring.params();
    if params.is_feature_nodrop() && params.is_feature_ext_arg() && params.is_feature_fast_poll() {
        Ok(ring)
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old"))
    }
}

/// The size of the file table: [`FILES`], or the limit on open files if this limit is lower. The kernel refuses a larger
/// table.
fn file_capacity() -> u32 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the structure.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return 0;
    }
    u32::try_from(limit.rlim_cur).map_or(FILES, |n| n.min(FILES))
}

/// Installs an arena and registers it with the ring. Registered memory is an optimisation: if the kernel refuses the
/// registration (a low `RLIMIT_MEMLOCK`), the thread uses the arena as ordinary memory, and this returns `None`.
fn register_arena(ring: &IoUring, bytes: usize) -> Option<Arc<Arena>> {
    let arena = install_arena(bytes).ok()?;
    // SAFETY: the arena outlives the ring: both are fields of `Uring`, and the arena is dropped after the ring.
    match unsafe { ring.submitter().register_buffers(&[arena.as_iovec()]) } {
        Ok(()) => Some(arena),
        Err(_) => None,
    }
}

fn transfer_len(len: usize) -> u32 {
    u32::try_from(len.min(MAX_TRANSFER)).unwrap_or(0)
}

/// Builds the entry of an operation. The entry refers to a registered file by its index, with a flag.
fn build_entry(slot: &mut Slot, arena: Option<&Arena>) -> squeue::Entry {
    let fd = match &slot.target {
        Some(Target::Fixed(index)) => types::Fd(index.cast_signed()),
        Some(target) => types::Fd(target.fd()),
        None => types::Fd(-1),
    };
    let entry = match slot.op {
        Op::Read { offset } => read_entry(slot, fd, offset, arena),
        Op::Write { offset, fua } => write_entry(slot, fd, offset, fua, arena),
        Op::Sync { data_only } => {
            let flags =
                if data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
            opcode::Fsync::new(fd).flags(flags).build()
        }
        Op::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
        }
        Op::Recv { socket: false } => read_entry(slot, fd, u64::MAX, None),
        Op::Send { socket: false } => write_entry(slot, fd, u64::MAX, false, None),
        Op::Recv { socket: true } => match &mut slot.payload {
            Payload::Read(buf) => {
                opcode::Recv::new(fd, buf.as_mut_ptr(), transfer_len(buf.len())).build()
            }
            _ => opcode::Nop::new().build(),
        },
        Op::Send { socket: true } => {
            slot.prepare_vectors();
            opcode::SendMsg::new(fd, &raw const slot.message)
                .flags(libc::MSG_NOSIGNAL.cast_unsigned())
                .build()
        }
        Op::Poll { events } => opcode::PollAdd::new(fd, u32::from(events.cast_unsigned())).build(),
        Op::Truncate { .. } | Op::Call => unreachable!("blocking calls go to a worker"),
    };
    match slot.target {
        Some(Target::Fixed(_)) => entry.flags(squeue::Flags::FIXED_FILE),
        _ => entry,
    }
}

fn read_entry(slot: &mut Slot, fd: types::Fd, offset: u64, arena: Option<&Arena>) -> squeue::Entry {
    if let Payload::Read(buf) = &mut slot.payload {
        let len = transfer_len(buf.len());
        if buf.is_in(arena) {
            return opcode::ReadFixed::new(fd, buf.as_mut_ptr(), len, 0).offset(offset).build();
        }
        return opcode::Read::new(fd, buf.as_mut_ptr(), len).offset(offset).build();
    }
    slot.prepare_vectors();
    let count = u32::try_from(slot.iovecs.len()).unwrap_or(0);
    opcode::Readv::new(fd, slot.iovecs.as_ptr(), count).offset(offset).build()
}

fn write_entry(
    slot: &mut Slot,
    fd: types::Fd,
    offset: u64,
    fua: bool,
    arena: Option<&Arena>,
) -> squeue::Entry {
    let flags = if fua { libc::RWF_DSYNC } else { 0 };
    if let Payload::Write(buf) = &slot.payload {
        let len = transfer_len(buf.len());
        if buf.is_in(arena) {
            return opcode::WriteFixed::new(fd, buf.as_ptr(), len, 0)
                .offset(offset)
                .rw_flags(flags)
                .build();
        }
        return opcode::Write::new(fd, buf.as_ptr(), len).offset(offset).rw_flags(flags).build();
    }
    slot.prepare_vectors();
    let count = u32::try_from(slot.iovecs.len()).unwrap_or(0);
    opcode::Writev::new(fd, slot.iovecs.as_ptr(), count).offset(offset).rw_flags(flags).build()
}

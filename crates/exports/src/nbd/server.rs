//! The server: listens, distributes connections over I/O threads, and can be stopped.
//!
//! A connection stays on one I/O thread: the thread that had the fewest connections when the client connected. The module
//! `admission` decides which clients may connect. A server can have several listeners. [`Server::stop`] ends listening
//! immediately, lets every connection finish the requests that it has received, and closes the connections that have not ended
//! after [`ServerOptions::grace`].

use super::account::Account;
use super::admission::{Handshake, Handshakes, Refusals, keep_alive, possible_connections};
use super::budget::Budget;
use super::connection::{End, transmit};
use super::flag::Flag;
use super::handshake::handshake;
use super::input::Input;
use futures_util::future::{Either, select};
use oxblk_core::Backend;
use oxblk_nbd::info::BlockSizes;
use oxblk_nbd::proto::TransmissionFlags;
use oxblk_nbd::{Catalog, ExportInfo, Session};
use oxblk_ring::{Event, IoThread, Listener, Stream, sleep, timeout};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// One export: a backend under a name.
#[derive(Clone, Debug)]
pub struct Export {
    /// Name of the export. Clients that send no name get the first export.
    pub name: String,
    /// Human-readable description.
    pub description: Option<String>,
    /// The exported backend. The server does not close the backend.
    pub backend: Backend,
    /// If true, writes are refused even if the backend is writable.
    pub read_only: bool,
}

/// Limits of a server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Maximum number of concurrent connections. If there are as many connections and none of them is in the handshake,
    /// further clients are refused. The default is computed from the limit on open files and the memory of the machine.
    pub max_connections: usize,
    /// Time limit for a handshake.
    pub handshake_timeout: Duration,
    /// When the server stops, connections that have not ended after this time are closed.
    pub grace: Duration,
    /// Memory limit for the requests of all connections together, in bytes. In addition, every connection may hold 256 KiB, and
    /// one connection at a time may hold a request of the largest size.
    pub memory: usize,
    /// If a client holds a part of [`Self::memory`], other connections wait for memory, and the client transfers too
    /// little for this time, its connection is closed. Too little means: less than 1 MiB, and less than the part that
    /// the client holds. The connection is closed after at most twice this time.
    pub stall_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            max_connections: possible_connections(),
            handshake_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(10),
            memory: 128 << 20,
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// An NBD server. Clones refer to the same server.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    exports: Vec<Export>,
    options: ServerOptions,
    threads: Vec<Worker>,
    budget: Arc<Budget>,
    connections: AtomicUsize,
    handshakes: Arc<Handshakes>,
    refusals: Refusals,
    /// Wakes tasks when a connection has ended.
    left: Event,
    /// Set when connections must finish their requests and end.
    stop: Flag,
    /// Set when connections must end immediately.
    abort: Flag,
}

struct Worker {
    thread: IoThread,
    connections: AtomicUsize,
}

impl Server {
    /// A server with these exports. The connections run on `threads`, which must not be empty.
    ///
    /// # Errors
    /// If there is no thread or no export.
    pub fn new(
        exports: Vec<Export>,
        threads: Vec<IoThread>,
        options: ServerOptions,
    ) -> io::Result<Server> {
        if exports.is_empty() || threads.is_empty() {
            let message = "an NBD server needs an export and an I/O thread";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let worker = |thread| Worker { thread, connections: AtomicUsize::new(0) };
        Ok(Server(Arc::new(Inner {
            exports,
            budget: Budget::new(options.memory),
            options,
            threads: threads.into_iter().map(worker).collect(),
            connections: AtomicUsize::new(0),
            handshakes: Arc::default(),
            refusals: Refusals::default(),
            left: Event::new(),
            stop: Flag::default(),
            abort: Flag::default(),
        })))
    }

    /// The number of connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::SeqCst)
    }

    /// Accepts connections until the server stops. The future must run on an I/O thread.
    ///
    /// # Errors
    /// If the listening socket fails permanently.
    pub async fn serve(&self, listener: Listener) -> io::Result<()> {
        let work = pin!(self.accept_all(&listener));
        match select(work, pin!(self.0.stop.wait())).await {
            Either::Left((failed, _)) => failed,
            Either::Right(_) => Ok(()),
        }
    }

    async fn accept_all(&self, listener: &Listener) -> io::Result<()> {
        let mut spare = spare_descriptor();
        loop {
            match listener.accept().await {
                Ok(socket) => self.admit(socket).await,
                Err(error) if is_out_of_descriptors(&error) => {
                    // Without a free descriptor, the client would wait in the queue. The spare descriptor is closed, so that
                    // the client can be accepted and refused.
                    let freed = spare.take().is_some();
                    // The client may have closed its connection before this `accept`. Without the time limit, a client that
                    // connects later would be refused instead.
                    let waiting = timeout(REFUSE_WITHIN, listener.accept());
                    if freed && let Ok(Ok(socket)) = waiting.await {
                        drop(socket);
                        self.0.refusals.add(format_args!("{error}"));
                    } else {
                        tracing::warn!(%error, "cannot accept an NBD connection");
                        sleep(Duration::from_millis(50)).await;
                    }
                    spare = spare_descriptor();
                }
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "cannot accept an NBD connection");
                    sleep(Duration::from_millis(50)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Serves a client, or refuses the client.
    async fn admit(&self, socket: OwnedFd) {
        let inner = &self.0;
        let most = inner.options.max_connections;
        loop {
            match ConnectionPermit::take(inner) {
                Ok(permit) => return begin(permit, socket),
                // Handshakes in progress end by themselves.
                Err(NoPermit::Stopping) => return,
                Err(NoPermit::NoThread) => {
                    return tracing::warn!(
                        "refusing an NBD client: all I/O threads of the server have ended"
                    );
                }
                Err(NoPermit::Full) => {}
            }
            if !inner.handshakes.cancel_oldest() {
                return inner.refusals.add(format_args!("{most} are open, which is the limit"));
            }
            inner.fewer_than(most).await;
        }
    }

    /// Stops the server: the server accepts no further connections, and the existing connections finish their requests
    /// and end. The stop begins immediately. The future completes when all connections have ended. The future can be
    /// awaited on every executor.
    pub fn stop(&self) -> impl Future<Output = ()> + Send + use<> {
        let inner = Arc::clone(&self.0);
        inner.stop.set();
        async move {
            // The remaining part of the stop needs a timer, so it runs on an I/O thread. A thread that has ended or is closing
            // runs no further tasks, and closes its connections itself. In this case, the next thread is used.
            for worker in inner.threads.iter().filter(|worker| !worker.thread.is_closing()) {
                let inner = Arc::clone(&inner);
                if worker.thread.spawn(move || async move { inner.stop().await }).await.is_ok() {
                    return;
                }
            }
        }
    }
}

/// Starts the connection of a socket on the I/O thread of the permit.
fn begin(permit: ConnectionPermit, socket: OwnedFd) {
    let Some(worker) = permit.inner.threads.get(permit.worker) else { return };
    let thread = worker.thread.clone();
    drop(thread.spawn(move || connection(permit, socket)));
}

/// Time limit of the `accept` for a client that is refused because no descriptor is free.
const REFUSE_WITHIN: Duration = Duration::from_millis(50);

/// A descriptor that is closed when no other descriptor is free.
fn spare_descriptor() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Whether the process or the system has no free descriptor.
fn is_out_of_descriptors(error: &io::Error) -> bool {
    let errno = rustix::io::Errno::from_io_error(error);
    matches!(errno, Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE))
}

/// Whether an error of `accept` is temporary or concerns only one connection.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    // EPERM: a firewall refused the connection.
    let passing = [
        Errno::PROTO,
        Errno::CONNABORTED,
        Errno::NOBUFS,
        Errno::NOMEM,
        Errno::PERM,
        Errno::INTR,
        Errno::AGAIN,
    ];
    Errno::from_io_error(error).is_some_and(|errno| passing.contains(&errno))
}

impl Inner {
    async fn stop(&self) {
        self.stop.set();
        if timeout(self.options.grace, self.fewer_than(1)).await.is_err() {
            tracing::warn!("closing NBD connections that have not ended within the grace period");
            self.abort.set();
            self.fewer_than(1).await;
        }
    }

    /// Waits until the number of connections is below `limit`.
    async fn fewer_than(&self, limit: usize) {
        let fewer = || self.connections.load(Ordering::SeqCst) < limit;
        while !fewer() {
            let listener = self.left.listen();
            if !fewer() {
                listener.await;
            }
        }
    }

    /// The descriptions of the exports for a new client. The catalog is made for each client, because sizes can change.
    fn catalog(&self) -> Arc<Catalog> {
        Arc::new(Catalog::new(self.exports.iter().map(describe).collect()))
    }
}

fn describe(export: &Export) -> ExportInfo {
    let mut flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_CACHE
        | TransmissionFlags::CAN_MULTI_CONN;
    if export.read_only || export.backend.is_read_only() {
        flags |= TransmissionFlags::READ_ONLY;
    } else {
        flags |= TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO;
    }
    ExportInfo {
        name: export.name.clone(),
        description: export.description.clone(),
        size: export.backend.size(),
        flags,
        sizes: block_sizes(&export.backend),
    }
}

/// The block sizes that are reported to clients. The sizes are only recommendations: the backend also accepts smaller and
/// unaligned requests.
fn block_sizes(backend: &Backend) -> BlockSizes {
    let mut sizes = BlockSizes::default();
    if let Ok(node) = backend.node() {
        let limits = node.limits();
        sizes.minimum = limits.request_alignment.clamp(1, 65536);
        let optimal = u32::try_from(limits.opt_transfer).unwrap_or(0);
        if optimal.is_power_of_two() && optimal <= sizes.maximum {
            sizes.preferred = sizes.preferred.max(optimal);
        }
        sizes.preferred = sizes.preferred.max(sizes.minimum);
    }
    sizes
}

/// The permit for one connection. At most `max_connections` permits exist. A permit is returned when it is dropped, also during
/// a panic.
struct ConnectionPermit {
    inner: Arc<Inner>,
    worker: usize,
    /// The handshake is recorded together with the permit, and not later on the connection's thread, so that every connection
    /// without a session can be cancelled.
    handshake: Handshake,
}

/// Why a client gets no permit.
enum NoPermit {
    /// All I/O threads have ended or are closing.
    NoThread,
    /// There are as many connections as the limit allows.
    Full,
    /// The server is stopping.
    Stopping,
}

impl ConnectionPermit {
    /// Takes a permit on the running I/O thread that has the fewest connections. A thread that is closing has few connections,
    /// but runs no new ones.
    fn take(inner: &Arc<Inner>) -> Result<ConnectionPermit, NoPermit> {
        let load = |(_, worker): &(usize, &Worker)| worker.connections.load(Ordering::SeqCst);
        let running =
            inner.threads.iter().enumerate().filter(|(_, worker)| !worker.thread.is_closing());
        let (worker, chosen) = running.min_by_key(load).ok_or(NoPermit::NoThread)?;
        let most = inner.options.max_connections;
        let one_more = |open: usize| open.checked_add(1).filter(|after| *after <= most);
        let taken = inner.connections.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        if taken.is_err() {
            let is_stopping = inner.stop.is_set();
            return Err(if is_stopping { NoPermit::Stopping } else { NoPermit::Full });
        }
        chosen.connections.fetch_add(1, Ordering::SeqCst);
        let handshake = inner.handshakes.enter();
        let permit = ConnectionPermit { inner: Arc::clone(inner), worker, handshake };
        // `stop` sets the flag before it waits for the number of connections. So either this load sees the flag, or `stop`
        // waits for this connection.
        if inner.stop.is_set() { Err(NoPermit::Stopping) } else { Ok(permit) }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        if let Some(worker) = self.inner.threads.get(self.worker) {
            worker.connections.fetch_sub(1, Ordering::SeqCst);
        }
        self.inner.connections.fetch_sub(1, Ordering::SeqCst);
        self.inner.left.notify(usize::MAX);
    }
}

/// Runs one connection from the handshake to its end.
async fn connection(permit: ConnectionPermit, socket: OwnedFd) {
    let inner = &permit.inner;
    let stream = match Stream::from_fd(socket) {
        Ok(stream) => stream,
        Err(error) => return tracing::warn!(%error, "cannot use an accepted socket"),
    };
    let work = pin!(async {
        let account = Account::new(Arc::clone(&inner.budget), inner.options.stall_timeout);
        keep_alive(stream.as_fd());
        match greet(&permit, &stream, Rc::clone(&account)).await {
            Err(error) => tracing::debug!(%error, "NBD handshake failed"),
            Ok((session, input)) => {
                let Some(export) = inner.exports.get(session.export) else { return };
                let backend = export.backend.clone();
                let stop = inner.stop.wait();
                let end = transmit(&stream, backend, session, input, &account, stop).await;
                report(&end);
            }
        }
    });
    select(work, pin!(inner.abort.wait())).await;
}

/// Runs the handshake with a time limit. The handshake also ends if the server stops, or if the server cancels the
/// handshake to admit another client.
async fn greet(
    permit: &ConnectionPermit,
    stream: &Stream,
    account: Rc<Account>,
) -> io::Result<(Session, Input)> {
    let ConnectionPermit { inner, handshake: entered, .. } = permit;
    let may_begin = || entered.finish();
    let work = pin!(handshake(stream, Input::new(account), inner.catalog(), may_begin));
    let (stop, cancelled) = (pin!(inner.stop.wait()), pin!(entered.cancelled()));
    let ended = select(stop, cancelled);
    match timeout(inner.options.handshake_timeout, select(work, ended)).await {
        Ok(Either::Left((result, _))) => result,
        Ok(Either::Right((Either::Left(_), _))) => Err(io::Error::other("the server is stopping")),
        Ok(Either::Right((Either::Right(_), _))) => {
            Err(io::Error::other("cancelled to admit another client"))
        }
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn report(end: &End) {
    match end {
        End::Disconnected => tracing::debug!("NBD client disconnected"),
        End::Stopped => tracing::debug!("NBD connection closed because the server is stopping"),
        End::Stalled => {
            tracing::warn!(
                "closing a stalled NBD connection that keeps memory which other connections wait for"
            );
        }
        End::Cut => tracing::debug!("NBD client hung up inside a request"),
        End::Malformed(error) => tracing::debug!(%error, "NBD client violated the protocol"),
        End::Failed(error) => tracing::debug!(%error, "NBD connection failed"),
    }
}

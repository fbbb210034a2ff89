//! Stream sockets, listening sockets, and pipes or terminals used as streams.

use std::fmt;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use crate::buf::{IoBuf, IoBufMut, IoVec};
use crate::file::count;
use crate::reactor::{Op, Payload, start_fd};
use crate::runtime::offload::blocking;

/// The address on which a socket listens, or to which it connects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix socket's path.
    Unix(PathBuf),
    /// A TCP host and port.
    Tcp {
        /// Name or IP address of the host.
        host: String,
        /// The port. With port 0, the kernel chooses the port of a listening socket.
        port: u16,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// A listening socket. All I/O threads may use it concurrently.
pub struct Listener {
    fd: Arc<OwnedFd>,
    address: Address,
}

impl Listener {
    /// Binds a socket to the address and listens on it. The call blocks while it resolves the name of a TCP host.
    ///
    /// # Errors
    /// The system's error, for example `EADDRINUSE`.
    pub fn bind(address: &Address) -> io::Result<Listener> {
        let fd: OwnedFd = match address {
            Address::Unix(path) => UnixListener::bind(path)?.into(),
            Address::Tcp { host, port } => TcpListener::bind((host.as_str(), *port))?.into(),
        };
        Listener::from_fd(fd)
    }

    /// Takes over a listening socket.
    ///
    /// # Errors
    /// The error of the system, for example if the descriptor is not a socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Listener> {
        let (address, fd) = local_address(fd)?;
        Ok(Listener { fd: Arc::new(fd), address })
    }

    /// Waits for a connection. The returned descriptor may be used on any thread.
    ///
    /// # Errors
    /// The errors of `accept(2)`. Connections that the peer has already closed are skipped.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let (result, _) =
                start_fd(&self.fd, Op::Poll { events: libc::POLLIN }, Payload::None).await;
            count(result)?;
            // SAFETY: null pointers: the call does not return the peer's address.
            let fd = unsafe {
                libc::accept4(
                    self.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_CLOEXEC,
                )
            };
            if fd >= 0 {
                // SAFETY: a new descriptor that is ours.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            let error = io::Error::last_os_error();
            if !matches!(
                error.raw_os_error(),
                Some(libc::EAGAIN | libc::EINTR | libc::ECONNABORTED)
            ) {
                return Err(error);
            }
        }
    }

    /// The address on which the socket listens, with the port that the kernel has chosen.
    pub fn local_address(&self) -> Address {
        self.address.clone()
    }
}

/// Reads the address of the socket. Makes the descriptor non-blocking, because another thread may accept the
/// connection for which this thread was woken.
fn local_address(fd: OwnedFd) -> io::Result<(Address, OwnedFd)> {
    let tcp = TcpListener::from(fd);
    tcp.set_nonblocking(true)?;
    if let Ok(address) = tcp.local_addr() {
        let address = Address::Tcp { host: address.ip().to_string(), port: address.port() };
        return Ok((address, tcp.into()));
    }
    let unix = UnixListener::from(OwnedFd::from(tcp));
    let path = unix.local_addr()?.as_pathname().map(PathBuf::from).unwrap_or_default();
    Ok((Address::Unix(path), unix.into()))
}

/// A connected socket, or a pipe or terminal. Only one I/O thread may use a stream at a time. On this thread, one task
/// may receive while another task sends.
pub struct Stream {
    fd: Arc<OwnedFd>,
    socket: bool,
}

impl Stream {
    /// Takes over a descriptor. Turns off Nagle's algorithm if the descriptor is a TCP socket.
    ///
    /// # Errors
    /// If the descriptor cannot be examined (`fstat`).
    pub fn from_fd(fd: OwnedFd) -> io::Result<Stream> {
        // SAFETY: all zero is a valid `stat` structure.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure.
        if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = stat.st_mode & libc::S_IFMT == libc::S_IFSOCK;
        if socket {
            no_delay(&fd);
        }
        Ok(Stream { fd: Arc::new(fd), socket })
    }

    /// Connects to an address.
    ///
    /// # Errors
    /// The error of the system. If the host has several addresses: the error of the last address that was tried.
    pub async fn connect(address: &Address) -> io::Result<Stream> {
        let address = address.clone();
        let fd = blocking(move || -> io::Result<OwnedFd> {
            Ok(match address {
                Address::Unix(path) => UnixStream::connect(path)?.into(),
                Address::Tcp { host, port } => TcpStream::connect((host.as_str(), port))?.into(),
            })
        })
        .await?;
        Stream::from_fd(fd)
    }

    /// Two connected Unix sockets.
    ///
    /// # Errors
    /// The system's error.
    pub fn pair() -> io::Result<(Stream, Stream)> {
        let (a, b) = UnixStream::pair()?;
        Ok((Stream::from_fd(a.into())?, Stream::from_fd(b.into())?))
    }

    /// Receives once; returns 0 at the end of the stream. Dropping the future cancels the receive. Data that the
    /// operation has already received is then lost.
    pub async fn recv(&self, mut buf: IoBufMut) -> (io::Result<usize>, IoBufMut) {
        loop {
            let op = Op::Recv { socket: self.socket };
            let (result, payload) = start_fd(&self.fd, op, Payload::Read(buf)).await;
            buf = match payload {
                Payload::Read(buf) => buf,
                other => unreachable!("a read completed with {other:?}"),
            };
            match result.saturating_neg() {
                libc::EINTR => {}
                libc::EAGAIN => {
                    if let Err(error) = self.ready(libc::POLLIN).await {
                        return (Err(error), buf);
                    }
                }
                _ => return (count(result), buf),
            }
        }
    }

    /// Receives until the buffer is full.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the stream ends before the buffer is full; otherwise the error of the
    /// stream.
    pub async fn recv_exact(&self, buf: IoBufMut) -> io::Result<IoBufMut> {
        let len = buf.len();
        let (mut front, mut rest, mut filled) = (None::<IoBufMut>, buf, 0usize);
        while filled < len {
            let (result, mut buf) = self.recv(rest).await;
            let n = result?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += n;
            if filled == len && front.is_none() {
                return Ok(buf);
            }
            let piece = buf.split_to(n);
            rest = buf;
            front = Some(match front {
                None => piece,
                Some(mut front) => match front.unsplit(piece) {
                    Ok(()) => front,
                    Err(_) => unreachable!("pieces of one buffer follow each other"),
                },
            });
        }
        Ok(front.unwrap_or_default())
    }

    /// Sends everything. If the future is dropped, a part may have been sent.
    ///
    /// # Errors
    /// The error of the stream. On a socket, `EPIPE` raises no signal.
    pub async fn send_all(&self, mut bufs: IoVec) -> io::Result<()> {
        while !bufs.is_empty() {
            self.send(&mut bufs).await?;
        }
        Ok(())
    }

    /// Sends as many bytes as one operation can (at least one), and removes them from the list. Returns the number of
    /// bytes: 0 if the list contains no bytes. If the future is dropped, a part may have been sent.
    ///
    /// # Errors
    /// The errors of [`Stream::send_all`].
    pub async fn send(&self, bufs: &mut IoVec) -> io::Result<usize> {
        bufs.retain(|buf| !buf.is_empty());
        while !bufs.is_empty() {
            let op = Op::Send { socket: self.socket };
            let (result, _) = start_fd(&self.fd, op, Payload::WriteV(bufs.clone())).await;
            match count(result) {
                Ok(n) => {
                    advance(bufs, n);
                    return Ok(n);
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => self.ready(libc::POLLOUT).await?,
                    _ => return Err(error),
                },
            }
        }
        Ok(0)
    }

    /// Waits until a non-blocking descriptor is ready.
    async fn ready(&self, events: i16) -> io::Result<()> {
        let (result, _) = start_fd(&self.fd, Op::Poll { events }, Payload::None).await;
        count(result).map(drop)
    }

    /// Shuts down both directions of a socket. The peer and pending receives get the end of the stream. A pipe or
    /// terminal is not changed.
    pub fn shutdown(&self) {
        // SAFETY: no memory involved.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// The descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Turns Nagle's algorithm off: a small message must not wait for the acknowledgement of an earlier message. The call
/// fails on Unix sockets, which have no such option; the error is ignored.
fn no_delay(fd: &OwnedFd) {
    let on: libc::c_int = 1;
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: the option's value is a local integer.
    unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NODELAY,
            (&raw const on).cast(),
            len,
        )
    };
}

/// Drops the first `n` bytes of a list of buffers.
pub(crate) fn advance(bufs: &mut IoVec, mut n: usize) {
    let mut whole = 0;
    for buf in bufs.iter_mut() {
        if n < buf.len() {
            drop(IoBuf::split_to(buf, n));
            break;
        }
        n -= buf.len();
        whole += 1;
    }
    bufs.drain(..whole);
}

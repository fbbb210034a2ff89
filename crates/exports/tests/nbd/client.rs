//! A test client that can also send invalid data, and a server to test with this client.

use crate::memory::Disk;
use oxblk_core::Backend;
use oxblk_exports::nbd::{Export, Server, ServerOptions};
use oxblk_nbd::option::{info_request, meta_context_request, put_option};
use oxblk_nbd::proto::{ClientFlags, CommandFlags, CommandKind, OptionKind, ReplyKind};
use oxblk_nbd::reply::ReplyHeader;
use oxblk_nbd::wire::{ChunkHeader, OptionReplyHeader, SimpleReply};
use oxblk_nbd::{ErrorCode, RawRequest};
use oxblk_ring::{Address, Config, IoThread, Listener};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The time limit of every wait in these tests.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) struct Fixture {
    pub(crate) disk: Arc<Disk>,
    pub(crate) server: Server,
    backend: Backend,
    thread: IoThread,
    dir: tempfile::TempDir,
    pub(crate) tcp_port: u16,
}

impl Fixture {
    /// A server with one writable disk of 64 MiB, exported as `disk`.
    pub(crate) fn new() -> Fixture {
        Fixture::with(false, ServerOptions::default())
    }

    pub(crate) fn with(read_only: bool, options: ServerOptions) -> Fixture {
        Fixture::on(&Config::default(), read_only, options)
    }

    /// Like [`Fixture::new`], with another configuration of the I/O threads.
    pub(crate) fn on(config: &Config, read_only: bool, options: ServerOptions) -> Fixture {
        let disk = Disk::new(64 << 20);
        let dir = tempfile::tempdir().unwrap();
        let start = |name| IoThread::start(name, config.clone()).unwrap();
        let backend = disk.backend(read_only);
        let export = Export {
            name: "disk".to_owned(),
            description: Some("a test disk".to_owned()),
            backend: backend.clone(),
            read_only,
        };
        let threads = vec![start("nbd-0"), start("nbd-1")];
        let server = Server::new(vec![export], threads, options).unwrap();
        let thread = start("accept");
        let unix = Listener::bind(&Address::Unix(dir.path().join("nbd.sock"))).unwrap();
        let tcp = Address::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
        let tcp = Listener::bind(&tcp).unwrap();
        let Address::Tcp { port: tcp_port, .. } = tcp.local_address() else { panic!() };
        for listener in [unix, tcp] {
            let server = server.clone();
            drop(thread.spawn(move || async move { server.serve(listener).await }));
        }
        Fixture { disk, server, backend, thread, dir, tcp_port }
    }

    /// A connected socket. The client has not sent or received any data.
    pub(crate) fn socket(&self) -> Box<dyn Socket> {
        let socket = UnixStream::connect(self.dir.path().join("nbd.sock")).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_write_timeout(Some(TIMEOUT)).unwrap();
        Box::new(socket)
    }

    pub(crate) fn tcp_socket(&self) -> Box<dyn Socket> {
        let socket = TcpStream::connect(("127.0.0.1", self.tcp_port)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        Box::new(socket)
    }

    /// A client that has received the greeting.
    pub(crate) fn greeted(&self) -> Client {
        Client::greet(self.socket())
    }

    /// A client in the transmission phase.
    pub(crate) fn client(&self, structured: bool) -> Client {
        let mut client = self.greeted();
        client.structured = structured;
        if structured {
            client.acked(OptionKind::STRUCTURED_REPLY, &[]);
            let context = meta_context_request("", &["base:allocation"]).unwrap();
            client.acked(OptionKind::SET_META_CONTEXT, &context);
        }
        client.acked(OptionKind::GO, &info_request("", &[]).unwrap());
        client
    }

    /// Begins the stop of the server.
    pub(crate) fn stop(&self) -> oxblk_ring::Remote<()> {
        let server = self.server.clone();
        self.thread.spawn(move || async move { server.stop().await })
    }

    /// Begins the close of the exported backend.
    pub(crate) fn close_export(&self) -> oxblk_ring::Remote<oxblk_core::Result<()>> {
        let backend = self.backend.clone();
        self.thread.spawn(move || async move { backend.close().await })
    }

    /// Waits until a condition holds.
    pub(crate) fn until(&self, what: &str, condition: impl Fn(&Fixture) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < TIMEOUT, "timed out waiting until {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.disk.release();
        let stopped = self.stop();
        if !std::thread::panicking() {
            stopped.wait().unwrap();
        }
    }
}

pub(crate) trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

/// The answer to a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Simple { cookie: u64, error: Option<ErrorCode> },
    Chunk { cookie: u64, done: bool, kind: oxblk_nbd::proto::ChunkKind, payload: Vec<u8> },
}

pub(crate) struct Client {
    pub(crate) socket: Box<dyn Socket>,
    pub(crate) structured: bool,
}

impl Client {
    pub(crate) fn greet(mut socket: Box<dyn Socket>) -> Client {
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x03");
        socket.write_all(&ClientFlags::all().bits().to_be_bytes()).unwrap();
        Client { socket, structured: false }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub(crate) fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has closed the connection and has not sent further data before.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.socket.read(&mut [0; 1]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    /// Sends an option and returns all replies up to the final one.
    pub(crate) fn option(&mut self, kind: OptionKind, payload: &[u8]) -> Vec<(ReplyKind, Vec<u8>)> {
        let mut out = Vec::new();
        put_option(&mut out, kind, payload).unwrap();
        self.send(&out);
        let mut replies = Vec::new();
        loop {
            let head = self.receive(OptionReplyHeader::SIZE);
            let head = OptionReplyHeader::read(&head).unwrap();
            assert_eq!(head.option.get(), kind.0);
            let reply = ReplyKind(head.kind.get());
            let payload = self.receive(head.length.get() as usize);
            replies.push((reply, payload));
            if reply == ReplyKind::ACK || reply.is_error() {
                return replies;
            }
        }
    }

    pub(crate) fn acked(&mut self, kind: OptionKind, payload: &[u8]) {
        let replies = self.option(kind, payload);
        assert_eq!(replies.last().unwrap().0, ReplyKind::ACK, "{kind:?}");
    }

    pub(crate) fn request(
        &mut self,
        kind: CommandKind,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) {
        self.request_as(1, kind, flags.bits(), offset, length);
    }

    pub(crate) fn request_as(
        &mut self,
        cookie: u64,
        kind: CommandKind,
        flags: u16,
        offset: u64,
        length: u32,
    ) {
        let raw = RawRequest { flags, kind, cookie, offset, length };
        self.send(&raw.to_bytes());
    }

    /// Receives a simple reply (without data) or a chunk with its payload.
    pub(crate) fn answer(&mut self) -> Answer {
        let mut head = self.receive(SimpleReply::SIZE);
        if ReplyHeader::parse(&head).unwrap().is_none() {
            head.extend(self.receive(ChunkHeader::SIZE - SimpleReply::SIZE));
        }
        match ReplyHeader::parse(&head).unwrap().unwrap().0 {
            ReplyHeader::Simple { cookie, error } => Answer::Simple { cookie, error },
            ReplyHeader::Chunk { cookie, done, kind, length } => {
                Answer::Chunk { cookie, done, kind, payload: self.receive(length as usize) }
            }
        }
    }

    /// Receives the reply to the last request and returns its error. The request must have a single reply without data.
    pub(crate) fn status(&mut self) -> Option<ErrorCode> {
        match self.answer() {
            Answer::Simple { error, .. } => error,
            Answer::Chunk { kind, payload, done, .. } => {
                assert!(done);
                kind.is_error()
                    .then(|| oxblk_nbd::reply::parse_error(kind, &payload).unwrap().error)
            }
        }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<ErrorCode> {
        let length = u32::try_from(data.len()).unwrap();
        self.request(CommandKind::WRITE, CommandFlags::empty(), offset, length);
        self.send(data);
        self.status()
    }

    /// Reads data. The connection must use simple replies.
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.request(CommandKind::READ, CommandFlags::empty(), offset, length);
        assert_eq!(self.answer(), Answer::Simple { cookie: 1, error: None });
        self.receive(length as usize)
    }
}

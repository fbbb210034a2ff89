//! The NBD server: exports over Unix and TCP sockets.
//!
//! | file | concern |
//! |---|---|
//! | `server` | listening, spreading connections over I/O threads, limits, stopping |
//! | `admission` | which clients are let in when places are scarce |
//! | `flag` | a flag that tasks wait for |
//! | `handshake` | drives [`oxblk_nbd::Negotiation`] over a socket |
//! | `connection` | the transmission phase of one connection |
//! | `input` | the receive buffer: requests and payloads out of few, large receives |
//! | `slots` | the requests in flight of one connection |
//! | `execute` | one request carried out on a backend |
//! | `outbox` | replies gathered so that one `sendmsg` sends all that are ready |
//! | `account` | the memory that one connection holds |
//! | `budget` | the memory that all connections together may hold |
//!
//! How a request travels, and why no step allocates: one receive brings many requests; each becomes
//! a future in a slot that is used again and again, and is polled at once, so that a read reaches
//! the engine's submission queue in the same turn in which it was received; completions of the turn
//! set bits, the connection's task is woken once, polls the futures behind the bits, and puts heads
//! and read buffers into one scatter list. So a turn of the I/O thread takes one system call for
//! all reads, the send and the next receive together.
//!
//! Invariants:
//! * a reply that is not yet sent counts against the connection's limits, so that a client that
//!   does not read its replies stops being read itself;
//! * whatever memory a client can make the server hold is counted before it is taken, and is bounded by
//!   [`ServerOptions::memory`] and the allowances of [`ServerOptions::max_connections`] connections;
//! * a request that was received whole runs to its end, also when the client is gone.

mod account;
mod admission;
mod budget;
mod connection;
mod execute;
mod flag;
mod handshake;
mod input;
mod outbox;
mod server;
mod slots;

pub use server::{Export, Server, ServerOptions};

/// Largest read or write, in bytes; every client may count on it ("Block size constraints").
pub const MAX_REQUEST: u32 = 32 << 20;

//! The NBD server: exports over Unix and TCP sockets.
//!
//! | file | concern |
//! |---|---|
//! | `server` | listening, distributing connections over I/O threads, limits, stopping |
//! | `admission` | which clients may connect when the server is full |
//! | `flag` | a flag that tasks wait for |
//! | `handshake` | runs [`oxblk_nbd::Negotiation`] over a socket |
//! | `connection` | the transmission phase of one connection |
//! | `input` | the receive buffer: requests and payloads out of few, large receives |
//! | `slots` | the requests in flight of one connection |
//! | `execute` | executes one request on a backend |
//! | `outbox` | collects replies so that one `sendmsg` sends all that are ready |
//! | `account` | the memory that one connection holds |
//! | `budget` | the memory that all connections together may hold |
//!
//! The path of a request, on which no step allocates: one receive returns many requests. Each request becomes a future in a
//! reused slot and is polled immediately, so that a read reaches the engine's submission queue in the turn in which it was
//! received. The completions of a turn set bits; the connection's task is woken once, polls the futures whose bits are set,
//! and puts reply heads and read buffers into one scatter list. So in one turn of the I/O thread, a single system call
//! submits all reads, the send and the next receive.
//!
//! Invariants:
//! * a reply that is not yet sent counts against the connection's limits. So the server stops receiving from a client that
//!   does not receive its replies;
//! * all memory that a client can make the server hold is counted before it is allocated, and is limited by
//!   [`ServerOptions::memory`] and the allowances of [`ServerOptions::max_connections`] connections;
//! * a completely received request runs to completion, even if the client is gone.

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

/// Largest read or write, in bytes; every client may rely on it ("Block size constraints").
pub const MAX_REQUEST: u32 = 32 << 20;

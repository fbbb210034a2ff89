//! The NBD server: exports over Unix and TCP sockets.
//!
//! | file | concern |
//! |---|---|
//! | `server` | listening, distributing connections over I/O threads, limits, stopping |
//! | `admission` | which clients may connect when the server is full |
//! | `flag` | a flag that tasks wait for |
//! | `handshake` | runs [`oxblk_nbd::Negotiation`] over a socket |
//! | `connection` | the transmission phase of one connection |
//! | `input` | the receive buffer: one receive can return many requests and payloads |
//! | `slots` | the requests in flight of one connection |
//! | `execute` | executes one request on a backend |
//! | `outbox` | collects replies so that one `sendmsg` sends all that are ready |
//! | `account` | the accounting of the memory of one connection |
//! | `budget` | the limit on the memory of all connections together |
//!
//! The path of a request: one receive can return many requests. Each request becomes a future in a slot and is polled
//! immediately. So a read is in the submission queue of io_uring before the I/O thread makes its next system call. When
//! requests complete, their wakers set bits in a bit map, and the task of the connection is woken once. The task polls
//! the futures whose bits are set, and puts reply headers and read buffers into one scatter list. So a single system
//! call submits all reads, the send and the next receive.
//!
//! Invariants:
//! * a request whose reply has not been sent counts against the connection's limits. So the server stops receiving from a
//!   client that does not receive its replies;
//! * the memory for the data of requests is accounted before it is used (see the module `account`). The limit is
//!   [`ServerOptions::memory`], plus the allowances of [`ServerOptions::max_connections`] connections, plus one
//!   overdraft of a little more than one largest request;
//! * a completely received request runs to completion, even if the client has closed the connection.

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

/// Maximum length of a read or write in bytes. Every client may use requests of this length (section "Block size
/// constraints" of the NBD specification).
pub const MAX_REQUEST: u32 = 32 << 20;

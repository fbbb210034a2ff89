//! The NBD protocol without I/O: the crate only encodes and decodes messages.
//!
//! Server and client share this crate. The crate contains only pure functions and state machines that convert between
//! bytes and typed values, so they can be unit-tested and fuzzed without a socket. Quoted section titles in the
//! documentation refer to `doc/proto.md` of the NBD project.
//!
//! * [`proto`]: magic numbers, flags, and the numbers of options, commands and chunks;
//! * [`wire`]: the fixed-size structures in their wire format (big-endian, unaligned);
//! * [`error`]: the error numbers of the protocol, and the ways in which a message can be malformed;
//! * [`option`]: payloads of option requests, parsed with every length checked against a limit;
//! * [`info`]: payloads of option replies;
//! * [`negotiation`]: the server side of the handshake as a state machine;
//! * [`request`]: transmission requests and the rules that decide whether one is valid;
//! * [`reply`]: simple replies and structured reply chunks;
//! * [`uri`]: `nbd://` and `nbd+unix://` addresses.
//!
//! Invariant: no length from a peer makes this crate allocate more than a small constant. Lengths are compared with
//! [`proto::MAX_STRING`] and [`negotiation::MAX_OPTION_PAYLOAD`] before they are used.

#![forbid(unsafe_code)]

pub mod error;
pub mod info;
pub mod negotiation;
pub mod option;
pub mod proto;
pub mod reply;
pub mod request;
pub mod uri;
pub mod wire;

pub use error::{ErrorCode, Malformed};
pub use negotiation::{Catalog, ExportInfo, Negotiation, Progress, Session};
pub use request::{Command, Limits, RawRequest, Request};
pub use uri::NbdUri;

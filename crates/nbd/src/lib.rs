//! The NBD protocol without I/O: what the bytes mean, and nothing else.
//!
//! Server and client share this crate. Everything here is a pure function or a state machine
//! from bytes to typed values and back, so that it can be unit-tested and fuzzed without a
//! socket. Section names in the documentation refer to `doc/proto.md` of the NBD project.
//!
//! * [`proto`]: magic numbers, flags, and the numbers of options, commands and chunks;
//! * [`wire`]: the fixed-size structures as they lie on the wire (big-endian, unaligned);
//! * [`error`]: the protocol's error numbers, and what a malformed message is;
//! * [`option`]: payloads of option requests, parsed with every length bounded;
//! * [`info`]: payloads of option replies;
//! * [`negotiation`]: the server's half of the handshake as a state machine;
//! * [`request`]: transmission requests and the rules that decide whether one is valid;
//! * [`reply`]: simple replies and structured reply chunks;
//! * [`uri`]: `nbd://` and `nbd+unix://` addresses.
//!
//! Invariant: no length that a peer sends makes this crate allocate more than a small constant;
//! lengths are compared with [`proto::MAX_STRING`] and [`negotiation::MAX_OPTION_PAYLOAD`]
//! before they are believed.

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

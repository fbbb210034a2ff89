//! Numbers of the protocol: magics, flags, option, reply, command and chunk types.
//!
//! Types that a peer may extend (`OptionKind` and so on) are newtypes over the integer and not enums: an unknown
//! value is legal on the wire, and the server must answer it. See the section "Values" of the specification.

use bitflags::bitflags;

/// First magic of the greeting, `NBDMAGIC`.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting and of every option request, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a transmission request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Longest string (export name, context name, error message) that the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;
/// Port that IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// The only metadata context that the protocol itself defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

bitflags! {
    /// Flags of the server's greeting (section "Handshake flags" of the specification).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// The server speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1;
        /// The server can leave out the 124 zeroes after `NBD_OPT_EXPORT_NAME`.
        const NO_ZEROES = 2;
    }

    /// Flags of the client's answer (section "Client flags" of the specification).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// The client speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1;
        /// The server must leave out the 124 zeroes.
        const NO_ZEROES = 2;
    }

    /// Capabilities of an export (section "Transmission flags" of the specification).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1;
        /// The export refuses writes.
        const READ_ONLY = 1 << 1;
        /// The server supports `NBD_CMD_FLUSH`.
        const SEND_FLUSH = 1 << 2;
        /// The server supports `NBD_CMD_FLAG_FUA`.
        const SEND_FUA = 1 << 3;
        /// The medium rotates.
        const ROTATIONAL = 1 << 4;
        /// The server supports `NBD_CMD_TRIM`.
        const SEND_TRIM = 1 << 5;
        /// The server supports `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_FLAG_NO_HOLE`.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The server supports `NBD_CMD_FLAG_DF`; only with structured replies.
        const SEND_DF = 1 << 7;
        /// A flush on one connection covers the writes of all connections.
        const CAN_MULTI_CONN = 1 << 8;
        /// Reserved for the resize extension.
        const SEND_RESIZE = 1 << 9;
        /// The server supports `NBD_CMD_CACHE`.
        const SEND_CACHE = 1 << 10;
        /// The server supports `NBD_CMD_FLAG_FAST_ZERO`.
        const SEND_FAST_ZERO = 1 << 11;
    }

    /// Flags of a request (section "Command flags" of the specification).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Reply only when the data is on stable storage.
        const FUA = 1;
        /// Write zeroes without punching a hole.
        const NO_HOLE = 1 << 1;
        /// Do not fragment the reply to a read.
        const DF = 1 << 2;
        /// One extent is enough for block status.
        const REQ_ONE = 1 << 3;
        /// Fail with `ENOTSUP` if zeroes cannot be written fast.
        const FAST_ZERO = 1 << 4;
    }

    /// Flags of a structured reply chunk.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ChunkFlags: u16 {
        /// No further chunk follows for this request.
        const DONE = 1;
    }

    /// Extent flags of the `base:allocation` context.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct AllocationFlags: u32 {
        /// The extent is not allocated.
        const HOLE = 1;
        /// The extent reads as zeroes.
        const ZERO = 2;
    }
}

/// Declares a newtype over a protocol number with its known values.
macro_rules! wire_number {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$vdoc:meta])* $value:ident = $n:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$vdoc])* pub const $value: $name = $name($n);)*
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match *self {
                    $($name::$value => f.write_str(stringify!($value)),)*
                    $name(other) => write!(f, concat!(stringify!($name), "({:#x})"), other),
                }
            }
        }
    };
}

wire_number! {
    /// Types of options (section "Option types" of the specification).
    OptionKind(u32) {
        /// Choose an export and start transmission. The reply cannot report an error.
        EXPORT_NAME = 1;
        /// End the session.
        ABORT = 2;
        /// List the exports.
        LIST = 3;
        /// Start TLS.
        STARTTLS = 5;
        /// Describe an export.
        INFO = 6;
        /// Describe an export and start transmission.
        GO = 7;
        /// Ask for structured replies.
        STRUCTURED_REPLY = 8;
        /// List metadata contexts.
        LIST_META_CONTEXT = 9;
        /// Select metadata contexts.
        SET_META_CONTEXT = 10;
        /// Ask for 64-bit headers.
        EXTENDED_HEADERS = 11;
    }
}

wire_number! {
    /// Types of option replies (section "Option reply types" of the specification). Errors have bit 31 set.
    ReplyKind(u32) {
        /// Success; no further reply follows.
        ACK = 1;
        /// One export of the list.
        SERVER = 2;
        /// One piece of information about an export.
        INFO = 3;
        /// One metadata context.
        META_CONTEXT = 4;
        /// The option is unknown to the server.
        ERR_UNSUP = 0x8000_0001;
        /// The server's configuration forbids the option.
        ERR_POLICY = 0x8000_0002;
        /// The option is malformed or not allowed in the current state.
        ERR_INVALID = 0x8000_0003;
        /// The option cannot work on the server's platform.
        ERR_PLATFORM = 0x8000_0004;
        /// The server requires TLS first.
        ERR_TLS_REQD = 0x8000_0005;
        /// The export does not exist.
        ERR_UNKNOWN = 0x8000_0006;
        /// The server is shutting down.
        ERR_SHUTDOWN = 0x8000_0007;
        /// The client must ask for the block sizes first.
        ERR_BLOCK_SIZE_REQD = 0x8000_0008;
        /// The request or its reply is too large.
        ERR_TOO_BIG = 0x8000_0009;
    }
}

impl ReplyKind {
    /// Whether this reply ends the option with an error.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

wire_number! {
    /// Information types of `NBD_REP_INFO`.
    InfoKind(u16) {
        /// Size and transmission flags.
        EXPORT = 0;
        /// Canonical name.
        NAME = 1;
        /// Human-readable description.
        DESCRIPTION = 2;
        /// Minimum, preferred and maximum request size.
        BLOCK_SIZE = 3;
    }
}

wire_number! {
    /// Types of requests (section "Request types" of the specification).
    CommandKind(u16) {
        /// Read.
        READ = 0;
        /// Write; the payload follows the header.
        WRITE = 1;
        /// Disconnect; there is no reply.
        DISC = 2;
        /// Flush.
        FLUSH = 3;
        /// Discard.
        TRIM = 4;
        /// Prefetch.
        CACHE = 5;
        /// Write zeroes.
        WRITE_ZEROES = 6;
        /// Query metadata contexts.
        BLOCK_STATUS = 7;
    }
}

wire_number! {
    /// Types of chunks (section "Structured reply types" of the specification). Errors have bit 15 set.
    ChunkKind(u16) {
        /// No content; ends a reply.
        NONE = 0;
        /// Data at an offset.
        OFFSET_DATA = 1;
        /// Zeroes at an offset.
        OFFSET_HOLE = 2;
        /// Extents of one metadata context.
        BLOCK_STATUS = 5;
        /// An error.
        ERROR = 0x8001;
        /// An error at an offset.
        ERROR_OFFSET = 0x8002;
    }
}

impl ChunkKind {
    /// Whether this chunk reports an error.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

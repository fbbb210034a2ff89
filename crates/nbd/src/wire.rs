//! The fixed-size structures of the protocol in their wire format.
//!
//! All integers are big-endian and all structures are unaligned, so that a structure can be read in place from a
//! receive buffer and written in place into a send buffer. The sizes are checked at compile time. Reading a structure
//! does not validate its values; the modules that use the structure validate them.

use zerocopy::byteorder::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Declares a wire structure with a checked size.
macro_rules! wire_struct {
    ($(#[$doc:meta])* $name:ident: $size:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
        }

        const _: () = assert!(size_of::<$name>() == $size);

        impl $name {
            /// Size on the wire, in bytes.
            pub const SIZE: usize = $size;

            /// Reads the structure from the front of `bytes`; `None` if `bytes` is too short.
            #[must_use]
            pub fn read(bytes: &[u8]) -> Option<$name> {
                <$name as FromBytes>::read_from_prefix(bytes).ok().map(|(value, _)| value)
            }
        }
    };
}

wire_struct! {
    /// The first message of the server (section "Newstyle negotiation" of the specification).
    Greeting: 18 {
        /// [`crate::proto::MAGIC`].
        magic: U64,
        /// [`crate::proto::OPTION_MAGIC`].
        option_magic: U64,
        /// [`crate::proto::HandshakeFlags`].
        flags: U16,
    }
}

wire_struct! {
    /// Header of an option request; `length` bytes follow.
    OptionHeader: 16 {
        /// [`crate::proto::OPTION_MAGIC`].
        magic: U64,
        /// [`crate::proto::OptionKind`].
        option: U32,
        /// Bytes of payload that follow.
        length: U32,
    }
}

wire_struct! {
    /// Header of an option reply; `length` bytes follow.
    OptionReplyHeader: 20 {
        /// [`crate::proto::OPTION_REPLY_MAGIC`].
        magic: U64,
        /// The option that this reply answers.
        option: U32,
        /// [`crate::proto::ReplyKind`].
        kind: U32,
        /// Bytes of payload that follow.
        length: U32,
    }
}

wire_struct! {
    /// Reply to `NBD_OPT_EXPORT_NAME`; 124 zeroes follow unless the client has set
    /// [`crate::proto::ClientFlags::NO_ZEROES`].
    ExportNameReply: 10 {
        /// Size of the export in bytes.
        size: U64,
        /// [`crate::proto::TransmissionFlags`].
        flags: U16,
    }
}

wire_struct! {
    /// Payload of `NBD_INFO_EXPORT`, with its type.
    InfoExport: 12 {
        /// [`crate::proto::InfoKind::EXPORT`].
        kind: U16,
        /// Size of the export in bytes.
        size: U64,
        /// [`crate::proto::TransmissionFlags`].
        flags: U16,
    }
}

wire_struct! {
    /// Payload of `NBD_INFO_BLOCK_SIZE`, with its type.
    InfoBlockSize: 14 {
        /// [`crate::proto::InfoKind::BLOCK_SIZE`].
        kind: U16,
        /// Smallest addressable unit in bytes.
        minimum: U32,
        /// Size from which requests are efficient, in bytes.
        preferred: U32,
        /// Largest request in bytes.
        maximum: U32,
    }
}

wire_struct! {
    /// Header of a transmission request (section "Request message" of the specification).
    RequestHeader: 28 {
        /// [`crate::proto::REQUEST_MAGIC`].
        magic: U32,
        /// [`crate::proto::CommandFlags`].
        flags: U16,
        /// [`crate::proto::CommandKind`].
        command: U16,
        /// The client's cookie, which the reply returns unchanged.
        cookie: U64,
        /// Offset in bytes.
        offset: U64,
        /// Length in bytes.
        length: U32,
    }
}

wire_struct! {
    /// A simple reply (section "Simple reply message" of the specification); the data of a successful read follows.
    SimpleReply: 16 {
        /// [`crate::proto::SIMPLE_REPLY_MAGIC`].
        magic: U32,
        /// [`crate::error::ErrorCode`], or zero.
        error: U32,
        /// The request's cookie.
        cookie: U64,
    }
}

wire_struct! {
    /// Header of a structured reply chunk; `length` bytes follow.
    ChunkHeader: 20 {
        /// [`crate::proto::STRUCTURED_REPLY_MAGIC`].
        magic: U32,
        /// [`crate::proto::ChunkFlags`].
        flags: U16,
        /// [`crate::proto::ChunkKind`].
        kind: U16,
        /// The request's cookie.
        cookie: U64,
        /// Bytes of payload that follow.
        length: U32,
    }
}

wire_struct! {
    /// Header of an `NBD_REPLY_TYPE_OFFSET_DATA` chunk up to the data.
    OffsetDataHeader: 28 {
        /// The header of the chunk.
        chunk: ChunkHeader,
        /// Offset of the data in the export, in bytes.
        offset: U64,
    }
}

wire_struct! {
    /// A whole `NBD_REPLY_TYPE_OFFSET_HOLE` chunk.
    OffsetHole: 32 {
        /// The header of the chunk.
        chunk: ChunkHeader,
        /// Offset of the hole in the export, in bytes.
        offset: U64,
        /// Length of the hole in bytes.
        length: U32,
    }
}

wire_struct! {
    /// One extent of an `NBD_REPLY_TYPE_BLOCK_STATUS` chunk.
    StatusExtent: 8 {
        /// Length in bytes; never 0.
        length: U32,
        /// Flags as the metadata context defines them.
        flags: U32,
    }
}

wire_struct! {
    /// Start of the payload of an error chunk; the message follows.
    ChunkError: 6 {
        /// [`crate::error::ErrorCode`].
        error: U32,
        /// Bytes of message that follow.
        message_length: U16,
    }
}

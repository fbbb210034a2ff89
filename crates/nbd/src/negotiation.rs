//! The server side of the handshake, as a state machine without I/O.
//!
//! The caller sends [`Negotiation::greeting`], then passes the bytes that it receives to [`Negotiation::advance`] and
//! does what the returned [`Progress`] requires. The server supports only fixed newstyle (section "Fixed newstyle
//! negotiation"). A client that does not set the fixed newstyle flag can use only `NBD_OPT_EXPORT_NAME`.
//!
//! Invariants for every input:
//! * the caller's buffer needs at most [`MAX_OPTION_PAYLOAD`] + 16 bytes: a longer payload is discarded as it arrives
//!   and answered with an error, and a payload longer than [`MAX_DRAIN`] or an export name that is too long ends the
//!   session;
//! * one call answers at most one option, so the size of the output depends on the list of exports and not on the
//!   length of the input;
//! * a payload is parsed only after it has arrived completely.
//!
//! The state machine does not measure time; the caller limits the duration of a handshake.

use crate::error::Malformed;
use crate::info::{self, BlockSizes};
use crate::option::{InfoRequest, MetaContextRequest, text};
use crate::proto::{
    BASE_ALLOCATION, ClientFlags, HandshakeFlags, InfoKind, MAGIC, MAX_STRING, OPTION_MAGIC,
    OptionKind, ReplyKind, TransmissionFlags,
};
use crate::wire::{ExportNameReply, Greeting, OptionHeader};
use std::fmt;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Longest option payload that is parsed, in bytes. An export name and two queries of the maximum legal length fit
/// into it.
pub const MAX_OPTION_PAYLOAD: usize = 16 << 10;

/// Longest option payload that is read and discarded, in bytes. A longer payload ends the session.
pub const MAX_DRAIN: u32 = 32 << 20;

/// The id under which `base:allocation` is selected.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// The description of an export in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Name; may be empty.
    pub name: String,
    /// Human-readable description.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Capabilities of the export. [`TransmissionFlags::HAS_FLAGS`] is added. [`TransmissionFlags::SEND_DF`] is set if replies
    /// are structured, and otherwise cleared.
    pub flags: TransmissionFlags,
    /// Request sizes.
    pub sizes: BlockSizes,
}

/// The exports of a server. The empty name means the first export, unless an export has the empty name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalog {
    exports: Vec<ExportInfo>,
}

impl Catalog {
    /// A catalog that lists these exports in this order.
    #[must_use]
    pub fn new(exports: Vec<ExportInfo>) -> Catalog {
        Catalog { exports }
    }

    /// The exports in their order.
    #[must_use]
    pub fn exports(&self) -> &[ExportInfo] {
        &self.exports
    }

    /// Finds an export and its index by the name that a client sent.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(usize, &ExportInfo)> {
        let named = self.exports.iter().enumerate().find(|(_, export)| export.name == name);
        match named {
            None if name.is_empty() => self.exports.first().map(|export| (0, export)),
            found => found,
        }
    }
}

/// The result of a successful handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// Index of the export in the catalog.
    pub export: usize,
    /// Size in bytes, as sent to the client.
    pub size: u64,
    /// Flags, as sent to the client.
    pub flags: TransmissionFlags,
    /// Whether replies are structured.
    pub structured: bool,
    /// The id of `base:allocation`, if it was selected for this export.
    pub base_allocation: Option<u32>,
}

/// The next action of the caller. Before this action, the caller sends the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Receive more and call again.
    More,
    /// An option was answered: call again with the rest of the input.
    Again,
    /// The transmission phase begins with the rest of the input.
    Ready(Session),
    /// Close the connection.
    Close(CloseReason),
}

/// The reason why a handshake ended without a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The client sent `NBD_OPT_ABORT`.
    Aborted,
    /// A message violates the protocol.
    Malformed(Malformed),
    /// The client set flags that do not exist.
    ClientFlags(u32),
    /// The payload of an option is longer than [`MAX_DRAIN`].
    OptionTooLarge(u32),
    /// The export of `NBD_OPT_EXPORT_NAME` does not exist. The reply to this option cannot report errors.
    UnknownExport,
    /// The client sent an option other than `NBD_OPT_EXPORT_NAME` without the fixed newstyle flag.
    NotFixedNewstyle,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CloseReason::Aborted => f.write_str("client ended the negotiation"),
            CloseReason::Malformed(error) => write!(f, "{error}"),
            CloseReason::ClientFlags(flags) => write!(f, "unknown client flags {flags:#x}"),
            CloseReason::OptionTooLarge(length) => write!(f, "option of {length} bytes"),
            CloseReason::UnknownExport => f.write_str("client asked for an unknown export"),
            CloseReason::NotFixedNewstyle => f.write_str("client does not speak fixed newstyle"),
        }
    }
}

/// The position of the state machine in the stream.
#[derive(Debug, Clone, Copy)]
enum State {
    ClientFlags,
    Header,
    Payload { option: OptionKind, length: usize },
    Drain { option: OptionKind, left: usize, reply: ReplyKind },
    Ended(Progress),
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct Negotiation {
    catalog: Arc<Catalog>,
    state: State,
    flags: ClientFlags,
    structured: bool,
    /// The export for which `base:allocation` was last selected.
    context_export: Option<usize>,
}

impl Negotiation {
    /// Starts a handshake over these exports.
    #[must_use]
    pub fn new(catalog: Arc<Catalog>) -> Negotiation {
        Negotiation {
            catalog,
            state: State::ClientFlags,
            flags: ClientFlags::empty(),
            structured: false,
            context_export: None,
        }
    }

    /// The first bytes that the server sends.
    #[must_use]
    pub fn greeting() -> [u8; Greeting::SIZE] {
        let greeting = Greeting {
            magic: MAGIC.into(),
            option_magic: OPTION_MAGIC.into(),
            flags: HandshakeFlags::all().bits().into(),
        };
        let mut bytes = [0; Greeting::SIZE];
        bytes.copy_from_slice(greeting.as_bytes());
        bytes
    }

    /// Consumes bytes from the front of `input` and appends replies to `out`. Returns the number of bytes consumed, and
    /// the next action of the caller. After the end of the handshake, each call consumes nothing and returns the last
    /// action again.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Progress) {
        let mut used = 0;
        loop {
            let rest = input.get(used..).unwrap_or(&[]);
            let (taken, progress) = self.step(rest, out);
            used += taken;
            if let Some(progress) = progress {
                if matches!(progress, Progress::Ready(_) | Progress::Close(_)) {
                    self.state = State::Ended(progress);
                }
                return (used, progress);
            }
        }
    }

    /// One step: consumes one element of the stream. Returns the number of bytes consumed, and the result of the call
    /// if it ends here.
    fn step(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Option<Progress>) {
        match self.state {
            State::ClientFlags => self.client_flags(input),
            State::Header => self.header(input),
            State::Payload { option, length } => match input.get(..length) {
                None => (0, Some(Progress::More)),
                Some(payload) => {
                    self.state = State::Header;
                    (length, Some(self.option(option, payload, out)))
                }
            },
            State::Drain { option, left, reply } => {
                let taken = left.min(input.len());
                if taken < left {
                    self.state = State::Drain { option, left: left - taken, reply };
                    return (taken, Some(Progress::More));
                }
                self.state = State::Header;
                info::put_error(out, option, reply, drained_message(reply));
                (taken, Some(Progress::Again))
            }
            State::Ended(progress) => (0, Some(progress)),
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Option<Progress>) {
        let Some(bytes) = input.first_chunk() else { return (0, Some(Progress::More)) };
        let bits = u32::from_be_bytes(*bytes);
        let Some(flags) = ClientFlags::from_bits(bits) else {
            return (4, Some(Progress::Close(CloseReason::ClientFlags(bits))));
        };
        self.flags = flags;
        self.state = State::Header;
        (4, None)
    }

    /// Reads the header of an option and decides how to handle its payload.
    fn header(&mut self, input: &[u8]) -> (usize, Option<Progress>) {
        let Some(header) = OptionHeader::read(input) else { return (0, Some(Progress::More)) };
        let close = |reason| (OptionHeader::SIZE, Some(Progress::Close(reason)));
        if header.magic.get() != OPTION_MAGIC {
            return close(CloseReason::Malformed(Malformed::BadMagic("option request")));
        }
        let option = OptionKind(header.option.get());
        let claimed = header.length.get();
        let length = usize::try_from(claimed).unwrap_or(usize::MAX);
        if option == OptionKind::EXPORT_NAME && length > MAX_STRING {
            return close(CloseReason::Malformed(Malformed::StringTooLong("export name")));
        }
        if option != OptionKind::EXPORT_NAME && !self.flags.contains(ClientFlags::FIXED_NEWSTYLE) {
            return close(CloseReason::NotFixedNewstyle);
        }
        if claimed > MAX_DRAIN {
            return close(CloseReason::OptionTooLarge(claimed));
        }
        self.state = if !is_known(option) {
            State::Drain { option, left: length, reply: ReplyKind::ERR_UNSUP }
        } else if length > MAX_OPTION_PAYLOAD {
            State::Drain { option, left: length, reply: ReplyKind::ERR_TOO_BIG }
        } else {
            State::Payload { option, length }
        };
        (OptionHeader::SIZE, None)
    }

    /// Answers an option whose payload is complete.
    fn option(&mut self, option: OptionKind, payload: &[u8], out: &mut Vec<u8>) -> Progress {
        match option {
            OptionKind::EXPORT_NAME => return self.export_name(payload, out),
            OptionKind::ABORT => {
                info::put_ack(out, option);
                return Progress::Close(CloseReason::Aborted);
            }
            OptionKind::INFO | OptionKind::GO => return self.info(option, payload, out),
            OptionKind::LIST_META_CONTEXT | OptionKind::SET_META_CONTEXT => {
                self.meta_context(option, payload, out);
            }
            _ if !payload.is_empty() => {
                let message = "this option takes no payload";
                info::put_error(out, option, ReplyKind::ERR_INVALID, message);
            }
            OptionKind::LIST => {
                for export in self.catalog.exports() {
                    let description = export.description.as_deref().unwrap_or("");
                    info::put_server(out, option, &export.name, description);
                }
                info::put_ack(out, option);
            }
            OptionKind::STRUCTURED_REPLY if self.structured => {
                let message = "structured replies are already enabled";
                info::put_error(out, option, ReplyKind::ERR_INVALID, message);
            }
            OptionKind::STRUCTURED_REPLY => {
                self.structured = true;
                info::put_ack(out, option);
            }
            // The only remaining option that `is_known` accepts: STARTTLS.
            _ => info::put_error(out, option, ReplyKind::ERR_POLICY, "TLS is not configured"),
        }
        Progress::Again
    }

    fn export_name(&self, payload: &[u8], out: &mut Vec<u8>) -> Progress {
        let name = match text(payload, "export name") {
            Ok(name) => name,
            Err(error) => return Progress::Close(CloseReason::Malformed(error)),
        };
        let Some((index, export)) = self.catalog.find(name) else {
            return Progress::Close(CloseReason::UnknownExport);
        };
        let session = self.session(index, export);
        let reply =
            ExportNameReply { size: session.size.into(), flags: session.flags.bits().into() };
        out.extend_from_slice(reply.as_bytes());
        if !self.flags.contains(ClientFlags::NO_ZEROES) {
            out.extend_from_slice(&[0; 124]);
        }
        Progress::Ready(session)
    }

    fn session(&self, index: usize, export: &ExportInfo) -> Session {
        let mut flags = export.flags | TransmissionFlags::HAS_FLAGS;
        flags.set(TransmissionFlags::SEND_DF, self.structured);
        let selected = self.structured && self.context_export == Some(index);
        Session {
            export: index,
            size: export.size,
            flags,
            structured: self.structured,
            base_allocation: selected.then_some(BASE_ALLOCATION_ID),
        }
    }

    /// Answers `NBD_OPT_INFO` and `NBD_OPT_GO`.
    fn info(&self, option: OptionKind, payload: &[u8], out: &mut Vec<u8>) -> Progress {
        let request = match InfoRequest::parse(payload) {
            Ok(request) => request,
            Err(error) => {
                info::put_error(out, option, ReplyKind::ERR_INVALID, &error.to_string());
                return Progress::Again;
            }
        };
        let Some((index, export)) = self.catalog.find(request.name) else {
            put_unknown(out, option, request.name);
            return Progress::Again;
        };
        let session = self.session(index, export);
        if request.wants(InfoKind::NAME) {
            info::put_info_text(out, option, InfoKind::NAME, &export.name);
        }
        if let Some(description) = &export.description {
            info::put_info_text(out, option, InfoKind::DESCRIPTION, description);
        }
        // If the client starts transmission without asking for block sizes, the block sizes are only advice. The advertised
        // minimum is then 1, so that the client does not expect smaller requests to be refused.
        let asked = request.wants(InfoKind::BLOCK_SIZE) || option == OptionKind::INFO;
        let minimum = if asked { export.sizes.minimum } else { 1 };
        info::put_info_block_size(out, option, BlockSizes { minimum, ..export.sizes });
        info::put_info_export(out, option, session.size, session.flags);
        info::put_ack(out, option);
        match option {
            OptionKind::GO => Progress::Ready(session),
            _ => Progress::Again,
        }
    }

    /// Answers `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
    fn meta_context(&mut self, option: OptionKind, payload: &[u8], out: &mut Vec<u8>) {
        let set = option == OptionKind::SET_META_CONTEXT;
        if set {
            // The specification: "replaces all previously-set metadata contexts (including when this command fails)".
            self.context_export = None;
        }
        if !self.structured {
            let message = "structured replies must be requested first";
            return info::put_error(out, option, ReplyKind::ERR_INVALID, message);
        }
        let request = match MetaContextRequest::parse(payload) {
            Ok(request) => request,
            Err(error) => {
                return info::put_error(out, option, ReplyKind::ERR_INVALID, &error.to_string());
            }
        };
        let Some((index, _)) = self.catalog.find(request.name) else {
            return put_unknown(out, option, request.name);
        };
        let matches = if set {
            request.queries().any(|query| query == BASE_ALLOCATION)
        } else {
            request.count == 0
                || request.queries().any(|query| query == "base:" || query == BASE_ALLOCATION)
        };
        if matches {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            info::put_meta_context(out, option, id, BASE_ALLOCATION);
            if set {
                self.context_export = Some(index);
            }
        }
        info::put_ack(out, option);
    }
}

fn is_known(option: OptionKind) -> bool {
    matches!(
        option,
        OptionKind::EXPORT_NAME
            | OptionKind::ABORT
            | OptionKind::LIST
            | OptionKind::STARTTLS
            | OptionKind::INFO
            | OptionKind::GO
            | OptionKind::STRUCTURED_REPLY
            | OptionKind::LIST_META_CONTEXT
            | OptionKind::SET_META_CONTEXT
    )
}

fn drained_message(reply: ReplyKind) -> &'static str {
    match reply {
        ReplyKind::ERR_TOO_BIG => "option payload is too large",
        _ => "unknown option",
    }
}

/// Appends the error that an export does not exist, quoting at most 80 bytes of its name.
fn put_unknown(out: &mut Vec<u8>, option: OptionKind, name: &str) {
    let end = name.floor_char_boundary(80);
    let shown = name.get(..end).unwrap_or("");
    let dots = if end < name.len() { "..." } else { "" };
    let message = format!("there is no export named '{shown}{dots}'");
    info::put_error(out, option, ReplyKind::ERR_UNKNOWN, &message);
}

#[cfg(test)]
mod tests;

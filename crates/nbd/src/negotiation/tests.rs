//! Tests of the server side of the handshake.

use super::*;
use crate::info::{Info, parse_meta_context, parse_server};
use crate::option::{info_request, meta_context_request, put_option};
use crate::wire::OptionReplyHeader;
use proptest::prelude::*;

fn catalog() -> Arc<Catalog> {
    let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
    let export = |name: &str, size, description: Option<&str>| ExportInfo {
        name: name.to_owned(),
        description: description.map(str::to_owned),
        size,
        flags,
        sizes: BlockSizes { minimum: 512, preferred: 65536, maximum: 32 << 20 },
    };
    Arc::new(Catalog::new(vec![export("disk", 1 << 30, Some("a disk")), export("iso", 4096, None)]))
}

/// A negotiation that has received the client flags.
fn open(flags: ClientFlags) -> Negotiation {
    let mut machine = Negotiation::new(catalog());
    let mut out = Vec::new();
    assert_eq!(machine.advance(&flags.bits().to_be_bytes(), &mut out), (4, Progress::More));
    assert!(out.is_empty());
    machine
}

fn option(kind: OptionKind, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_option(&mut out, kind, payload).unwrap();
    out
}

/// Sends one complete option. Returns the replies (kind, payload) and the progress.
fn ask(
    machine: &mut Negotiation,
    kind: OptionKind,
    payload: &[u8],
) -> (Vec<(ReplyKind, Vec<u8>)>, Progress) {
    let input = option(kind, payload);
    let mut out = Vec::new();
    let (used, progress) = machine.advance(&input, &mut out);
    assert_eq!(used, input.len());
    (replies(kind, &out), progress)
}

fn replies(kind: OptionKind, mut out: &[u8]) -> Vec<(ReplyKind, Vec<u8>)> {
    let mut replies = Vec::new();
    while let Some(header) = OptionReplyHeader::read(out) {
        assert_eq!(header.magic.get(), 0x0003_e889_0455_65a9);
        assert_eq!(header.option.get(), kind.0);
        let end = OptionReplyHeader::SIZE + header.length.get() as usize;
        let payload = out[OptionReplyHeader::SIZE..end].to_vec();
        replies.push((ReplyKind(header.kind.get()), payload));
        out = &out[end..];
    }
    assert!(out.is_empty());
    replies
}

fn kinds(replies: &[(ReplyKind, Vec<u8>)]) -> Vec<ReplyKind> {
    replies.iter().map(|(kind, _)| *kind).collect()
}

#[test]
fn the_greeting_offers_fixed_newstyle_without_zeroes() {
    assert_eq!(&Negotiation::greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn unknown_client_flags_close_the_connection() {
    let mut machine = Negotiation::new(catalog());
    let progress = machine.advance(&8_u32.to_be_bytes(), &mut Vec::new()).1;
    assert_eq!(progress, Progress::Close(CloseReason::ClientFlags(8)));
}

#[test]
fn export_name_sends_zeroes_unless_declined() {
    for (flags, length) in [(ClientFlags::FIXED_NEWSTYLE, 134), (ClientFlags::all(), 10)] {
        let mut machine = open(flags);
        let mut out = Vec::new();
        let progress = machine.advance(&option(OptionKind::EXPORT_NAME, b"iso"), &mut out).1;
        let Progress::Ready(session) = progress else { panic!("{progress:?}") };
        assert_eq!((session.export, session.size, session.structured), (1, 4096, false));
        assert_eq!(out.len(), length);
        assert_eq!(&out[..10], b"\0\0\0\0\0\0\x10\0\0\x05");
    }
}

#[test]
fn only_export_name_works_without_fixed_newstyle() {
    let mut machine = open(ClientFlags::empty());
    let progress = machine.advance(&option(OptionKind::EXPORT_NAME, b""), &mut Vec::new()).1;
    assert!(matches!(progress, Progress::Ready(Session { export: 0, .. })));
    let mut machine = open(ClientFlags::empty());
    let progress = machine.advance(&option(OptionKind::LIST, b""), &mut Vec::new()).1;
    assert_eq!(progress, Progress::Close(CloseReason::NotFixedNewstyle));
}

#[test]
fn export_name_of_an_unknown_or_overlong_name_closes_the_connection() {
    let mut machine = open(ClientFlags::all());
    let progress =
        machine.advance(&option(OptionKind::EXPORT_NAME, &[b'x'; 3000]), &mut Vec::new()).1;
    assert_eq!(progress, Progress::Close(CloseReason::UnknownExport));
    let mut machine = open(ClientFlags::all());
    let progress =
        machine.advance(&option(OptionKind::EXPORT_NAME, &[b'x'; 4097]), &mut Vec::new()).1;
    assert_eq!(
        progress,
        Progress::Close(CloseReason::Malformed(Malformed::StringTooLong("export name")))
    );
}

#[test]
fn go_gives_all_information_and_starts_transmission() {
    let mut machine = open(ClientFlags::all());
    let payload = info_request("", &[InfoKind::NAME, InfoKind::BLOCK_SIZE]).unwrap();
    let (replies, progress) = ask(&mut machine, OptionKind::GO, &payload);
    let Progress::Ready(session) = progress else { panic!("{progress:?}") };
    assert!(!session.flags.contains(TransmissionFlags::SEND_DF));
    let (last, infos) = replies.split_last().unwrap();
    assert_eq!(last.0, ReplyKind::ACK);
    let infos: Vec<_> = infos.iter().map(|(_, payload)| Info::parse(payload).unwrap()).collect();
    assert!(infos.contains(&Info::Name("disk")));
    assert!(infos.contains(&Info::Description("a disk")));
    assert!(infos.contains(&Info::Export { size: 1 << 30, flags: session.flags }));
    let sizes = BlockSizes { minimum: 512, preferred: 65536, maximum: 32 << 20 };
    assert!(infos.contains(&Info::BlockSize(sizes)));
}

#[test]
fn unrequested_block_sizes_do_not_restrict_requests() {
    let mut machine = open(ClientFlags::all());
    let (replies, _) = ask(&mut machine, OptionKind::GO, &info_request("iso", &[]).unwrap());
    let sizes = BlockSizes { minimum: 1, preferred: 65536, maximum: 32 << 20 };
    assert_eq!(Info::parse(&replies[0].1), Ok(Info::BlockSize(sizes)));
}

#[test]
fn info_does_not_end_the_negotiation() {
    let mut machine = open(ClientFlags::all());
    let payload = info_request("iso", &[]).unwrap();
    assert_eq!(ask(&mut machine, OptionKind::INFO, &payload).1, Progress::Again);
    assert!(matches!(ask(&mut machine, OptionKind::GO, &payload).1, Progress::Ready(_)));
}

#[test]
fn an_unknown_export_of_three_thousand_bytes_gets_a_short_error() {
    let mut machine = open(ClientFlags::all());
    let payload = info_request(&"x".repeat(3000), &[]).unwrap();
    let (replies, progress) = ask(&mut machine, OptionKind::GO, &payload);
    assert_eq!(progress, Progress::Again);
    assert_eq!(kinds(&replies), [ReplyKind::ERR_UNKNOWN]);
    assert!(replies[0].1.len() < 200);
}

#[test]
fn a_name_over_the_limit_is_invalid() {
    let mut machine = open(ClientFlags::all());
    let mut payload = 4097_u32.to_be_bytes().to_vec();
    payload.extend_from_slice(&[b'x'; 4097]);
    payload.extend_from_slice(&[0, 0]);
    let (replies, _) = ask(&mut machine, OptionKind::GO, &payload);
    assert_eq!(kinds(&replies), [ReplyKind::ERR_INVALID]);
}

#[test]
fn list_names_every_export() {
    let mut machine = open(ClientFlags::all());
    let (replies, progress) = ask(&mut machine, OptionKind::LIST, b"");
    assert_eq!(progress, Progress::Again);
    assert_eq!(kinds(&replies), [ReplyKind::SERVER, ReplyKind::SERVER, ReplyKind::ACK]);
    assert_eq!(parse_server(&replies[0].1), Ok(("disk", "a disk")));
    assert_eq!(parse_server(&replies[1].1), Ok(("iso", "")));
}

#[test]
fn options_that_take_no_payload_refuse_one() {
    for kind in [OptionKind::LIST, OptionKind::STRUCTURED_REPLY, OptionKind::STARTTLS] {
        let mut machine = open(ClientFlags::all());
        let (replies, progress) = ask(&mut machine, kind, b"x");
        assert_eq!(progress, Progress::Again);
        assert_eq!(kinds(&replies), [ReplyKind::ERR_INVALID], "{kind:?}");
    }
}

#[test]
fn tls_is_refused_and_the_negotiation_continues() {
    let mut machine = open(ClientFlags::all());
    let (replies, progress) = ask(&mut machine, OptionKind::STARTTLS, b"");
    assert_eq!((kinds(&replies), progress), (vec![ReplyKind::ERR_POLICY], Progress::Again));
    assert_eq!(ask(&mut machine, OptionKind::LIST, b"").1, Progress::Again);
}

#[test]
fn abort_is_acknowledged_even_with_a_payload() {
    let mut machine = open(ClientFlags::all());
    let (replies, progress) = ask(&mut machine, OptionKind::ABORT, b"bye");
    assert_eq!(kinds(&replies), [ReplyKind::ACK]);
    assert_eq!(progress, Progress::Close(CloseReason::Aborted));
}

#[test]
fn an_unknown_option_is_unsupported_and_its_payload_is_skipped() {
    let mut machine = open(ClientFlags::all());
    let kind = OptionKind(0x1234);
    let (replies, progress) = ask(&mut machine, kind, &[7; 40_000]);
    assert_eq!((kinds(&replies), progress), (vec![ReplyKind::ERR_UNSUP], Progress::Again));
    let (replies, _) = ask(&mut machine, OptionKind::EXTENDED_HEADERS, b"");
    assert_eq!(kinds(&replies), [ReplyKind::ERR_UNSUP]);
}

#[test]
fn a_large_payload_of_a_known_option_is_discarded_as_it_arrives() {
    let mut machine = open(ClientFlags::all());
    let mut out = Vec::new();
    let input = option(OptionKind::GO, &[0; 100_000]);
    for piece in input.chunks(1000) {
        let (used, progress) = machine.advance(piece, &mut out);
        assert_eq!(used, piece.len());
        if out.is_empty() {
            assert_eq!(progress, Progress::More);
        }
    }
    assert_eq!(kinds(&replies(OptionKind::GO, &out)), [ReplyKind::ERR_TOO_BIG]);
}

#[test]
fn an_option_of_four_gigabytes_closes_the_connection_at_its_head() {
    let mut machine = open(ClientFlags::all());
    let mut input = option(OptionKind::GO, b"");
    input[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let (_, progress) = machine.advance(&input, &mut Vec::new());
    assert_eq!(progress, Progress::Close(CloseReason::OptionTooLarge(u32::MAX)));
    // Later input is not consumed.
    assert_eq!(machine.advance(&input, &mut Vec::new()), (0, progress));
}

#[test]
fn a_wrong_option_magic_closes_the_connection() {
    let mut machine = open(ClientFlags::all());
    let mut input = option(OptionKind::LIST, b"");
    input[0] = b'G';
    let progress = machine.advance(&input, &mut Vec::new()).1;
    let expected = CloseReason::Malformed(Malformed::BadMagic("option request"));
    assert_eq!(progress, Progress::Close(expected));
}

#[test]
fn metadata_contexts_require_structured_replies() {
    let mut machine = open(ClientFlags::all());
    let payload = meta_context_request("disk", &["base:allocation"]).unwrap();
    for kind in [OptionKind::SET_META_CONTEXT, OptionKind::LIST_META_CONTEXT] {
        let (replies, _) = ask(&mut machine, kind, &payload);
        assert_eq!(kinds(&replies), [ReplyKind::ERR_INVALID]);
    }
}

#[test]
fn a_selected_context_belongs_to_its_export() {
    for (name, selected) in [("disk", Some(BASE_ALLOCATION_ID)), ("", Some(1)), ("iso", None)] {
        let mut machine = open(ClientFlags::all());
        ask(&mut machine, OptionKind::STRUCTURED_REPLY, b"");
        let payload = meta_context_request("disk", &["qemu:x", "base:allocation"]).unwrap();
        let (replies, _) = ask(&mut machine, OptionKind::SET_META_CONTEXT, &payload);
        assert_eq!(kinds(&replies), [ReplyKind::META_CONTEXT, ReplyKind::ACK]);
        assert_eq!(parse_meta_context(&replies[0].1), Ok((1, "base:allocation")));
        let payload = info_request(name, &[]).unwrap();
        let Progress::Ready(session) = ask(&mut machine, OptionKind::GO, &payload).1 else {
            panic!("no session");
        };
        assert_eq!(session.base_allocation, selected, "{name}");
        assert!(session.flags.contains(TransmissionFlags::SEND_DF));
    }
}

#[test]
fn a_failed_context_selection_removes_the_earlier_one() {
    let mut machine = open(ClientFlags::all());
    ask(&mut machine, OptionKind::STRUCTURED_REPLY, b"");
    let good = meta_context_request("disk", &["base:allocation"]).unwrap();
    ask(&mut machine, OptionKind::SET_META_CONTEXT, &good);
    let bad = meta_context_request("nope", &["base:allocation"]).unwrap();
    let (replies, _) = ask(&mut machine, OptionKind::SET_META_CONTEXT, &bad);
    assert_eq!(kinds(&replies), [ReplyKind::ERR_UNKNOWN]);
    let payload = info_request("disk", &[]).unwrap();
    let Progress::Ready(session) = ask(&mut machine, OptionKind::GO, &payload).1 else {
        panic!("no session");
    };
    assert_eq!(session.base_allocation, None);
}

#[test]
fn the_base_wildcard_lists_but_does_not_select() {
    let mut machine = open(ClientFlags::all());
    ask(&mut machine, OptionKind::STRUCTURED_REPLY, b"");
    for (kind, queries, found) in [
        (OptionKind::LIST_META_CONTEXT, &["base:"][..], true),
        (OptionKind::LIST_META_CONTEXT, &[][..], true),
        (OptionKind::LIST_META_CONTEXT, &["qemu:"][..], false),
        (OptionKind::SET_META_CONTEXT, &["base:"][..], false),
        (OptionKind::SET_META_CONTEXT, &[][..], false),
    ] {
        let payload = meta_context_request("disk", queries).unwrap();
        let (replies, _) = ask(&mut machine, kind, &payload);
        assert_eq!(kinds(&replies).contains(&ReplyKind::META_CONTEXT), found, "{queries:?}");
        assert_eq!(replies.last().unwrap().0, ReplyKind::ACK);
    }
}

#[test]
fn requests_sent_right_after_the_handshake_stay_in_the_input() {
    let mut machine = open(ClientFlags::all());
    let mut input = option(OptionKind::GO, &info_request("disk", &[]).unwrap());
    let handshake = input.len();
    input.extend_from_slice(&[0x25; 28]);
    let (used, progress) = machine.advance(&input, &mut Vec::new());
    assert_eq!(used, handshake);
    assert!(matches!(progress, Progress::Ready(_)));
}

proptest! {
    #[test]
    fn any_bytes_in_any_fragments_never_cause_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        options in prop::collection::vec((0_u32..12, prop::collection::vec(any::<u8>(), 0..40)), 0..6),
        piece in 1_usize..50,
    ) {
        let mut input = ClientFlags::all().bits().to_be_bytes().to_vec();
        for (kind, payload) in &options {
            input.extend(option(OptionKind(*kind), payload));
        }
        input.extend(bytes);
        let run = |piece: usize| {
            let mut machine = Negotiation::new(catalog());
            let (mut out, mut pending, mut progress) = (Vec::new(), Vec::new(), Progress::More);
            for bytes in input.chunks(piece) {
                pending.extend_from_slice(bytes);
                loop {
                    let (used, next) = machine.advance(&pending, &mut out);
                    pending.drain(..used);
                    progress = next;
                    if progress != Progress::Again {
                        break;
                    }
                }
                if progress != Progress::More {
                    break;
                }
            }
            (out, progress)
        };
        prop_assert_eq!(run(piece), run(usize::MAX));
    }
}

//! Tests of the NBD server over real sockets, with a client that can also violate the protocol.

#![expect(clippy::unwrap_used, reason = "a test that fails may panic anywhere")]

#[path = "nbd/admission.rs"]
mod admission;
#[path = "nbd/client.rs"]
mod client;
#[path = "nbd/memory.rs"]
mod memory;
#[path = "nbd/polling.rs"]
mod polling;
#[path = "nbd/scarce_memory.rs"]
mod scarce_memory;
#[path = "nbd/stopping.rs"]
mod stopping;

use client::{Answer, Client, Fixture, TIMEOUT};
use oxblk_exports::nbd::ServerOptions;
use oxblk_nbd::info::{Info, parse_server};
use oxblk_nbd::option::{info_request, put_option};
use oxblk_nbd::proto::{
    ChunkKind, CommandFlags, CommandKind, InfoKind, OptionKind, ReplyKind, TransmissionFlags,
};
use oxblk_nbd::reply::{parse_block_status, parse_error, parse_hole};
use oxblk_nbd::{ErrorCode, RawRequest};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

const NONE: CommandFlags = CommandFlags::empty();
const SIZE: u64 = 64 << 20;

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + seed) % 251).unwrap()).collect()
}

#[test]
fn the_export_is_listed_and_described() {
    let fixture = Fixture::new();
    let mut client = fixture.greeted();
    let replies = client.option(OptionKind::LIST, &[]);
    assert_eq!(parse_server(&replies[0].1), Ok(("disk", "a test disk")));
    let payload = info_request("disk", &[InfoKind::NAME, InfoKind::BLOCK_SIZE]).unwrap();
    let replies = client.option(OptionKind::INFO, &payload);
    let flags = TransmissionFlags::all()
        - TransmissionFlags::READ_ONLY
        - TransmissionFlags::ROTATIONAL
        - TransmissionFlags::SEND_RESIZE
        - TransmissionFlags::SEND_DF;
    let export = Info::Export { size: SIZE, flags };
    assert!(replies.iter().any(|(_, payload)| Info::parse(payload) == Ok(export)));
    client.acked(OptionKind::ABORT, &[]);
    assert!(client.is_closed());
}

#[test]
fn data_of_every_size_reads_back_as_written() {
    for structured in [false, true] {
        let fixture = Fixture::new();
        let mut client = fixture.client(structured);
        let mut offset = 0;
        for len in [1, 511, 4096, 16384, 16385, 65536, 100_000, 1 << 20, 5_000_001] {
            let data = pattern(len, len);
            assert_eq!(client.write(offset, &data), None);
            client.request(CommandKind::READ, NONE, offset, u32::try_from(len).unwrap());
            if structured {
                let Answer::Chunk { kind, done: true, payload, .. } = client.answer() else {
                    panic!("not one chunk");
                };
                assert_eq!(kind, ChunkKind::OFFSET_DATA);
                assert!(payload[..8] == offset.to_be_bytes() && payload[8..] == data);
            } else {
                assert_eq!(client.answer(), Answer::Simple { cookie: 1, error: None });
                assert!(client.receive(len) == data, "length {len}");
            }
            offset += len as u64;
        }
    }
}

#[test]
fn a_thousand_concurrent_requests_are_all_answered() {
    oxblk_ring::perturb::start(1);
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    for round in 0_u64..4 {
        // If the replies do not fit in the socket buffer, client and server block. So writes are sent in batches.
        for batch in (0..1000).step_by(100) {
            for cookie in batch..batch + 100 {
                client.request_as(cookie, CommandKind::WRITE, 0, cookie * 4096, 4096);
                client.send(&pattern(4096, usize::try_from(cookie + round).unwrap()));
            }
            let mut seen: Vec<_> = (0..100)
                .map(|_| match client.answer() {
                    Answer::Simple { cookie, error: None } => cookie,
                    other => panic!("{other:?}"),
                })
                .collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(batch..batch + 100));
        }
        let read = |cookie| RawRequest {
            flags: 0,
            kind: CommandKind::READ,
            cookie,
            offset: cookie * 4096,
            length: 4096,
        };
        client.send(&(0..1000).flat_map(|cookie| read(cookie).to_bytes()).collect::<Vec<_>>());
        for _ in 0..1000 {
            let Answer::Simple { cookie, error: None } = client.answer() else { panic!() };
            let expected = pattern(4096, usize::try_from(cookie + round).unwrap());
            assert!(client.receive(4096) == expected);
        }
    }
}

#[test]
fn requests_are_served_while_an_earlier_one_waits() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    fixture.disk.hold();
    client.request_as(1, CommandKind::READ, 0, 0, 512);
    client.request_as(2, CommandKind::READ, 0, 512, 512);
    fixture.until("both reads are in flight", |fixture| fixture.disk.waiting() == 2);
    // This read is invalid, so the server refuses it immediately, without a request to the disk.
    client.request_as(3, CommandKind::READ, 0, SIZE, 512);
    assert_eq!(client.answer(), Answer::Simple { cookie: 3, error: Some(ErrorCode::Inval) });
    fixture.disk.release();
    for _ in 0..2 {
        assert!(matches!(client.answer(), Answer::Simple { error: None, .. }));
        client.receive(512);
    }
}

#[test]
fn a_tcp_socket_works_like_a_unix_socket() {
    let fixture = Fixture::new();
    let mut client = Client::greet(fixture.tcp_socket());
    client.acked(OptionKind::GO, &info_request("disk", &[]).unwrap());
    assert_eq!(client.write(4096, &pattern(8192, 1)), None);
    assert!(client.read(4096, 8192) == pattern(8192, 1));
}

#[test]
fn connections_see_the_writes_of_other_connections() {
    let fixture = Fixture::new();
    let mut clients: Vec<_> = (0..6).map(|_| fixture.client(false)).collect();
    assert_eq!(fixture.server.connections(), 6);
    for (index, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.write(index as u64 * 512, &pattern(512, index)), None);
    }
    for client in &mut clients {
        for index in 0..6 {
            assert!(client.read(index as u64 * 512, 512) == pattern(512, index));
        }
    }
}

#[test]
fn command_flags_become_flags_of_disk_requests() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    client.request(CommandKind::WRITE, CommandFlags::FUA, 0, 512);
    client.send(&[1; 512]);
    assert_eq!(client.status(), None);
    for (kind, flags, error) in [
        (CommandKind::FLUSH, NONE, None),
        (CommandKind::TRIM, CommandFlags::FUA, None),
        (CommandKind::WRITE_ZEROES, NONE, None),
        (CommandKind::WRITE_ZEROES, CommandFlags::NO_HOLE | CommandFlags::FUA, None),
        (CommandKind::WRITE_ZEROES, CommandFlags::FAST_ZERO, None),
        (
            CommandKind::WRITE_ZEROES,
            CommandFlags::FAST_ZERO | CommandFlags::NO_HOLE,
            Some(ErrorCode::NotSup),
        ),
        (CommandKind::CACHE, NONE, None),
    ] {
        let length = if kind == CommandKind::FLUSH { 0 } else { 4096 };
        client.request(kind, flags, 0, length);
        assert_eq!(client.status(), error, "{kind:?} {flags:?}");
    }
    let log = fixture.disk.log();
    // The backend executes FUA as a request followed by a flush.
    let expected = [
        "write 0+512",
        "flush 0+0",
        "discard 0+4096",
        "flush 0+0",
        "zeroZeroFlags(MAY_UNMAP) 0+4096",
        "zeroZeroFlags(0x0) 0+4096",
        "flush 0+0",
        "zeroZeroFlags(MAY_UNMAP | NO_FALLBACK) 0+4096",
        "zeroZeroFlags(NO_FALLBACK) 0+4096",
        "read 0+4096",
    ];
    assert_eq!(log, expected);
}

#[test]
fn zeroes_are_sent_as_holes_unless_the_client_declines() {
    let fixture = Fixture::new();
    let mut client = fixture.client(true);
    client.request(CommandKind::READ, NONE, 0, 1 << 20);
    let Answer::Chunk { kind: ChunkKind::OFFSET_HOLE, done: true, payload, .. } = client.answer()
    else {
        panic!("no hole");
    };
    assert_eq!(parse_hole(&payload), Ok((0, 1 << 20)));
    client.request(CommandKind::READ, CommandFlags::DF, 0, 1 << 20);
    let Answer::Chunk { kind: ChunkKind::OFFSET_DATA, done: true, payload, .. } = client.answer()
    else {
        panic!("no data");
    };
    assert!(payload[8..] == vec![0; 1 << 20]);
}

/// Requests the block status of a range, and returns the extents of the reply.
fn extents(client: &mut Client, flags: CommandFlags, offset: u64, length: u32) -> Vec<(u32, u32)> {
    client.request(CommandKind::BLOCK_STATUS, flags, offset, length);
    let Answer::Chunk { kind: ChunkKind::BLOCK_STATUS, done: true, payload, .. } = client.answer()
    else {
        panic!("no block status");
    };
    let (context, extents) = parse_block_status(&payload).unwrap();
    assert_eq!(context, 1);
    extents.iter().map(|extent| (extent.length.get(), extent.flags.get())).collect()
}

#[test]
fn block_status_joins_adjacent_extents_and_stays_within_the_request() {
    let fixture = Fixture::new();
    let mut client = fixture.client(true);
    assert_eq!(client.write(8192, &[1; 12288]), None);
    let all = extents(&mut client, NONE, 0, 1 << 20);
    assert_eq!(all, [(8192, 3), (12288, 0), ((1 << 20) - 20480, 3)]);
    assert_eq!(extents(&mut client, CommandFlags::REQ_ONE, 8192, 1 << 20), [(12288, 0)]);
    assert_eq!(extents(&mut client, CommandFlags::REQ_ONE, 12288, 4096), [(4096, 0)]);
    assert_eq!(extents(&mut client, NONE, SIZE - 100, 100), [(100, 3)]);
}

#[test]
fn block_status_without_a_context_is_refused() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    client.request(CommandKind::BLOCK_STATUS, NONE, 0, 512);
    assert_eq!(client.status(), Some(ErrorCode::Inval));
}

#[test]
fn requests_past_the_end_fail_with_the_errors_of_the_specification() {
    for structured in [false, true] {
        let fixture = Fixture::new();
        let mut client = fixture.client(structured);
        for (kind, error) in [
            (CommandKind::READ, ErrorCode::Inval),
            (CommandKind::TRIM, ErrorCode::Inval),
            (CommandKind::CACHE, ErrorCode::Inval),
            (CommandKind::BLOCK_STATUS, ErrorCode::Inval),
            (CommandKind::WRITE_ZEROES, ErrorCode::NoSpc),
        ] {
            for offset in [SIZE - 511, SIZE, u64::MAX - 100] {
                client.request(kind, NONE, offset, 512);
                assert_eq!(client.status(), Some(error), "{kind:?} at {offset}");
            }
        }
        assert_eq!(client.write(SIZE - 511, &[1; 512]), Some(ErrorCode::NoSpc));
        assert_eq!(client.write(SIZE, &[1; 1 << 20]), Some(ErrorCode::NoSpc));
        assert_eq!(client.write(SIZE - 512, &[1; 512]), None);
    }
}

#[test]
fn a_read_only_export_refuses_every_write_and_still_reads() {
    let fixture = Fixture::with(true, ServerOptions::default());
    let mut client = fixture.client(false);
    assert_eq!(client.write(0, &[1; 4096]), Some(ErrorCode::Perm));
    for kind in [CommandKind::TRIM, CommandKind::WRITE_ZEROES] {
        client.request(kind, NONE, 0, 4096);
        assert_eq!(client.status(), Some(ErrorCode::Perm));
    }
    assert_eq!(client.read(0, 4096), vec![0; 4096]);
    client.request(CommandKind::FLUSH, NONE, 0, 0);
    assert_eq!(client.status(), None);
}

#[test]
fn unknown_commands_and_flags_are_refused_and_the_session_continues() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    client.request(CommandKind(77), NONE, 0, 0);
    assert_eq!(client.status(), Some(ErrorCode::Inval));
    client.request_as(1, CommandKind::READ, 0x8000, 0, 512);
    assert_eq!(client.status(), Some(ErrorCode::Inval));
    client.request_as(1, CommandKind::WRITE, 0x8000, 0, 512);
    client.send(&[1; 512]);
    assert_eq!(client.status(), Some(ErrorCode::Inval));
    assert_eq!(client.read(0, 512), vec![0; 512]);
}

#[test]
fn empty_requests_succeed() {
    for structured in [false, true] {
        let fixture = Fixture::new();
        let mut client = fixture.client(structured);
        for kind in [CommandKind::READ, CommandKind::WRITE, CommandKind::TRIM, CommandKind::CACHE] {
            client.request(kind, NONE, 4096, 0);
            assert_eq!(client.status(), None, "{kind:?}");
        }
        assert!(fixture.disk.log().is_empty());
    }
}

#[test]
fn a_write_longer_than_the_maximum_is_received_and_refused() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    client.request(CommandKind::WRITE, NONE, 0, (32 << 20) + 1);
    for _ in 0..32 {
        client.send(&vec![1; 1 << 20]);
    }
    client.send(&[1]);
    assert_eq!(client.status(), Some(ErrorCode::Inval));
    client.request(CommandKind::READ, NONE, 0, (32 << 20) + 1);
    assert_eq!(client.status(), Some(ErrorCode::Inval));
    assert!(fixture.disk.log().is_empty());
}

#[test]
fn a_disk_error_is_reported_with_its_message() {
    let fixture = Fixture::new();
    let mut client = fixture.client(true);
    fixture.disk.fail();
    client.request(CommandKind::READ, NONE, 0, 512);
    let Answer::Chunk { kind: ChunkKind::ERROR, done: true, payload, .. } = client.answer() else {
        panic!("no error chunk");
    };
    let failure = parse_error(ChunkKind::ERROR, &payload).unwrap();
    assert_eq!((failure.error, failure.message), (ErrorCode::Io, "Input/output error"));
    let mut client = fixture.client(false);
    assert_eq!(client.write(0, &[1; 512]), Some(ErrorCode::Io));
}

#[test]
fn a_wrong_request_magic_ends_the_session_after_earlier_requests_complete() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    fixture.disk.hold();
    client.request(CommandKind::WRITE, NONE, 0, 512);
    client.send(&[7; 512]);
    client.send(&[0xff; 28]);
    fixture.until("the write is in flight", |fixture| fixture.disk.waiting() == 1);
    fixture.disk.release();
    assert_eq!(client.status(), None);
    assert!(client.is_closed());
    assert_eq!(fixture.disk.bytes(0, 512), [7; 512]);
}

#[test]
fn a_disconnect_request_ends_the_session_after_earlier_requests_complete() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    fixture.disk.hold();
    client.request(CommandKind::WRITE, NONE, 0, 512);
    client.send(&[7; 512]);
    client.request(CommandKind::DISC, NONE, 0, 0);
    fixture.until("the write is in flight", |fixture| fixture.disk.waiting() == 1);
    fixture.disk.release();
    assert_eq!(client.status(), None);
    assert!(client.is_closed());
}

#[test]
fn a_client_that_hangs_up_inside_a_write_leaves_the_disk_unchanged() {
    for sent in [0, 100, 4000, 100_000] {
        let fixture = Fixture::new();
        let mut client = fixture.client(false);
        client.request(CommandKind::WRITE, NONE, 0, 200_000);
        client.send(&vec![9; sent]);
        drop(client);
        fixture.until("the connection is gone", |fixture| fixture.server.connections() == 0);
        assert!(fixture.disk.log().is_empty());
        assert_eq!(fixture.disk.bytes(0, 4096), [0; 4096]);
    }
}

#[test]
fn a_completely_received_write_completes_although_the_client_is_gone() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    fixture.disk.hold();
    client.request(CommandKind::WRITE, NONE, 0, 4096);
    client.send(&[9; 4096]);
    fixture.until("the write is in flight", |fixture| fixture.disk.waiting() == 1);
    drop(client);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(fixture.server.connections(), 1);
    fixture.disk.release();
    fixture.until("the connection is gone", |fixture| fixture.server.connections() == 0);
    assert_eq!(fixture.disk.bytes(0, 4096), [9; 4096]);
}

#[test]
fn the_server_stops_receiving_from_a_client_that_receives_no_replies() {
    let options = ServerOptions { grace: Duration::from_millis(100), ..ServerOptions::default() };
    let fixture = Fixture::with(false, options);
    let mut client = fixture.client(false);
    let mut sent = 0_u64;
    // The client requests 4 GiB of replies. The server must stop receiving requests much earlier.
    let (stop, stopped) = std::sync::mpsc::channel();
    let sender = std::thread::spawn(move || {
        for cookie in 0..1 << 16 {
            client.request_as(cookie, CommandKind::READ, 0, 0, 65536);
        }
        stop.send(()).unwrap();
        client
    });
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) {
        sent += fixture.disk.log().len() as u64;
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(sent <= 1024, "{sent} reads were started");
    assert!(sent >= 32, "{sent} reads were started");
    let mut client = match stopped.try_recv() {
        Ok(()) => sender.join().unwrap(),
        Err(_) => {
            // The sender is blocked, as expected. The stop of the server closes the socket.
            let stopping = fixture.stop();
            drop(stopping);
            return;
        }
    };
    for _ in 0..1 << 16 {
        assert!(matches!(client.answer(), Answer::Simple { error: None, .. }));
        client.receive(65536);
    }
}

#[test]
fn a_stalled_handshake_is_closed_in_time_and_others_are_served() {
    let options =
        ServerOptions { handshake_timeout: Duration::from_millis(200), ..ServerOptions::default() };
    let fixture = Fixture::with(false, options);
    let mut silent = fixture.socket();
    let mut half = fixture.greeted();
    let mut option = Vec::new();
    put_option(&mut option, OptionKind::GO, &info_request("disk", &[]).unwrap()).unwrap();
    half.send(&option[..option.len() - 1]);
    let mut busy = fixture.client(false);
    assert_eq!(busy.write(0, &[1; 512]), None);
    let start = Instant::now();
    assert!(half.is_closed());
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), 18);
    assert!(start.elapsed() < TIMEOUT);
    // The transmission phase has no time limit.
    assert_eq!(busy.read(0, 512), [1; 512]);
}

#[test]
fn a_handshake_may_take_ten_seconds_by_default() {
    assert_eq!(ServerOptions::default().handshake_timeout, Duration::from_secs(10));
}

#[test]
fn clients_that_disconnect_during_the_handshake_do_not_disturb_the_server() {
    let fixture = Fixture::new();
    for round in 0..200 {
        let mut socket = fixture.socket();
        match round % 4 {
            0 => {}
            1 => socket.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap(),
            2 => socket.write_all(&3_u32.to_be_bytes()).unwrap(),
            _ => {
                let _ = socket.read(&mut [0; 5]);
            }
        }
    }
    fixture.until("all are gone", |fixture| fixture.server.connections() == 0);
    assert_eq!(fixture.client(false).read(0, 512), [0; 512]);
}

#[test]
fn an_export_name_of_three_thousand_bytes_is_unknown() {
    let fixture = Fixture::new();
    let mut client = fixture.greeted();
    let replies = client.option(OptionKind::GO, &info_request(&"x".repeat(3000), &[]).unwrap());
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].0, ReplyKind::ERR_UNKNOWN);
    client.acked(OptionKind::GO, &info_request("disk", &[]).unwrap());
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn an_option_of_four_gigabytes_ends_the_session() {
    let fixture = Fixture::new();
    let mut client = fixture.greeted();
    client.send(b"IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff");
    assert!(client.is_closed());
}

#[test]
fn an_option_too_large_to_parse_is_answered_and_the_session_continues() {
    let fixture = Fixture::new();
    let mut client = fixture.greeted();
    let replies = client.option(OptionKind::SET_META_CONTEXT, &vec![0; 1 << 20]);
    assert_eq!(replies[0].0, ReplyKind::ERR_TOO_BIG);
    let replies = client.option(OptionKind(99), &vec![0; 1 << 20]);
    assert_eq!(replies[0].0, ReplyKind::ERR_UNSUP);
    client.acked(OptionKind::LIST, &[]);
}

#[test]
fn stopping_completes_and_answers_requests_in_flight() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    let mut idle = fixture.client(false);
    let mut greeted = fixture.greeted();
    fixture.disk.hold();
    client.request(CommandKind::WRITE, NONE, 0, 4096);
    client.send(&[5; 4096]);
    fixture.until("the write is in flight", |fixture| fixture.disk.waiting() == 1);
    let stopping = fixture.stop();
    assert!(idle.is_closed());
    assert!(greeted.is_closed());
    fixture.disk.release();
    assert_eq!(client.status(), None);
    assert!(client.is_closed());
    stopping.wait().unwrap();
    assert_eq!(fixture.server.connections(), 0);
    assert_eq!(fixture.disk.bytes(0, 4096), [5; 4096]);
}

#[test]
fn a_closed_export_answers_requests_in_flight_and_refuses_later_ones() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    fixture.disk.hold();
    client.request(CommandKind::WRITE, NONE, 0, 4096);
    client.send(&[5; 4096]);
    fixture.until("the write is in flight", |fixture| fixture.disk.waiting() == 1);
    let closing = fixture.close_export();
    fixture.disk.release();
    assert_eq!(client.status(), None);
    closing.wait().unwrap().unwrap();
    assert_eq!(fixture.disk.bytes(0, 4096), [5; 4096]);
    assert_eq!(client.write(0, &[6; 4096]), Some(ErrorCode::Shutdown));
    client.request(CommandKind::READ, NONE, 0, 4096);
    assert_eq!(client.status(), Some(ErrorCode::Shutdown));
    assert_eq!(fixture.disk.bytes(0, 4096), [5; 4096]);
}

#[test]
fn a_client_that_receives_no_replies_does_not_prevent_the_server_from_stopping() {
    let options = ServerOptions { grace: Duration::from_millis(100), ..ServerOptions::default() };
    let fixture = Fixture::with(false, options);
    let mut client = fixture.client(false);
    for cookie in 0..4 {
        client.request_as(cookie, CommandKind::READ, 0, 0, 4 << 20);
    }
    fixture.until("reads were started", |fixture| !fixture.disk.log().is_empty());
    fixture.stop().wait().unwrap();
    assert_eq!(fixture.server.connections(), 0);
}

#[test]
fn garbage_instead_of_requests_does_not_disturb_other_clients() {
    let fixture = Fixture::new();
    let mut steady = fixture.client(false);
    let mut state = 1_u64;
    let mut random = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    for round in 0..100 {
        let mut client = fixture.client(round % 2 == 0);
        let mut bytes = Vec::new();
        for _ in 0..random() % 40 {
            // A request header with the right magic number and random values.
            let raw = RawRequest {
                flags: u16::try_from(random() % 40).unwrap(),
                kind: CommandKind(u16::try_from(random() % 10).unwrap()),
                cookie: random(),
                offset: if random() % 4 == 0 { u64::MAX - random() } else { random() % SIZE },
                length: u32::try_from(random() % 10_000).unwrap(),
            };
            bytes.extend_from_slice(&raw.to_bytes());
            if random() % 10 == 0 {
                bytes.truncate(bytes.len() - 5);
            }
        }
        // The server may close the connection before it has received all bytes.
        let _ = client.socket.write_all(&bytes);
        drop(client);
        assert_eq!(steady.write(round * 512, &pattern(512, 1)), None);
    }
    fixture.until("the others are gone", |fixture| fixture.server.connections() == 1);
}

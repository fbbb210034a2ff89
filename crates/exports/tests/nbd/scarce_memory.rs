//! Tests with clients that make the server hold as much memory as possible. Other clients must still be served.

use std::time::{Duration, Instant};

use oxblk_exports::nbd::ServerOptions;
use oxblk_nbd::proto::CommandKind;

use crate::client::{Answer, Client, Fixture, TIMEOUT};
use crate::{NONE, pattern};

const MIB: usize = 1 << 20;

fn fixture(memory: usize, stall_timeout: Duration) -> Fixture {
    Fixture::with(false, ServerOptions { memory, stall_timeout, ..ServerOptions::default() })
}

/// Bytes of the requests of one kind that have reached the disk.
fn started(fixture: &Fixture, kind: &str) -> usize {
    let log = fixture.disk.log();
    let lengths = log.iter().filter_map(|line| line.strip_prefix(kind)?.split('+').nth(1));
    lengths.map(|len| len.parse::<usize>().unwrap()).sum()
}

/// Writes and reads less data than the allowance.
fn is_served(client: &mut Client) {
    assert_eq!(client.write(0, &pattern(100_000, 3)), None);
    assert!(client.read(0, 100_000) == pattern(100_000, 3));
}

#[test]
fn clients_that_receive_no_replies_hold_no_more_than_the_budget() {
    let fixture = fixture(4 * MIB, TIMEOUT);
    let mut steady = fixture.client(false);
    let mut greedy: Vec<_> = (0..12).map(|_| fixture.client(false)).collect();
    for client in &mut greedy {
        for cookie in 0..256 {
            client.request_as(cookie, CommandKind::READ, 0, cookie * 65536, 65536);
        }
    }
    // The server stops reading from the disk long before it has read all requested data.
    let (mut bytes, mut quiet) = (0, Instant::now());
    while quiet.elapsed() < Duration::from_millis(300) {
        let more = started(&fixture, "read ");
        if more > 0 {
            (bytes, quiet) = (bytes + more, Instant::now());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // The limit is the sum of the budget, one overdraft (at most the limit of one connection), and for each connection its
    // allowance and the size of the socket buffer.
    let most = 4 * MIB + 16 * MIB + 12 * MIB;
    assert!(bytes <= most, "{bytes} bytes are held");
    is_served(&mut steady);
    for client in &mut greedy {
        for _ in 0..256 {
            assert!(matches!(client.answer(), Answer::Simple { error: None, .. }));
            client.receive(65536);
        }
    }
}

#[test]
fn clients_that_receive_no_replies_are_closed_when_others_wait_for_memory() {
    let fixture = fixture(4 * MIB, Duration::from_secs(1));
    let mut steady = fixture.client(false);
    let mut greedy: Vec<_> = (0..6).map(|_| fixture.client(false)).collect();
    for client in &mut greedy {
        for cookie in 0..8 {
            client.request_as(cookie, CommandKind::READ, 0, 0, 2 << 20);
        }
    }
    fixture.until("reads were started", |fixture| !fixture.disk.log().is_empty());
    is_served(&mut steady);
    for _ in 0..4 {
        assert_eq!(steady.write(0, &pattern(8 * MIB, 1)), None);
    }
    assert!(steady.read(0, 8 << 20) == pattern(8 * MIB, 1));
    assert!(fixture.server.connections() < 7, "no connection was closed");
}

#[test]
fn clients_that_stop_inside_a_write_do_not_block_other_writers() {
    let fixture = fixture(8 * MIB, Duration::from_secs(1));
    let mut steady = fixture.client(false);
    let halves: Vec<_> = (0..6)
        .map(|_| {
            let mut client = fixture.client(false);
            std::thread::spawn(move || {
                client.request(CommandKind::WRITE, NONE, 0, 32 << 20);
                // The server may close the connection.
                let _ = client.socket.write_all(&vec![1; 16 * MIB]);
                client
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    is_served(&mut steady);
    for round in 0..3 {
        assert_eq!(steady.write(0, &pattern(8 * MIB, round)), None);
        assert!(steady.read(0, 8 << 20) == pattern(8 * MIB, round));
    }
    is_served(&mut steady);
    for half in halves {
        drop(half.join().unwrap());
    }
}

#[test]
fn writes_of_more_than_the_budget_all_complete() {
    let fixture = fixture(MIB, TIMEOUT);
    let writers: Vec<_> = (0_u64..8)
        .map(|index| {
            let mut client = fixture.client(false);
            std::thread::spawn(move || {
                let data = pattern(8 * MIB, usize::try_from(index).unwrap());
                for _ in 0..3 {
                    assert_eq!(client.write(index << 23, &data), None);
                }
                assert!(client.read(index << 23, 8 << 20) == data);
            })
        })
        .collect();
    for writer in writers {
        writer.join().unwrap();
    }
}

//! Tests of the limit on connections, with more clients than the limit allows.

use std::sync::{Arc, Barrier};

use oxblk_exports::nbd::ServerOptions;

use crate::client::{Client, Fixture, Socket};

fn with_places(max_connections: usize) -> Fixture {
    Fixture::with(false, ServerOptions { max_connections, ..ServerOptions::default() })
}

#[test]
fn a_client_over_the_limit_is_refused_and_a_later_client_below_it_is_served() {
    let fixture = with_places(2);
    let first = fixture.client(false);
    let mut second = fixture.client(false);
    for _ in 0..3 {
        let mut third = fixture.socket();
        // The connection ends without any data.
        assert!(matches!(third.read(&mut [0; 18]), Ok(0) | Err(_)));
    }
    assert_eq!(second.write(0, &[1; 512]), None);
    drop(first);
    fixture.until("the first connection has ended", |fixture| fixture.server.connections() == 1);
    assert_eq!(fixture.client(false).read(0, 512), [1; 512]);
}

#[test]
fn clients_that_stay_in_the_handshake_do_not_block_new_clients() {
    let fixture = with_places(4);
    let mut steady = fixture.client(false);
    let mut silent: Vec<_> = (0..3).map(|_| fixture.greeted()).collect();
    fixture.until("the server is full", |fixture| fixture.server.connections() == 4);
    assert_eq!(fixture.client(false).write(0, &[2; 512]), None);
    // The oldest handshake was cancelled.
    assert!(silent[0].is_closed());
    assert_eq!(steady.read(0, 512), [2; 512]);
}

#[test]
fn a_flood_of_silent_clients_does_not_disturb_working_clients() {
    let fixture = with_places(8);
    let mut steady = fixture.client(false);
    let mut sockets = Vec::new();
    for round in 0..200 {
        sockets.push(fixture.socket());
        if round % 50 == 0 {
            assert_eq!(fixture.client(false).write(0, &[3; 512]), None);
        }
    }
    assert_eq!(steady.read(0, 512), [3; 512]);
    assert!(fixture.server.connections() <= 8);
}

#[test]
fn clients_with_more_than_a_hundred_connections_are_served_by_default() {
    let fixture = Fixture::new();
    let mut clients: Vec<Client> = (0..192).map(|_| fixture.client(false)).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.write(u64::try_from(index).unwrap() * 512, &[7; 512]), None);
    }
    assert_eq!(fixture.server.connections(), 192);
}

#[test]
fn simultaneous_connections_never_exceed_the_limit() {
    let fixture = Arc::new(with_places(5));
    let start = Arc::new(Barrier::new(8));
    let threads: Vec<_> = (0..8)
        .map(|index| {
            let (fixture, start) = (Arc::clone(&fixture), Arc::clone(&start));
            std::thread::spawn(move || {
                start.wait();
                for _ in 0..20 {
                    let socket =
                        if index % 2 == 0 { fixture.socket() } else { fixture.tcp_socket() };
                    assert!(fixture.server.connections() <= 5);
                    drop(socket);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    // Sockets that were closed while they waited in the queue of a listener still count as connections for a short time.
    let is_greeted = |mut socket: Box<dyn Socket>| socket.read_exact(&mut [0; 18]).is_ok();
    fixture.until("the TCP queue is empty", |fixture| is_greeted(fixture.tcp_socket()));
    fixture.until("the Unix queue is empty", |fixture| is_greeted(fixture.socket()));
    assert_eq!(fixture.client(false).read(0, 512), [0; 512]);
}

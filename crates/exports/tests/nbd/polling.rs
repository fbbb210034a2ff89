//! A test with I/O threads that poll for completions before they sleep.

use std::time::Duration;

use oxblk_exports::nbd::ServerOptions;
use oxblk_ring::Config;

use crate::client::Fixture;
use crate::pattern;

#[test]
fn polling_threads_serve_and_stop_like_other_threads() {
    for poll in [Duration::from_micros(20), Duration::from_millis(5)] {
        let config = Config { poll: Some(poll), ..Config::default() };
        let fixture = Fixture::on(&config, false, ServerOptions::default());
        let clients: Vec<_> = (0_u64..4)
            .map(|index| {
                let mut client = fixture.client(index % 2 == 0);
                client.structured = false;
                std::thread::spawn(move || {
                    for round in 0..50 {
                        let offset = index << 20 | round << 12;
                        let data = pattern(4096, usize::try_from(offset >> 12).unwrap());
                        assert_eq!(client.write(offset, &data), None);
                        // In some rounds, wait longer than the I/O thread polls.
                        if round % 10 == 0 {
                            std::thread::sleep(2 * Duration::from_millis(5));
                        }
                    }
                    client
                })
            })
            .collect();
        let mut clients: Vec<_> =
            clients.into_iter().map(|client| client.join().unwrap()).collect();
        for index in 0..4 {
            let expected = pattern(4096, index << 8);
            assert!(fixture.disk.bytes(index << 20, 4096) == expected);
        }
        // Idle connections do not prevent a polling server from stopping.
        fixture.stop().wait().unwrap();
        assert_eq!(fixture.server.connections(), 0);
        assert!(clients.iter_mut().all(crate::client::Client::is_closed));
    }
}

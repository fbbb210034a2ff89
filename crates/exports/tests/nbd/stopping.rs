//! A test that stops a server after one of its I/O threads has ended.

use oxblk_exports::nbd::{Export, Server, ServerOptions};
use oxblk_ring::{Address, Config, IoThread, Listener, block_on, block_on_with};

use std::os::unix::net::UnixStream;

use crate::client::Client;
use crate::memory::Disk;

#[test]
fn a_server_whose_first_thread_has_ended_stops() {
    let dir = tempfile::tempdir().unwrap();
    let ended = block_on_with(Config::default(), async { IoThread::current() });
    let start = |name| IoThread::start(name, Config::default()).unwrap();
    let threads = vec![ended.unwrap().unwrap(), start("nbd")];
    let backend = Disk::new(1 << 20).backend(false);
    let export = Export { name: "disk".to_owned(), description: None, backend, read_only: false };
    let server = Server::new(vec![export], threads, ServerOptions::default()).unwrap();
    let listener = Listener::bind(&Address::Unix(dir.path().join("nbd.sock"))).unwrap();
    let (accept, serving) = (start("accept"), server.clone());
    let served = accept.spawn(move || async move { serving.serve(listener).await });
    // Clients are served by the other thread.
    for _ in 0..2 {
        drop(Client::greet(Box::new(UnixStream::connect(dir.path().join("nbd.sock")).unwrap())));
    }
    block_on(server.stop());
    served.wait().unwrap().unwrap();
}

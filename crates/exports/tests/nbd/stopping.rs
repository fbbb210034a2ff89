//! Tests of servers with an I/O thread that has ended or is closing.

use oxblk_exports::nbd::{Export, Server, ServerOptions};
use oxblk_ring::{Address, Config, IoThread, Listener, block_on, block_on_with};

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::client::Client;
use crate::memory::Disk;

#[test]
fn a_server_whose_first_thread_has_ended_stops() {
    let ended = block_on_with(Config::default(), async { IoThread::current() });
    serve_beside(ended.unwrap().unwrap());
}

/// A value whose destructor reports that it runs, and then waits.
struct SlowToDrop {
    begun: Sender<()>,
    end: Receiver<()>,
}

impl Drop for SlowToDrop {
    fn drop(&mut self) {
        self.begun.send(()).unwrap();
        // The wait ends when the sender is dropped.
        let _ = self.end.recv();
    }
}

#[test]
fn a_thread_that_is_closing_gets_no_clients() {
    let ((begun, has_begun), (end, ends)) = (channel(), channel());
    let (thread, threads) = channel();
    let closing = std::thread::spawn(move || {
        let work = async {
            oxblk_ring::spawn(async move {
                let _kept = SlowToDrop { begun, end: ends };
                std::future::pending::<()>().await;
            })
            .detach();
            oxblk_ring::yield_now().await;
            thread.send(IoThread::current().unwrap()).unwrap();
        };
        block_on_with(Config::default(), work).unwrap();
    });
    has_begun.recv().unwrap();
    serve_beside(threads.recv().unwrap());
    drop(end);
    closing.join().unwrap();
}

/// Serves clients with `thread` and another thread, and stops the server.
fn serve_beside(thread: IoThread) {
    let dir = tempfile::tempdir().unwrap();
    let start = |name| IoThread::start(name, Config::default()).unwrap();
    let threads = vec![thread, start("nbd")];
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

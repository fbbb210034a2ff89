//! Serves a disk over NBD until Enter is pressed: `serve_nbd IMAGE SOCKET`.

use std::path::Path;

use oxblk::ring::Address;
use oxblk::{Disk, NbdServer, Result};

fn main() -> Result<()> {
    let mut names = std::env::args_os().skip(1);
    let (Some(image), Some(socket)) = (names.next(), names.next()) else {
        panic!("usage: serve_nbd IMAGE SOCKET");
    };
    run(image.as_ref(), socket.as_ref(), || {
        let _ = std::io::stdin().read_line(&mut String::new());
    })
}

/// Serves the disk at the socket until `until` returns.
pub fn run(image: &Path, socket: &Path, until: impl FnOnce()) -> Result<()> {
    let disk = Disk::open(image).wait()?;
    let server = NbdServer::start(&[("", &disk)], &Address::Unix(socket.to_owned()))?;
    println!("serving at {}", server.address());
    until();
    server.stop().wait()?;
    disk.close().wait()
}

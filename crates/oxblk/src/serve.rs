//! [`NbdServer`]: serves disks to other programs over NBD.

use std::sync::{Mutex, PoisonError};

use oxblk_core::{Error, Result};
use oxblk_exports::nbd::{Export, Server, ServerOptions};
use oxblk_ring::{Address, Listener, Remote};

use crate::{Disk, IoThreads, Request, SocketFile};

/// An NBD server for one or more disks.
///
/// The server runs until it is [stopped](Self::stop) or dropped. `stop` waits until all connections have ended; a drop starts
/// the same stop and does not wait. Both remove the socket file of a Unix address. The server does not close a disk to which
/// the caller still has a handle.
///
/// ```no_run
/// # fn main() -> oxblk::Result<()> {
/// use oxblk::{Disk, NbdServer};
/// use oxblk::ring::Address;
///
/// let disk = Disk::open("disk.qcow2").wait()?;
/// let server = NbdServer::start(&[("", &disk)], &Address::Unix("/tmp/disk.sock".into()))?;
/// println!("qemu-img info nbd+unix:///?socket=/tmp/disk.sock");
/// # let signal_comes = || {};
/// signal_comes();
/// server.stop().wait()?;
/// disk.close().wait()
/// # }
/// ```
pub struct NbdServer {
    server: Server,
    threads: IoThreads,
    address: Address,
    /// `None` after the stop has begun.
    running: Option<Running>,
}

/// The parts of a server that are released when the server stops.
struct Running {
    /// These handles keep the disks open while they are served.
    disks: Vec<Disk>,
    socket: Option<SocketFile>,
    /// The task that accepts connections. Dropping this handle does not end the task.
    accepting: Mutex<Option<Remote<std::io::Result<()>>>>,
}

impl NbdServer {
    /// Serves each disk under its name. A client that sends no name gets the first disk. The path of a Unix socket must not
    /// exist.
    ///
    /// # Errors
    /// If the server cannot listen at the address, or if there is no disk or no I/O thread.
    pub fn start(disks: &[(&str, &Disk)], address: &Address) -> Result<Self> {
        let [(_, first), ..] = disks else {
            return Err(Error::invalid("An NBD server needs a disk to serve"));
        };
        let export = |(name, disk): &(&str, &Disk)| Export {
            name: (*name).to_owned(),
            description: None,
            backend: disk.backend().clone(),
            read_only: disk.is_read_only(),
        };
        let exports = disks.iter().map(export).collect();
        let listener = Listener::bind(address)
            .map_err(|error| Error::from(error).prefix(format!("Could not listen at {address}")))?;
        let address = listener.local_address();
        let socket = match &address {
            Address::Unix(path) => SocketFile::new(path),
            Address::Tcp { .. } => None,
        };
        let threads = first.threads().clone();
        let server = Server::new(exports, threads.threads().to_vec(), ServerOptions::default())?;
        let accepting = {
            let server = server.clone();
            threads.spawn(move || async move { server.serve(listener).await })
        };
        let disks = disks.iter().map(|(_, disk)| Disk::clone(disk)).collect();
        let running = Some(Running { disks, socket, accepting: Mutex::new(accepting) });
        Ok(Self { server, threads, address, running })
    }

    /// The address at which the server listens. If the system has chosen the port, the address contains this port.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The number of open connections.
    pub fn connections(&self) -> usize {
        self.server.connections()
    }

    /// Stops listening, lets each connection finish the requests that it has received, and completes when all connections
    /// have ended. Connections that have not ended after 10 seconds are closed.
    ///
    /// # Errors
    /// If the listening socket failed while the server ran.
    pub fn stop(mut self) -> Request<()> {
        let running = self.running.take();
        self.begin_stop(running)
    }

    /// Begins the stop. The stop runs to completion, even if nobody awaits the request. The socket file is removed first.
    fn begin_stop(&self, running: Option<Running>) -> Request<()> {
        let server = self.server.clone();
        let running = running.map(|Running { disks, socket, accepting }| {
            drop(socket);
            (disks, accepting)
        });
        Request::begin(&self.threads, move || async move {
            server.stop().await;
            let Some((disks, accepting)) = running else { return Ok(()) };
            let accepting = accepting.into_inner().unwrap_or_else(PoisonError::into_inner);
            // Release the disks after all connections have ended, because connections use the disks.
            for disk in disks {
                disk.release().await;
            }
            let listened = match accepting {
                Some(accepting) => accepting.await.unwrap_or(Ok(())),
                None => Ok(()),
            };
            listened.map_err(Error::from)
        })
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            // Nobody waits for the stop to end. The disks stay open until all connections have ended.
            drop(self.begin_stop(Some(running)));
        }
    }
}

impl std::fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdServer").field("address", &self.address).finish_non_exhaustive()
    }
}

//! `oxblk serve`: serves an image over NBD. The command needs only the path of the image.
//!
//! | file | purpose |
//! |---|---|
//! | `options` | the command line |
//! | `disk` | creating the image if it does not exist, and opening it |
//! | `address` | addresses to listen at; socket files left over from a killed server |
//! | `attach` | the announcement, with commands that attach to the disk |
//! | `partitions` | the partition table of the disk, for these commands |
//! | `signals` | a future that completes when a signal arrives |
//!
//! The thread that runs the command is the first I/O thread; `--threads` adds others. At the end, the server removes
//! the socket files, stops accepting connections, lets connections finish the requests that they have received, and
//! then flushes and closes the image. The process exits after these steps. So exit code 0 means that all data of
//! completed writes is on stable storage.

mod address;
mod attach;
mod disk;
mod options;
mod partitions;
mod signals;

use crate::flags::help;
use crate::log;
use crate::program::{note, out};
use address::Endpoint;
use disk::Disk;
pub(crate) use options::PAGE;
use options::{Options, Parsed};
use oxblk::IoThreads;
use oxblk_exports::nbd::{Export, Server, ServerOptions};
use oxblk_ring::{Config, IoThread, block_on_with};
use signals::Signals;
use std::fmt::Display;
use std::future::{Future, poll_fn};
use std::process::ExitCode;
use std::task::Poll;

/// A result whose error is a message to the user.
type Result<T> = std::result::Result<T, String>;

/// Runs `oxblk serve` with the arguments after `serve`.
pub(crate) fn run(arguments: Vec<String>) -> ExitCode {
    let options = match options::parse(arguments) {
        Ok(Parsed::Help) => {
            out(format_args!("{}", help::text(&options::PAGE, "oxblk serve", &[])));
            return ExitCode::SUCCESS;
        }
        Ok(Parsed::Answered) => return ExitCode::SUCCESS,
        Ok(Parsed::Serve(options)) => options,
        Err(message) => return fail(format_args!("{message}\nTry 'oxblk serve --help'.")),
    };
    log::start_for_server();
    match block_on_with(Config::default(), serve(*options)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(message)) => fail(message),
        Err(error) => fail(format_args!("Cannot start an I/O thread: {error}")),
    }
}

fn fail(message: impl Display) -> ExitCode {
    log::print_error(format_args!("oxblk serve: {message}"));
    ExitCode::FAILURE
}

async fn serve(options: Options) -> Result<()> {
    let signals = Signals::new().map_err(|error| format!("Cannot catch signals: {error}"))?;
    let disk = disk::open(&options).await?;
    let served = match signals.has_arrived() {
        true => Ok(()),
        false => listen_and_serve(&options, &disk, signals).await,
    };
    let closed = disk.backend.close().await;
    served.and(closed.map_err(|error| format!("Could not close '{}': {error}", disk.name)))
}

async fn listen_and_serve(options: &Options, disk: &Disk, signals: Signals) -> Result<()> {
    let mut addresses: Vec<_> = options.addresses.iter().map(|listen| &listen.address).collect();
    let default = address::default_for(&disk.name);
    if addresses.is_empty() {
        addresses.push(&default);
    }
    let mut endpoints = addresses.into_iter().map(Endpoint::bind).collect::<Result<Vec<_>>>()?;
    check_descriptors(endpoints.len())?;
    let server = server(options, disk)?;
    // Check again, since the I/O threads of the server have opened descriptors too.
    check_descriptors(endpoints.len())?;
    warn_of_exposure(&endpoints, options.read_only || disk.backend.is_read_only());
    let mountable = partitions::mountable(&disk.backend).await.unwrap_or_else(|error| {
        tracing::warn!("cannot read the partition table of '{}': {error}", disk.name);
        partitions::Mountable::Disk
    });
    // A failed write to standard output does not end the server.
    note(format_args!("{}", attach::announcement(options, disk, &endpoints, mountable)));
    let tasks: Vec<_> = endpoints
        .iter_mut()
        .filter_map(Endpoint::take_listener)
        .map(|listener| {
            let server = server.clone();
            oxblk_ring::spawn(async move { server.serve(listener).await })
        })
        .collect();
    let ended = first_end(tasks, signals).await;
    // Remove the socket files first, so that no client finds a socket without a listener.
    drop(endpoints);
    server.stop().await;
    ended
}

/// Warns about addresses to which other machines can connect, because the server has neither encryption nor passwords.
fn warn_of_exposure(endpoints: &[Endpoint], read_only: bool) {
    let may = if read_only { "read" } else { "read and write" };
    for address in endpoints.iter().filter_map(Endpoint::exposed) {
        tracing::warn!(
            "every machine that can connect to {address} can {may} the disk, without encryption and without a password"
        );
    }
}

/// Checks that the process can open the descriptors that the listeners and one client need.
fn check_descriptors(listeners: usize) -> Result<()> {
    // Each listener keeps one spare descriptor.
    let opened: std::io::Result<Vec<_>> =
        (0..=listeners).map(|_| std::fs::File::open("/dev/null")).collect();
    match opened {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("Cannot serve any client: {error}")),
    }
}

/// Waits for a signal, or for a listener to fail.
async fn first_end(
    mut tasks: Vec<oxblk_ring::Task<std::io::Result<()>>>,
    signals: Signals,
) -> Result<()> {
    let mut signal = Box::pin(signals.next());
    poll_fn(|cx| {
        if signal.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        for task in &mut tasks {
            if let Poll::Ready(Err(error)) = std::pin::Pin::new(task).poll(cx) {
                return Poll::Ready(Err(format!("Cannot accept connections: {error}")));
            }
        }
        Poll::Pending
    })
    .await
}

/// Creates the server with its I/O threads, which include the calling thread.
fn server(options: &Options, disk: &Disk) -> Result<Server> {
    let started = |error| format!("Cannot start an I/O thread: {error}");
    let mut threads: Vec<IoThread> = IoThread::current().into_iter().collect();
    let (others, shortage) = IoThreads::start_up_to(options.threads.saturating_sub(1));
    threads.extend_from_slice(others.threads());
    if let Some(error) = shortage {
        tracing::warn!("using {} of {} threads: {error}", threads.len(), options.threads);
    }
    let export = Export {
        name: options.export_name.clone(),
        description: options.description.clone(),
        backend: disk.backend.clone(),
        read_only: options.read_only,
    };
    let mut limits = ServerOptions::default();
    if let Some(connections) = options.max_connections {
        limits.max_connections = connections;
    }
    Server::new(vec![export], threads, limits).map_err(started)
}

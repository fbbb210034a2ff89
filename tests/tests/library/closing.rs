//! Disks that are closed by a call, and disks that are dropped without a close.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use oxblk::ring::Address;
use oxblk::{Create, Disk, ErrorKind, Format, NbdServer};
use oxblk_tests::scratch::in_memory;

fn image(folder: &Path) -> PathBuf {
    let path = folder.join("disk.qcow2");
    Create::new(&path, Format::Qcow2, 4 << 20).run().wait().unwrap();
    path
}

/// Returns the number of descriptors of this process that refer to the file.
fn descriptors(path: &Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    links
        .filter(|link| std::fs::read_link(link.as_ref().unwrap().path()).is_ok_and(|to| to == path))
        .count()
}

fn assert_holds(path: &Path, byte: u8) {
    let check = Command::new("qemu-img").arg("check").arg(path).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    let command = format!("read -P {byte} 0 64k");
    let read = Command::new("qemu-io").args(["-c", &command]).arg(path).output().unwrap();
    let read = String::from_utf8_lossy(&read.stdout).into_owned();
    assert!(!read.contains("failed") && read.contains("65536/65536"), "{read}");
}

#[test]
fn a_disk_that_is_dropped_is_closed_and_the_log_reports_this() {
    let folder = in_memory();
    let path = image(folder.path());
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let disk = Disk::open(&path).wait().unwrap();
        disk.write(0, vec![5; 65536]).wait().unwrap();
        drop(disk);
    });
    assert_eq!(descriptors(&path), 0);
    assert_holds(&path, 5);
    assert!(log.text().contains("dropped without being closed"), "{}", log.text());
    // The open succeeds because the locks of the file have been released.
    let again = Disk::open(&path).wait().unwrap();
    again.close().wait().unwrap();
}

#[test]
fn a_disk_that_is_closed_is_closed_for_every_handle_and_nothing_is_logged() {
    let folder = in_memory();
    let path = image(folder.path());
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let disk = Disk::open(&path).wait().unwrap();
        let other = disk.clone();
        disk.write(0, vec![5; 65536]).wait().unwrap();
        disk.close().wait().unwrap();
        assert_eq!(descriptors(&path), 0);
        let error = other.read(0, 512).wait().unwrap_err();
        assert_eq!(error.to_string(), "The disk is closed");
        assert!(other.close().wait().is_err());
    });
    assert_eq!(log.text(), "");
    assert_holds(&path, 5);
}

#[test]
fn a_close_whose_future_is_dropped_runs_to_completion() {
    let folder = in_memory();
    let path = image(folder.path());
    let disk = Disk::open(&path).wait().unwrap();
    disk.write(0, vec![5; 65536]).wait().unwrap();
    drop(disk.close());
    // The I/O threads end when the close has completed.
    while descriptors(&path) > 0 {
        std::thread::yield_now();
    }
    assert_holds(&path, 5);
}

#[test]
fn a_disk_that_is_dropped_on_an_io_thread_is_closed_in_the_background() {
    let folder = in_memory();
    let path = image(folder.path());
    let disk = Disk::open(&path).wait().unwrap();
    disk.write(0, vec![5; 65536]).wait().unwrap();
    let threads = disk.threads().clone();
    let dropped = threads.threads()[0].spawn(move || async move { drop(disk) });
    dropped.wait().unwrap();
    while descriptors(&path) > 0 {
        std::thread::yield_now();
    }
    assert_holds(&path, 5);
}

#[test]
fn a_server_keeps_all_its_disks_open() {
    let folder = in_memory();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let open = |path: &Path| {
        Create::new(path, Format::Qcow2, 4 << 20).run().wait().unwrap();
        Disk::open(path).wait().unwrap()
    };
    let (one, two) = (open(&one), open(&two));
    let address = Address::Unix(folder.path().join("socket"));
    let server = NbdServer::start(&[("one", &one), ("two", &two)], &address).unwrap();
    let backends = [one.backend().clone(), two.backend().clone()];
    drop((one, two));
    assert!(backends.iter().all(|backend| backend.node().is_ok()));
    server.stop().wait().unwrap();
    assert!(backends.iter().all(|backend| backend.node().is_err()));
}

#[test]
fn a_server_that_is_dropped_closes_its_disks_after_its_connections() {
    let folder = in_memory();
    let path = image(folder.path());
    let disk = Disk::open(&path).wait().unwrap();
    let socket = folder.path().join("socket");
    let server = NbdServer::start(&[("", &disk)], &Address::Unix(socket.clone())).unwrap();
    let backend = disk.backend().clone();
    drop(disk);
    let client = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    while server.connections() == 0 {
        std::thread::yield_now();
    }
    drop(server);
    drop(client);
    while backend.node().is_ok() {
        std::thread::yield_now();
    }
}

#[test]
fn a_request_outside_the_disk_is_refused() {
    let folder = in_memory();
    let disk = Disk::open(image(folder.path())).wait().unwrap();
    for error in [
        disk.read(4 << 20, 1).wait().unwrap_err(),
        disk.read(0, usize::MAX).wait().unwrap_err(),
        disk.read(u64::MAX, 1).wait().unwrap_err(),
        disk.write(4 << 20, vec![0]).wait().unwrap_err(),
        disk.extent_at(4 << 20).wait().unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    }
    disk.close().wait().unwrap();
}

/// The log output of a test.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

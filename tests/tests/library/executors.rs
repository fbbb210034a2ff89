//! Disks on plain threads, on tokio and on I/O threads.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use oxblk::ring::Address;
use oxblk::{Create, Disk, Format, IoThreads, NbdServer};
use oxblk_tests::scratch::in_memory;

fn image(folder: &Path) -> PathBuf {
    let path = folder.join("disk.qcow2");
    Create::new(&path, Format::Qcow2, 4 << 20).run().wait().unwrap();
    path
}

#[test]
fn requests_are_awaited_in_tasks_of_tokio() {
    let folder = in_memory();
    let path = image(folder.path());
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    tokio.block_on(async {
        let disk = Disk::open(&path).await.unwrap();
        let tasks: Vec<_> = (0..32_u8)
            .map(|number| {
                let disk = disk.clone();
                tokio::spawn(async move {
                    let offset = u64::from(number) * 65536;
                    disk.write(offset, vec![number; 65536]).await?;
                    disk.flush().await?;
                    disk.read(offset, 65536).await
                })
            })
            .collect();
        for (number, task) in (0..).zip(tasks) {
            assert!(task.await.unwrap().unwrap().iter().all(|byte| *byte == number));
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn a_server_with_a_client_stops_on_tokio() {
    let folder = in_memory();
    let (path, socket) = (image(folder.path()), folder.path().join("socket"));
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    tokio.block_on(async {
        let disk = Disk::open(&path).await.unwrap();
        let server = NbdServer::start(&[("", &disk)], &Address::Unix(socket.clone())).unwrap();
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let mut client = Command::new("qemu-io")
            .args(["-f", "raw", &uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        while server.connections() == 0 {
            tokio::task::yield_now().await;
        }
        // The client stays connected while the server stops.
        let stopping = server.stop();
        client.stdin.take().unwrap().write_all(b"quit\n").unwrap();
        stopping.await.unwrap();
        client.wait().unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn blocking_wait_on_an_io_thread_is_refused() {
    let folder = in_memory();
    let disk = Disk::open(image(folder.path())).wait().unwrap();
    let other = disk.clone();
    let refused = disk.run(move |_| async move { Ok(other.read(0, 512).wait().unwrap_err()) });
    let error = refused.wait().unwrap();
    assert_eq!(error.to_string(), "An I/O thread cannot wait for a request: await it instead");
    let other = disk.clone();
    let read = disk.run(move |_| async move { other.read(0, 512).await }).wait().unwrap();
    assert_eq!(read.len(), 512);
    disk.close().wait().unwrap();
}

#[test]
fn a_cursor_reads_writes_and_seeks_like_a_file() {
    let folder = in_memory();
    let disk = Disk::open(image(folder.path())).wait().unwrap();
    let mut cursor = disk.cursor();
    cursor.seek(SeekFrom::Start((4 << 20) - 3)).unwrap();
    cursor.write_all(b"abc").unwrap();
    assert!(cursor.write_all(b"d").is_err());
    cursor.flush().unwrap();
    cursor.seek(SeekFrom::End(-3)).unwrap();
    let mut rest = Vec::new();
    cursor.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"abc");
    assert!(cursor.seek(SeekFrom::Current(-(5 << 20))).is_err());
    drop(cursor);
    disk.close().wait().unwrap();
}

#[test]
fn disks_share_io_threads_or_have_their_own() {
    let folder = in_memory();
    let path = image(folder.path());
    let own = IoThreads::start(2).unwrap();
    let disk = Disk::options().threads(own.clone()).open(&path).wait().unwrap();
    assert_eq!(disk.threads().threads().len(), 2);
    let backend = disk.run(|backend| async move { Ok(backend.size()) }).wait().unwrap();
    assert_eq!(backend, disk.size());
    disk.close().wait().unwrap();
}

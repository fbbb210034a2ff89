//! `oxblk serve` as a user meets it: what it makes, prints, refuses and leaves behind.

#[path = "nbd_peers/served.rs"]
mod served;

use oxblk_tests::program::Program;
use served::Served;
use std::os::unix::net::UnixListener;
use std::path::Path;

fn refusal(dir: &Path, args: &[&str]) -> String {
    let reply = Program::oxblk().arg("serve").args(args).directory(dir).run();
    assert_eq!(reply.code(), 1, "{args:?}: {}{}", reply.out(), reply.err());
    assert_eq!(reply.out(), "");
    let error = reply.err();
    assert!(error.starts_with("oxblk serve: "), "{error}");
    error
}

#[test]
fn the_commands_that_it_prints_work_as_they_stand() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a socket");
    let mut server = Program::oxblk()
        .args(["serve", "my disk.raw", "-f", "raw", "--size", "64M", "--export-name", "x y"])
        .arg("--nbd")
        .arg(&socket)
        .directory(dir.path())
        .start();
    server.wait_for_socket(&socket);
    let uri =
        format!("nbd+unix:///x%20y?socket={}", socket.display().to_string().replace(' ', "%20"));
    for command in [
        format!("nbdinfo '{uri}'"),
        format!("nbdcopy '{uri}' copy.raw"),
        format!("qemu-img convert -f raw -O raw '{uri}' copy.raw"),
    ] {
        Program::new("sh").arg("-c").arg(command).directory(dir.path()).succeed();
    }
    let printed = server.stop();
    assert!(printed.starts_with("Made and serving 'my disk.raw' (raw, 64 MiB, read-write)\n"));
    assert!(printed.contains(&format!("  nbdinfo '{uri}'\n")), "{printed}");
    assert!(printed.contains(&format!("  nbdcopy '{uri}' copy.raw\n")), "{printed}");
    assert!(printed.contains(&format!("-drive file='{uri}',format=raw,if=virtio\n")), "{printed}");
    let client = format!("nbd-client -unix '{}' /dev/nbd0 -name 'x y'", socket.display());
    assert!(printed.contains(&client), "{printed}");
}

#[test]
fn a_socket_of_a_dead_server_is_taken_over_and_one_of_a_living_server_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(dir.path(), &["d", "-f", "raw", "--size", "64M"]);
    std::fs::write(dir.path().join("e"), vec![0; 1 << 20]).unwrap();
    let error = refusal(dir.path(), &["e", "-f", "raw", "--nbd", "nbd.sock"]);
    assert!(error.contains("Another server listens on 'nbd.sock' already"), "{error}");
    served.kill();
    assert!(dir.path().join("nbd.sock").exists());
    let served = Served::start(dir.path(), &["d", "-f", "raw"]);
    Program::new("nbdinfo").arg(served.uri()).succeed();
    served.stop();
}

#[test]
fn what_cannot_be_served_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let _living = UnixListener::bind(dir.path().join("taken")).unwrap();
    std::fs::write(dir.path().join("d"), vec![0; 1 << 20]).unwrap();
    for (args, part) in [
        (&["absent"][..], "Could not open 'absent': No such file or directory"),
        (&["no/such/dir/d", "--size", "1M"], "Could not create 'no/such/dir/d'"),
        (&["d", "-f", "nonsense"], "nonsense"),
        (&["d", "-f", "raw", "--nbd", "taken"], "Another server"),
        (&["d", "-f", "raw", "--nbd", "d"], "is not a socket"),
        (&["d", "-f", "raw", "--nbd", "no/such/dir/s"], "Cannot listen on"),
        (&["d", "-f", "raw", "--nbd", "203.0.113.1:10809"], "Cannot listen on"),
    ] {
        let error = refusal(dir.path(), args);
        assert!(error.contains(part), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    for args in [&["--frobnicate"][..], &["d", "e"], &["--threads", "0"], &["--size", "x"]] {
        let error = refusal(dir.path(), args);
        assert!(error.contains("Try 'oxblk serve --help'"), "{error}");
    }
}

#[test]
fn an_image_that_is_served_for_writing_is_not_written_by_others() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(dir.path(), &["d", "-f", "raw", "--size", "64M"]);
    let error = refusal(dir.path(), &["d", "-f", "raw", "--nbd", "other"]);
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
    let io = Program::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", "d"]);
    assert!(!io.directory(dir.path()).run().status.success());
    served.stop();
    let reader = Served::start(dir.path(), &["d", "-f", "raw", "-r"]);
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let second = Served::start(&other, &["../d", "-f", "raw", "-r"]);
    second.stop();
    reader.stop();
}

#[test]
fn an_idle_server_is_small() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(dir.path(), &["d", "-f", "raw", "--size", "64M", "--threads", "4"]);
    Program::new("nbdinfo").arg(served.uri()).succeed();
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = rss.trim().trim_end_matches("kB").trim().parse().unwrap();
    assert!(kib <= 20 << 10, "{kib} KiB resident");
    served.stop();
}

#[test]
fn memory_stays_bounded_while_clients_ask_for_all_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(dir.path(), &["d", "-f", "raw", "--size", "256M"]);
    served.python(
        "
clients = [h]
for _ in range(15):
    other = nbd.NBD()
    other.connect_uri(uri)
    clients.append(other)
buffers = [nbd.Buffer(32 << 20) for _ in range(4)]
for client in clients:
    for buffer in buffers:
        client.aio_pread(buffer, 0)
# Sends what fits into the sockets and reads no reply.
import time
time.sleep(1)
",
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches("kB").trim().parse().unwrap();
    assert!(kib <= 256 << 10, "{kib} KiB at the peak");
    served.stop();
}

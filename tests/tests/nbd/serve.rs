//! `oxblk serve` from a user's view: the files that it creates and removes, its output, and its errors.

use crate::served::{Served, python};
use oxblk_tests::program::{self, Program};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

fn refusal(dir: &Path, args: &[&str]) -> String {
    refusal_of(dir, args)
}

fn refusal_of(dir: &Path, args: &[impl AsRef<OsStr> + std::fmt::Debug]) -> String {
    let reply = Program::oxblk().arg("serve").args(args).directory(dir).run();
    assert_eq!(reply.code(), 1, "{args:?}: {}{}", reply.out(), reply.err());
    assert_eq!(reply.out(), "");
    let error = reply.err();
    assert!(error.starts_with("oxblk serve: "), "{error}");
    error
}

#[test]
fn the_printed_commands_work_unchanged() {
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
    assert!(printed.starts_with("Created and serving 'my disk.raw' (raw, 64 MiB, read-write)\n"));
    assert!(printed.contains(&format!("  nbdinfo '{uri}'\n")), "{printed}");
    assert!(printed.contains(&format!("  nbdcopy '{uri}' copy.raw\n")), "{printed}");
    assert!(printed.contains(&format!("-drive file='{uri}',format=raw,if=virtio\n")), "{printed}");
    let client = format!("nbd-client -unix '{}' /dev/nbd0 -name 'x y'", socket.display());
    // The new disk has no file system.
    assert!(printed.contains(&format!("{client}\n")), "{printed}");
    assert!(!printed.contains("listening on"), "{printed}");
}

#[test]
fn the_mount_command_names_a_partition_of_a_partitioned_disk() {
    let dir = tempfile::tempdir().unwrap();
    for (label, script) in [
        ("dos", "label: dos\nsize=4M, type=83\ntype=83\n"),
        ("gpt", "label: gpt\nsize=4M\nsize=8M\n"),
    ] {
        let disk = dir.path().join(label);
        std::fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
        let sfdisk = format!("printf '{script}' | sfdisk -q {label}");
        Program::new("sh").arg("-c").arg(sfdisk).directory(dir.path()).succeed();
        let served = Served::start(dir.path(), &["-f", "raw", label]);
        let printed = served.stop();
        assert!(printed.contains("&& sudo mount /dev/nbd0p2 /mnt\n"), "{label}: {printed}");
    }
}

#[test]
fn the_socket_of_a_dead_server_is_replaced_and_that_of_a_running_server_is_not() {
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
fn a_disk_or_address_that_cannot_be_served_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let _living = UnixListener::bind(dir.path().join("taken")).unwrap();
    std::fs::write(dir.path().join("d"), vec![0; 1 << 20]).unwrap();
    for (args, part) in [
        (&["absent"][..], "Could not open 'absent': No such file or directory"),
        (&["no/such/dir/d", "--size", "1M"], "Could not create 'no/such/dir/d'"),
        (&["d", "-f", "nonsense"], "nonsense"),
        (&["d", "-f", "raw", "--nbd", "./taken"], "Another server"),
        (&["d", "-f", "raw", "--nbd", "./d"], "is not a socket"),
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
    let error = refusal(dir.path(), &["d", "-f", "raw", "--nbd", "./other"]);
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
fn a_probed_raw_image_never_turns_into_another_format() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("d"), vec![0; 1 << 20]).unwrap();
    let served = Served::start(dir.path(), &["d"]);
    served.python(
        "
header = b'QFI\\xfb\\0\\0\\0\\3' + bytes(504)
try:
    h.pwrite(header, 0)
    sys.exit('a qcow2 header was written')
except nbd.Error as error:
    assert error.errno == 'EPERM', error
for offset in range(8):
    try:
        h.pwrite(header[offset:offset + 1], offset)
    except nbd.Error:
        break
h.pwrite(b'x' * 4096, 4096)
h.zero(512, 0)
",
    );
    served.stop();
    let bytes = std::fs::read(dir.path().join("d")).unwrap();
    assert_ne!(&bytes[..4], b"QFI\xfb");
    assert_eq!(&bytes[4096..8192], [b'x'; 4096]);
}

#[test]
fn serve_without_arguments_creates_a_disk_in_the_data_directory_and_reuses_it() {
    let dir = tempfile::tempdir().unwrap();
    let (data, runtime) = (dir.path().join("data"), dir.path().join("run"));
    std::fs::create_dir(&runtime).unwrap();
    let socket = runtime.join("oxblk-disk.sock");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    for (round, opening) in ["Created and serving", "Serving"].into_iter().enumerate() {
        let mut server = Program::new("env")
            .arg(format!("XDG_DATA_HOME={}", data.display()))
            .arg(format!("XDG_RUNTIME_DIR={}", runtime.display()))
            .arg(program::oxblk())
            .arg("serve")
            .start();
        server.wait_for_socket(&socket);
        let script = ["h.pwrite(b'mark', 1 << 30)", "assert h.pread(4, 1 << 30) == b'mark'"][round];
        python(&uri, script).succeed();
        let size = Program::new("nbdinfo").args(["--size", &uri]).succeed().out();
        assert_eq!(size.trim(), (10_u64 << 30).to_string());
        let printed = server.stop();
        let disk = data.join("oxblk/disk.qcow2");
        let line = format!("{opening} '{}' (qcow2, 10 GiB, read-write)\n", disk.display());
        assert!(printed.starts_with(&line), "{printed}");
    }
    Program::new("qemu-img").arg("check").arg(data.join("oxblk/disk.qcow2")).succeed();
}

#[test]
fn an_idle_server_uses_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(dir.path(), &["d", "-f", "raw", "--size", "64M", "--threads", "4"]);
    Program::new("nbdinfo").arg(served.uri()).succeed();
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).unwrap();
    // The size of the program itself depends on the build.
    let allocated = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let kib: u64 = allocated.trim().trim_end_matches("kB").trim().parse().unwrap();
    assert!(kib <= 8 << 10, "{kib} KiB of memory");
    served.stop();
}

#[test]
fn memory_stays_bounded_while_clients_send_reads_and_receive_no_replies() {
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

#[test]
fn an_encrypted_image_is_served_decrypted() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("key"), "abc").unwrap();
    let secret = "secret,id=s,file=key";
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
    let create = ["create", "-q", "--object", secret, "-f", "qcow2", "-o", luks, "a.qcow2", "4M"];
    Program::new("qemu-img").args(create).directory(dir.path()).succeed();
    let image = "driver=qcow2,file.filename=a.qcow2,encrypt.key-secret=s";
    let write = ["--object", secret, "-c", "write -P 7 1M 1M", "--image-opts", image];
    Program::new("qemu-io").args(write).directory(dir.path()).succeed();

    assert!(refusal(dir.path(), &["a.qcow2"]).contains("encrypt.key-secret"));
    let bad = refusal(dir.path(), &["--object", "secret,id=s", "--image-opts", image]);
    assert!(bad.contains("data") && !bad.trim_end().contains('\n'), "{bad}");

    let served = Served::start(dir.path(), &["--object", secret, "--image-opts", image]);
    let uri = served.uri();
    let io = ["-f", "raw", "-c", "read -P 7 1M 1M", "-c", "write -P 9 0 64k", &uri];
    let reply = Program::new("qemu-io").args(io).directory(dir.path()).succeed();
    assert!(!reply.out().contains("failed"), "{}", reply.out());
    let printed = served.stop();
    assert!(printed.starts_with("Serving 'a.qcow2' (qcow2, 4 MiB, read-write)\n"), "{printed}");
    let read = [
        "--object",
        secret,
        "-c",
        "read -P 9 0 64k",
        "-c",
        "read -P 7 1M 1M",
        "--image-opts",
        image,
    ];
    let reply = Program::new("qemu-io").args(read).directory(dir.path()).succeed();
    assert!(!reply.out().contains("failed"), "{}", reply.out());
}

#[test]
fn an_image_whose_name_is_not_utf8_is_served_and_its_name_is_printed_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let name = OsStr::from_bytes(b"caf\xe9.raw");
    let mut server = Program::oxblk()
        .arg("serve")
        .arg(name)
        .args(["--size", "1M", "--nbd", "./s"])
        .directory(dir.path())
        .start();
    let socket = dir.path().join("s");
    server.wait_for_socket(&socket);
    assert!(dir.path().join(name).exists());
    server.stop();
    let reply =
        Program::oxblk().arg("serve").arg(OsStr::from_bytes(b"no\xe9")).directory(dir.path()).run();
    let said = b"oxblk serve: Could not open 'no\xe9': No such file or directory";
    assert!(reply.stderr.starts_with(said), "{}", reply.err());
    let error = refusal_of(dir.path(), &[OsStr::new("--export-name"), name]);
    assert!(error.contains("is not UTF-8"), "{error}");
}

#[test]
fn twenty_descriptors_are_enough_to_serve_a_client() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("d.raw"), vec![0; 1 << 20]).unwrap();
    let mut server = Program::new("prlimit")
        .args(["--nofile=20:20", "--"])
        .arg(program::oxblk())
        .args(["serve", "d.raw", "-f", "raw", "--nbd", "./s"])
        .directory(dir.path())
        .start();
    server.wait_for_socket(&dir.path().join("s"));
    Program::new("nbdinfo")
        .args(["--size", "nbd+unix:///?socket=s"])
        .directory(dir.path())
        .succeed();
    server.stop();
}

#[test]
fn a_server_that_has_no_descriptor_for_a_client_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("d"), vec![0; 1 << 20]).unwrap();
    let script = "ulimit -n 15; exec \"$0\" serve d -f raw --nbd nbd.sock";
    let reply =
        Program::new("sh").arg("-c").arg(script).arg(program::oxblk()).directory(dir.path()).run();
    let error = reply.err();
    assert_eq!(reply.code(), 1, "{error}");
    assert_eq!(reply.out(), "");
    assert_eq!(error, "oxblk serve: Cannot serve any client: Too many open files (os error 24)\n");
    assert!(!dir.path().join("nbd.sock").exists());
}

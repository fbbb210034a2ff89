//! Clients for which the server has too little memory or too few descriptors. The server continues to serve other clients.

use crate::served::Served;
use oxblk_tests::program::Program;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;

fn served(dir: &Path) -> Served {
    Served::start(dir, &["d", "-f", "raw", "--size", "64M"])
}

/// The number of the highest descriptor of a process that refers to `/dev/null`: the one that the server closes to accept a
/// client that it must refuse.
fn spare_descriptor(pid: u32) -> u64 {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|link| link.unwrap().path());
    let null =
        links.filter(|link| fs::read_link(link).is_ok_and(|to| to == Path::new("/dev/null")));
    let numbers = null.filter_map(|link| link.file_name()?.to_str()?.parse().ok());
    numbers.max().expect("a spare descriptor")
}

/// Sets the soft limit on the descriptors of a process.
fn limit_descriptors(pid: u32, limit: &str) {
    let (limit, pid) = (format!("--nofile={limit}:"), pid.to_string());
    Program::new("prlimit").args([&limit, "--pid", &pid]).succeed();
}

#[test]
fn a_client_is_refused_without_a_descriptor_and_the_next_one_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let served = served(dir.path());
    let before = Program::new("prlimit")
        .args(["--nofile", "--noheadings", "--output=SOFT", "--pid", &served.pid().to_string()])
        .succeed()
        .out();
    // The server may still open every descriptor below its spare one.
    limit_descriptors(served.pid(), &(spare_descriptor(served.pid()) + 1).to_string());
    let mut clients = Vec::new();
    loop {
        let mut client = UnixStream::connect(&served.socket).unwrap();
        let mut greeting = [0; 18];
        if client.read_exact(&mut greeting).is_err() {
            break;
        }
        assert_eq!(&greeting[..8], b"NBDMAGIC");
        clients.push(client);
        assert!(clients.len() < 64, "no client is refused");
    }
    limit_descriptors(served.pid(), before.trim());
    for _ in 0..3 {
        Program::new("nbdinfo").arg("--size").arg(served.uri()).succeed();
    }
    drop(clients);
    served.stop();
}

#[test]
fn a_write_that_does_not_fit_into_the_address_space_ends_only_its_connection() {
    let dir = tempfile::tempdir().unwrap();
    let served = served(dir.path());
    let limit = format!("--as={}", 1_u64 << 30);
    Program::new("prlimit").args([&limit, "--pid", &served.pid().to_string()]).succeed();
    served.python(
        "
data = nbd.Buffer.from_bytearray(bytearray(32 << 20))
clients = []
for _ in range(40):
    client = nbd.NBD()
    client.connect_uri(uri)
    # Sends what fits into the socket.
    client.aio_pwrite(data, 0)
    clients.append(client)
h.pwrite(b'x' * 4096, 0)
assert h.pread(4096, 0) == b'x' * 4096
del clients
other = nbd.NBD()
other.connect_uri(uri)
other.pwrite(b'y' * 4096, 0)
assert h.pread(4096, 0) == b'y' * 4096
",
    );
    served.stop();
}

//! `oxblk serve` with NBD clients of other projects: libnbd's tools and bindings, fio, the QEMU tools, nmap.

use crate::served::{Served, python};
use oxblk_tests::program::Program;
use std::path::Path;
use std::time::Duration;

/// Every client is tested with images of these formats.
const FORMATS: &[&str] = &["raw", "qcow2"];

/// Creates and serves an image of 256 MiB.
fn new_disk(dir: &Path, format: &str) -> Served {
    Served::start(dir, &["disk", "-f", format, "--size", "256M"])
}

/// Writes a file with data and holes.
fn make_pattern(path: &Path) {
    let mut bytes = vec![0_u8; 256 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for piece in bytes.chunks_mut(1 << 20).step_by(3) {
        for word in piece.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    std::fs::write(path, bytes).unwrap();
}

fn assert_same(a: &Path, b: &Path) {
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap(), "{} differs", b.display());
}

#[test]
fn nbdinfo_reports_the_properties_of_the_export() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(
        dir.path(),
        &["d", "-f", "raw", "--size", "1G", "--export-name", "vm 1", "--description", "A disk"],
    );
    let uri = format!("nbd+unix:///vm%201?socket={}", served.socket.display());
    let info = Program::new("nbdinfo").arg(&uri).succeed().out();
    for line in [
        "export=\"vm 1\":",
        "description: A disk",
        "export-size: 1073741824",
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(line), "no '{line}' in:\n{info}");
    }
    let list = Program::new("nbdinfo").arg("--list").arg(served.uri()).succeed().out();
    assert!(list.contains("export=\"vm 1\":"), "{list}");
    // The empty name also selects this export.
    Program::new("nbdinfo").arg("--size").arg(served.uri()).succeed();
    let unknown = served.uri().replace("///", "///other");
    assert!(!Program::new("nbdinfo").arg(unknown).run().status.success());
    served.stop();
}

#[test]
fn nbdcopy_moves_a_disk_in_and_out_unchanged() {
    for format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let (source, back) = (dir.path().join("source"), dir.path().join("back"));
        make_pattern(&source);
        let served = new_disk(dir.path(), format);
        Program::new("nbdcopy").arg("--flush").arg(&source).arg(served.uri()).succeed();
        Program::new("nbdcopy").arg(served.uri()).arg(&back).succeed();
        assert_same(&source, &back);
        served.stop();
    }
}

#[test]
fn libnbd_reads_back_what_it_wrote_zeroed_and_trimmed() {
    for format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let served = new_disk(dir.path(), format);
        served.python(
            "
h.set_strict_mode(0)
data = os.urandom(1 << 20)
h.pwrite(data, 3 << 20)
assert h.pread(1 << 20, 3 << 20) == data
h.pwrite(b'odd', 12345677, nbd.CMD_FLAG_FUA)
assert h.pread(5, 12345676) == b'\\0odd\\0'
h.zero(65536, 3 << 20)
h.zero(65536, (3 << 20) + 65536, nbd.CMD_FLAG_NO_HOLE)
h.trim(65536, (3 << 20) + 131072)
assert h.pread(131072, 3 << 20) == bytes(131072)
assert h.pread(1 << 20, 3 << 20, nbd.CMD_FLAG_DF)[196608:] == data[196608:]
h.cache(1 << 20, 0)
h.flush()
extents = []
h.block_status(8 << 20, 0, lambda ctx, off, e, err: extents.extend(e))
assert sum(extents[::2]) == 8 << 20, extents
def flags_at(offset):
    for length, flags in zip(extents[::2], extents[1::2]):
        if offset < length:
            return flags
        offset -= length
assert flags_at(1 << 20) == 3, extents
assert flags_at(3 << 20) & 2, extents
assert flags_at((3 << 20) + 262144) == 0, extents
one = []
h.block_status(8 << 20, 0, lambda ctx, off, e, err: one.extend(e), nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 2, one
h.shutdown()
",
        );
        served.stop();
    }
}

#[test]
fn libnbd_receives_the_errors_of_the_specification() {
    let dir = tempfile::tempdir().unwrap();
    let script = "
h.set_strict_mode(0)
size = h.get_size()
def failure(call):
    try:
        call()
    except nbd.Error as error:
        return error.errno
for offset in (size - 1, size, 1 << 62):
    print(failure(lambda: h.pread(4096, offset)), failure(lambda: h.pwrite(bytes(4096), offset)),
          failure(lambda: h.zero(4096, offset)), failure(lambda: h.trim(4096, offset)),
          failure(lambda: h.block_status(4096, offset, lambda *a: 0)))
print(failure(lambda: h.pread(512, 0, nbd.CMD_FLAG_REQ_ONE)))
print(failure(lambda: h.pread(512, 0)))
";
    let served = Served::start(dir.path(), &["d", "-f", "raw", "--size", "64M"]);
    let past = "EINVAL ENOSPC ENOSPC EINVAL EINVAL\n".repeat(3);
    assert_eq!(served.python(script).out(), past + "EINVAL\nNone\n");
    served.stop();
    let served = Served::start(dir.path(), &["d", "-f", "raw", "--read-only"]);
    let read_only = "EINVAL EPERM EPERM EPERM EINVAL\n".repeat(3);
    assert_eq!(served.python(script).out(), read_only + "EINVAL\nNone\n");
    served.stop();
}

#[test]
fn fio_verifies_what_it_wrote_over_one_and_several_connections() {
    for format in FORMATS {
        for jobs in ["1", "4"] {
            let dir = tempfile::tempdir().unwrap();
            let served = new_disk(dir.path(), format);
            Program::new("fio")
                .args(["--name=verify", "--ioengine=nbd", "--rw=randrw", "--bsrange=512-128k"])
                .args(["--bs_unaligned=0", "--iodepth=32", "--size=32M", "--offset_increment=64M"])
                .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=1"])
                .arg(format!("--numjobs={jobs}"))
                .arg(format!("--uri={}", served.uri()))
                .directory(dir.path())
                .succeed();
            served.stop();
        }
    }
}

#[test]
fn qemu_img_converts_compares_and_maps_over_nbd() {
    for format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let (source, copy) = (dir.path().join("source"), dir.path().join("copy.qcow2"));
        make_pattern(&source);
        let served = new_disk(dir.path(), format);
        let img = || Program::new("qemu-img").directory(dir.path());
        let raw = ["-f", "raw"];
        img()
            .args(["convert", "-n", "-f", "raw", "-O", "raw"])
            .arg(&source)
            .arg(served.uri())
            .succeed();
        img().args(["compare", "-f", "raw", "-F", "raw"]).arg(&source).arg(served.uri()).succeed();
        img().arg("convert").args(raw).args(["-O", "qcow2"]).arg(served.uri()).arg(&copy).succeed();
        img().args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&source).arg(&copy).succeed();
        let map = img().args(["map", "--output=json"]).args(raw).arg(served.uri()).succeed().out();
        let data =
            "\"start\": 0, \"length\": 1048576, \"depth\": 0, \"present\": true, \"zero\": false";
        assert!(map.contains(data), "{map}");
        let hole = "\"start\": 1048576, \"length\": 2097152, \"depth\": 0, \"present\": true, \"zero\": true";
        assert!(map.contains(hole), "{map}");
        served.stop();
    }
}

#[test]
fn qemu_io_reads_back_its_patterns_over_nbd() {
    for format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let served = new_disk(dir.path(), format);
        let commands = [
            "write -P 7 1M 192k",
            "write -z 1M 64k",
            "discard 1114112 64k",
            "read -P 0 1M 64k",
            "read -P 7 1179648 64k",
            "write -f -P 9 513 1025",
            "read -P 9 513 1025",
            "aio_write -P 3 10M 4M",
            "aio_write -P 4 20M 4M",
            "aio_flush",
            "read -P 3 10M 4M",
            "read -P 4 20M 4M",
            "flush",
        ];
        let mut io = Program::new("qemu-io").args(["-f", "raw"]);
        for command in commands {
            io = io.args(["-c", command]);
        }
        let out = io.arg(served.uri()).succeed().out();
        assert!(!out.contains("failed"), "{out}");
        served.stop();
    }
}

/// A script that writes numbered blocks one after the other, and flushes from time to time. When the server ends, the script
/// prints the number of the last block that a completed flush has covered.
const WRITER: &str = "
flushed = 0
try:
    for block in range(1, 1 << 15):
        h.pwrite(block.to_bytes(4, 'big') * 1024, block * 4096)
        if block % 16 == 0:
            h.flush()
            flushed = block
            if block == 64:
                open('begun', 'w').close()
except nbd.Error:
    pass
print(flushed)
";

/// A script that checks blocks 1 to the number in `last`.
const CHECKER: &str = "
last = int(open('last').read())
assert last >= 64, last
for block in range(1, last + 1):
    assert h.pread(4096, block * 4096) == block.to_bytes(4, 'big') * 1024, block
";

fn interrupted_writer(format: &str, end: impl FnOnce(Served)) {
    let dir = tempfile::tempdir().unwrap();
    let served = new_disk(dir.path(), format);
    let uri = served.uri();
    let writer = python(&uri, WRITER).directory(dir.path());
    let writer = std::thread::spawn(move || writer.succeed().out());
    let begun = dir.path().join("begun");
    for _ in 0..2000 {
        if begun.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(begun.exists(), "the writer makes no progress");
    std::thread::sleep(Duration::from_millis(100));
    end(served);
    std::fs::write(dir.path().join("last"), writer.join().unwrap()).unwrap();
    let check = Program::new("qemu-img").args(["check", "disk"]).directory(dir.path());
    if format == "qcow2" {
        // A killed server may leave leaked clusters (exit code 3), but nothing worse.
        assert!([0, 3].contains(&check.run().code()));
    }
    let served = Served::start(dir.path(), &["disk", "-f", format]);
    python(&served.uri(), CHECKER).directory(dir.path()).succeed();
    served.stop();
}

#[test]
fn flushed_data_survives_sigterm_during_writes() {
    for format in FORMATS {
        interrupted_writer(format, |served| drop(served.stop()));
    }
}

#[test]
fn flushed_data_survives_sigkill_during_writes() {
    for format in FORMATS {
        interrupted_writer(format, Served::kill);
    }
}

#[test]
fn a_port_scan_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let served =
        Served::start(dir.path(), &["d", "-f", "raw", "--size", "64M", "--nbd", "127.0.0.1:0"]);
    // Read the port from /proc, because the output of the server is read later.
    let port = listening_port(served.pid());
    Program::new("nmap").args(["-Pn", "-sT", "-p", &port.to_string(), "127.0.0.1"]).succeed();
    Program::new("nbdinfo").arg("--size").arg(format!("nbd://127.0.0.1:{port}")).succeed();
    served.stop();
}

/// Returns the port of the only listening TCP socket of a process.
fn listening_port(pid: u32) -> u16 {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let sockets: Vec<String> = fds
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter_map(|target| {
            let target = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(target.to_owned())
        })
        .collect();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|line| line.get(3) == Some(&"0A") && sockets.iter().any(|inode| inode == line[9]))
        .map(|line| u16::from_str_radix(line[1].split_once(':').unwrap().1, 16).unwrap())
        .expect("a listening TCP socket")
}

//! The library does not overwrite files by mistake, and removes the files of incomplete operations.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use oxblk::ring::Address;
use oxblk::{Convert, Create, Disk, ErrorKind, Format, NbdServer};
use oxblk_tests::scratch::in_memory;

const MIB: usize = 1 << 20;

/// Whether qemu-io can write to a raw file.
fn qemu_can_write(path: &Path) -> bool {
    let write = ["-f", "raw", "-c", "write -q 0 512"];
    Command::new("qemu-io").args(write).arg(path).output().unwrap().status.success()
}

#[test]
fn a_conversion_to_a_file_of_its_source_is_refused() {
    let folder = in_memory();
    let name = |name: &str| folder.path().join(name);
    let (raw, overlay, link) = (name("a.raw"), name("overlay.qcow2"), name("link"));
    std::fs::write(&raw, vec![7; MIB]).unwrap();
    std::os::unix::fs::symlink(&raw, &link).unwrap();
    Create::overlay(&overlay, &raw, Format::Raw).run().wait().unwrap();
    for shared in [false, true] {
        for (source, format, target) in [
            (&raw, Format::Raw, &raw),
            (&raw, Format::Raw, &link),
            (&overlay, Format::Qcow2, &raw),
            (&overlay, Format::Qcow2, &overlay),
        ] {
            let options = Disk::options().format(format).read_only(true).force_share(shared);
            let source = options.open(source).wait().unwrap();
            let refused = Convert::new(&source, target, Format::Raw).run().wait().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
            assert!(refused.to_string().ends_with("is a file of the source"), "{refused}");
            source.close().wait().unwrap();
        }
    }
    assert_eq!(std::fs::read(&raw).unwrap(), vec![7; MIB]);
    assert!(overlay.exists());
}

#[test]
fn no_other_process_writes_to_the_source_during_a_conversion() {
    let folder = in_memory();
    let (path, target) = (folder.path().join("a.raw"), folder.path().join("b.raw"));
    std::fs::write(&path, vec![7; MIB]).unwrap();
    let source = Disk::options().format(Format::Raw).read_only(true).open(&path).wait().unwrap();
    let could_write = Arc::new(AtomicBool::new(true));
    let (other, result) = (path.clone(), Arc::clone(&could_write));
    let tried = move |_, _| result.store(qemu_can_write(&other), SeqCst);
    Convert::new(&source, &target, Format::Raw).progress(tried).run().wait().unwrap();
    assert!(!could_write.load(SeqCst));
    assert!(qemu_can_write(&path));
    source.close().wait().unwrap();
}

#[test]
fn a_stopped_conversion_removes_only_the_file_that_it_created() {
    let folder = in_memory();
    let name = |name: &str| folder.path().join(name);
    let (path, target, other) = (name("a.raw"), name("b.raw"), name("other"));
    std::fs::write(&path, vec![7; 8 * MIB]).unwrap();
    let source = Disk::options().format(Format::Raw).read_only(true).open(&path).wait().unwrap();
    for replaced in [false, true] {
        std::fs::write(&other, "other").unwrap();
        let convert = Convert::new(&source, &target, Format::Raw);
        let (stop, from, to) = (convert.stopper(), other.clone(), target.clone());
        let stopped = convert.progress(move |_, _| {
            if replaced && from.exists() {
                std::fs::rename(&from, &to).unwrap();
            }
            stop.stop();
        });
        let error = stopped.run().wait().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        let remains = std::fs::read(&target).ok();
        assert_eq!(remains.as_deref(), replaced.then_some(b"other".as_slice()));
    }
    // The target of this conversion existed before, so it is not removed.
    let convert = Convert::new(&source, &target, Format::Raw);
    let stop = convert.stopper();
    convert.progress(move |_, _| stop.stop()).run().wait().unwrap_err();
    assert!(target.exists());
    source.close().wait().unwrap();
}

#[test]
fn a_dropped_server_removes_its_socket_file() {
    let folder = in_memory();
    let (path, socket) = (folder.path().join("a.raw"), folder.path().join("socket"));
    std::fs::write(&path, vec![7; MIB]).unwrap();
    let disk = Disk::options().format(Format::Raw).open(&path).wait().unwrap();
    for _ in 0..2 {
        let server = NbdServer::start(&[("", &disk)], &Address::Unix(socket.clone())).unwrap();
        assert!(socket.exists());
        drop(server);
        assert!(!socket.exists());
    }
    disk.close().wait().unwrap();
}

//! A Linux guest boots from a disk that oxblk converted and serves. The guest writes to the disk, and its file system stays
//! clean.

use oxblk_tests::differential::check_clean;
use oxblk_tests::guest::{self, Kernel, Task};
use oxblk_tests::program::Program;

#[test]
fn a_linux_guest_boots_from_the_nbd_export_and_its_file_system_stays_clean() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = |name: &str| scratch.path().join(name);
    let raw = guest::disk::build(scratch.path());
    let kernel = Kernel::find();
    let initramfs = guest::initramfs(&kernel, scratch.path());
    let disk = path("guest.qcow2");
    Program::oxblk().args(["img", "convert", "-O", "qcow2"]).arg(&raw).arg(&disk).succeed();
    Program::new("qemu-img").arg("compare").arg(&raw).arg(&disk).succeed();
    check_clean(&disk);

    let socket = path("nbd.sock");
    for task in [Task::Write, Task::Verify] {
        let serve = Program::oxblk().arg("serve").arg(&disk).arg("--nbd").arg(&socket);
        let mut server = serve.start();
        server.wait_for_socket(&socket);
        let console = guest::boot(&kernel, &initramfs, &guest::nbd_blockdev(&socket), task);
        guest::assert_succeeded(&console, task);
        server.stop();
        check_clean(&disk);
    }

    // The image is converted back to raw by oxblk and compared by QEMU. e2fsck then checks the disk outside the guest too.
    let back = path("back.raw");
    Program::oxblk().args(["img", "convert", "-O", "raw"]).arg(&disk).arg(&back).succeed();
    Program::new("qemu-img").arg("compare").arg(&disk).arg(&back).succeed();
    let file_system = format!("{}?offset=1048576", back.display());
    Program::new("/sbin/e2fsck").args(["-f", "-n", &file_system]).succeed();
}

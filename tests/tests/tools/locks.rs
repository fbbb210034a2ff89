//! File locks that another process holds, in comparison with QEMU.

use oxblk::ring::block_on;
use oxblk_core::{Backend, Gate, Graph, OpenFlags, Options, Perm, Permissions};
use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

/// Opens a file in every directory as a user that does not share `kept`, and runs `work` while the files are open.
fn while_unshared(both: &Differential, file: &str, kept: Perm, work: impl FnOnce()) {
    block_on(async {
        let graph = Graph::new(oxblk::drivers(), Gate::Anything);
        let mut users = Vec::new();
        for directory in [&[both.qemu_directory()][..], &both.our_directories()].concat() {
            let path = directory.join(file);
            let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
            let name = path.to_str().expect("a plain path");
            let node = graph.open_protocol(name, Options::new(), flags).await.expect("a node");
            let permissions = Permissions { taken: Perm::empty(), shared: Perm::all() - kept };
            users.push(Backend::new(&graph, "", node, permissions).expect("no conflict"));
        }
        work();
        for user in users {
            user.close().await.expect("it closes");
        }
    });
}

#[test]
fn images_without_consistent_reads_are_opened_and_refused_as_by_qemu() {
    let both = Differential::new();
    both.file("b.raw", &[7; 1 << 16]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2"]);
    while_unshared(&both, "a.qcow2", Perm::CONSISTENT_READ, || {
        for image in ["a.qcow2", "top.qcow2"] {
            for share in [&[][..], &["-U"]] {
                for command in [
                    &["info"][..],
                    &["info", "--backing-chain"],
                    &["check"],
                    &["map"],
                    &["measure", "-O", "raw"],
                ] {
                    both.same(Img, &[command, share, &[image]].concat());
                }
                both.same(Io, &[&["-r", "-c", "length"], share, &[image]].concat());
            }
        }
        both.same(Img, &["create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "new.qcow2"]);
    });
    while_unshared(&both, "b.raw", Perm::CONSISTENT_READ, || {
        both.same(Img, &["info", "-f", "raw", "b.raw"]);
        both.same(Io, &["-r", "-U", "-f", "raw", "-c", "read 0 512", "b.raw"]);
        both.same(Img, &["create", "-f", "raw", "b.raw", "64k"]);
        both.same(Img, &["create", "-f", "qcow2", "b.raw", "64k"]);
    });
}

#[test]
fn a_reader_with_force_share_holds_only_the_lock_of_its_reads() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("b.raw");
    std::fs::write(&path, [7; 512]).expect("a file");
    block_on(async {
        let graph = Graph::new(oxblk::drivers(), Gate::Anything);
        let flags = OpenFlags { read_only: true, force_share: true, ..OpenFlags::default() };
        let options = Options::from_dotted("driver=raw", None).expect("options");
        let reader = graph.open_backend(path.to_str(), options, flags).await.expect("an image");
        let attach = async |kept| {
            let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
            let name = path.to_str().expect("a plain path");
            let node = graph.open_protocol(name, Options::new(), flags).await.expect("a node");
            let permissions = Permissions { taken: Perm::empty(), shared: Perm::all() - kept };
            Backend::new(&graph, "", node, permissions)
        };
        let Err(refused) = attach(Perm::CONSISTENT_READ).await else { panic!("no lock") };
        let text = "Failed to get shared \"consistent read\" lock";
        assert!(refused.to_string().contains(text), "{refused}");
        let other = attach(Perm::all() - Perm::CONSISTENT_READ).await.expect("no other lock");
        for user in [reader, other] {
            user.close().await.expect("it closes");
        }
    });
}

//! Image-wide changes of qcow2 images. A power cut at any write leaves the old or the new image.

use oxblk_core::amend::AmendRequest;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Options, Preallocation};
use oxblk_tests::crash::change::{Trial, contents, image, old_or_new, same_throughout};

fn trial(what: &str, seed: u64) -> Trial<'_> {
    Trial { what, seed, options: "", repairs_on_open: false }
}

async fn names(image: &Backend) -> (Option<String>, Option<String>) {
    let info = image.node().unwrap().driver().info();
    (info.backing_filename, info.backing_format)
}

const LONG: &str = "a/name/of/a/backing/file/that/does/not/end/within/the/sector/in/which/it/begins/or/else/what/\
                    would/this/test/be/good/for/and/so/it/goes/on/and/on/and/on/and/on/until/there/is/enough/of/it.raw";

#[test]
fn a_power_cut_leaves_the_old_backing_file_or_the_new_one() {
    let kinds = ["cluster_size=512", "cluster_size=1k", "cluster_size=64k", "compat=0.10"];
    let steps: [(Option<&str>, Option<&str>); 5] = [
        (Some("other.raw"), Some("raw")),
        (Some(LONG), Some("host_device")),
        (None, None),
        (Some("a.qcow2"), None),
        (Some("b.qcow2"), Some("qcow2")),
    ];
    for (seed, kind) in (0..).zip(kinds) {
        let create = ["-o", kind, "-b", "the first backing file", "-F", "qcow2", "image", "1M"];
        let disk = image(seed, &create, &[]);
        for (name, format) in steps {
            let what = format!("{kind}: {name:?} {format:?}");
            let change = async |image: &Backend| image.change_backing_file(name, format).await;
            old_or_new(&trial(&what, seed), &disk, &change, &async |image| names(image).await);
        }
    }
}

const WRITE: &[&str] =
    &["qemu-io", "-c", "write -P 1 0 300k", "-c", "write -P 2 700k 200k", "image"];

#[test]
fn a_power_cut_while_an_image_is_emptied_leaves_all_of_its_data_or_none() {
    let snapshot: &[&str] = &["qemu-img", "snapshot", "-c", "kept", "image"];
    for (seed, kind) in (0..).zip(["cluster_size=512", "cluster_size=64k", "compat=0.10"]) {
        for prepare in [&[WRITE][..], &[WRITE, snapshot, WRITE][..]] {
            let what = format!("{kind}, {} steps", prepare.len());
            let disk = image(seed, &["-o", kind, "image", "1M"], prepare);
            let change = async |image: &Backend| image.make_empty().await;
            let look = async |image: &Backend| contents(image).await;
            old_or_new(&trial(&what, seed), &disk, &change, &look);
        }
    }
}

async fn amend(image: &Backend, options: &str) -> oxblk_core::Result<()> {
    let options = Options::from_dotted(options, None)?;
    image.amend(AmendRequest { options, force: false, progress: Box::new(|_, _| ()) }).await
}

/// Returns the properties that an amend can change, and the contents of the disk and of its snapshot.
async fn whole(image: &Backend) -> (String, Vec<u8>, Vec<u8>) {
    let info = image.node().unwrap().driver().info();
    let said = format!("{} {}", image.size(), info.specific.unwrap());
    let now = contents(image).await;
    let kept = match image.snapshots().await.unwrap().first() {
        Some(snapshot) => {
            let mark = SnapshotInfo { name: "now".to_owned(), ..SnapshotInfo::default() };
            image.create_snapshot(&mark).await.unwrap();
            image.apply_snapshot(&snapshot.id).await.unwrap();
            let kept = contents(image).await;
            let mark = image.snapshots().await.unwrap().last().unwrap().id.clone();
            image.apply_snapshot(&mark).await.unwrap();
            image.delete_snapshot(&mark).await.unwrap();
            kept
        }
        None => Vec::new(),
    };
    (said, now, kept)
}

const ZERO: &[&str] =
    &["qemu-io", "-c", "write -z 100k 100k", "-c", "write -P 3 300k 50k", "image"];

#[test]
fn a_power_cut_leaves_the_old_options_or_the_new_ones() {
    let snapshot: &[&str] = &["qemu-img", "snapshot", "-c", "kept", "image"];
    let over: &[&str] = &["qemu-img", "rebase", "-u", "-b", "base", "-F", "raw", "image"];
    let cases: &[(&str, &[&[&str]], &str)] = &[
        ("cluster_size=4k", &[WRITE, ZERO, over], "compat=0.10"),
        ("cluster_size=4k", &[WRITE, ZERO, snapshot, WRITE, ZERO, over], "compat=0.10"),
        ("cluster_size=64k", &[WRITE, ZERO], "compat=0.10"),
        ("compat=0.10", &[WRITE, snapshot], "compat=1.1,lazy_refcounts=on"),
        ("cluster_size=512", &[WRITE, snapshot, ZERO], "refcount_bits=64"),
        ("cluster_size=4k,refcount_bits=64", &[WRITE, ZERO], "refcount_bits=1"),
        ("cluster_size=64k,compat=0.10", &[WRITE], "compat=1.1,refcount_bits=8"),
        ("cluster_size=4k", &[WRITE], "lazy_refcounts=on"),
    ];
    for (seed, (create, prepare, options)) in (0..).zip(cases) {
        let what = format!("{create}: {options}");
        let disk = image(seed, &["-o", create, "image", "1M"], prepare);
        let change = async |image: &Backend| amend(image, options).await;
        let steps = options.contains(',');
        let look = async |image: &Backend| whole(image).await;
        // A change in several steps has intermediate states, but the contents of the image stay the same.
        let held = async |image: &Backend| {
            let (_, now, kept) = whole(image).await;
            (now, kept)
        };
        // A repair reverts or completes the copying of tables that snapshots share.
        let repairs_on_open = options == &"compat=0.10" && prepare.contains(&snapshot);
        let trial = Trial { repairs_on_open, ..trial(&what, seed) };
        if steps {
            same_throughout(&trial, &disk, &change, &held);
        } else {
            old_or_new(&trial, &disk, &change, &look);
        }
    }
}

#[test]
fn a_power_cut_while_the_disk_shrinks_leaves_the_old_size_or_the_new_one() {
    for (seed, create) in (0..).zip(["cluster_size=512", "cluster_size=64k", "compat=0.10"]) {
        let disk = image(seed, &["-o", create, "image", "1M"], &[WRITE, ZERO]);
        let change = async |image: &Backend| image.resize(200 << 10, Preallocation::Off).await;
        let look = async |image: &Backend| contents(image).await;
        old_or_new(&trial(create, seed), &disk, &change, &look);
    }
}

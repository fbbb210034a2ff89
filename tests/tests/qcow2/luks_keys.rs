//! Passwords of LUKS images: adding, erasing, and refused changes. After a power cut at any moment, at least one of the
//! passwords opens the disk.

use std::cell::RefCell;

use oxblk_core::amend::AmendRequest;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Attachment, ChildIdx, Options, Perm, Permissions, Secrets, WriteFlags};
use oxblk_crypto::secret::Secret;
use oxblk_formats::qcow2::encryption::keys::{Change, change};
use oxblk_ring::IoBuf;
use oxblk_ring::sim::{self, Disk};
use oxblk_tests::formats::{Variant, named};
use oxblk_tests::model::chain::{self, Image};
use oxblk_tests::sim_disk::{self, Pace};

use super::compact_against_qemu::luks_header;

/// The secret with which the harness creates encrypted images.
const FIRST: &str = "s0";
const SECOND: &str = "n";
const THIRD: &str = "m";

fn secrets() -> Secrets {
    let secrets = oxblk_tests::formats::secrets();
    for id in [SECOND, THIRD] {
        secrets.add(id, Secret::from_slice(id.as_bytes())).unwrap();
    }
    secrets
}

fn luks() -> &'static Variant {
    named("qcow2-luks")[0]
}

async fn new_image() -> Disk {
    let image = Image { variant: luks(), disk: Disk::new(7, 0) };
    chain::create(&image, 64 << 10).await.unwrap();
    image.disk
}

/// Changes keys. If the options begin with `!`, the change is forced. Returns the active slots after the change, or the error.
async fn amend(disk: &Disk, opened_with: &str, options: &str) -> Result<Vec<usize>, String> {
    let graph = chain::graph();
    let node = sim_disk::add(&graph, "disk", disk, false, Pace::AtOnce).unwrap();
    let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    let name = ChildIdx::FILE.name();
    let edge = Attachment::new(&node, "the test".to_owned(), name, permissions).unwrap();
    let (options, force) = match options.strip_prefix('!') {
        Some(options) => (options, true),
        None => (options, false),
    };
    let mut options = Options::from_dotted(options, None).unwrap();
    let outcome = match Change::take(&mut options) {
        Ok(wanted) => change(&edge, Some(opened_with), wanted, force, &secrets()).await,
        Err(error) => Err(error),
    };
    drop(edge);
    graph.release(node).await.unwrap();
    let active = outcome.map_err(|error| error.to_string())?;
    Ok(active.active_slots().map(|(index, _)| index).collect())
}

/// Whether a password opens the image.
async fn opens(disk: &Disk, secret: &str) -> bool {
    let graph =
        oxblk_core::Graph::with_secrets(oxblk::drivers(), oxblk_core::Gate::Anything, secrets());
    let node = sim_disk::add(&graph, "disk", disk, true, Pace::AtOnce).unwrap();
    graph.keep_open(node).unwrap();
    let mut options = Options::new();
    options.insert("driver", "qcow2");
    options.insert("file", "disk");
    options.set("encrypt.key-secret", secret).unwrap();
    let flags = oxblk_core::OpenFlags { read_only: true, ..Default::default() };
    match graph.open_backend(None, options, flags).await {
        Ok(backend) => {
            chain::close(backend).await.unwrap();
            true
        }
        Err(error) => {
            assert_eq!(error.to_string(), "Invalid password, cannot unlock any keyslot");
            false
        }
    }
}

#[test]
fn passwords_are_added_and_erased() {
    sim::run(1, async {
        let disk = new_image().await;
        let add = "state=active,iter-time=1,new-secret=n";
        assert_eq!(amend(&disk, FIRST, add).await, Ok(vec![0, 1]));
        let add = "state=active,iter-time=1,new-secret=m,keyslot=6";
        assert_eq!(amend(&disk, SECOND, add).await, Ok(vec![0, 1, 6]));
        for secret in [FIRST, SECOND, THIRD] {
            assert!(opens(&disk, secret).await);
        }
        assert_eq!(amend(&disk, FIRST, "state=inactive,old-secret=n").await, Ok(vec![0, 6]));
        assert!(!opens(&disk, SECOND).await);
        assert_eq!(amend(&disk, FIRST, "state=inactive,keyslot=0").await, Ok(vec![6]));
        assert!(!opens(&disk, FIRST).await);
        let replace = "!state=active,iter-time=1,new-secret=n,keyslot=6";
        assert_eq!(amend(&disk, THIRD, replace).await, Ok(vec![6]));
        assert!(opens(&disk, SECOND).await && !opens(&disk, THIRD).await);
        assert_eq!(amend(&disk, SECOND, "!state=inactive,keyslot=6").await, Ok(vec![]));
        assert!(!opens(&disk, SECOND).await);
    });
}

#[test]
fn key_changes_that_lock_the_user_out_are_refused_with_qemus_messages() {
    let cases = [
        (
            "state=active,new-secret=m,keyslot=1",
            "Refusing to overwrite active keyslot 1 - please erase it first",
        ),
        (
            "state=active,new-secret=m,keyslot=8",
            "Invalid keyslot 8 specified, must be between 0 and 7",
        ),
        ("state=active", "'new-secret' is required to activate a keyslot"),
        ("state=foo", "Parameter 'state' does not accept value 'foo'"),
        ("new-secret=n", "Parameter 'state' is missing"),
        ("state=active,new-secret=zz", "No secret with id 'zz'"),
        (
            "state=inactive",
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given",
        ),
        ("state=inactive,keyslot=3", "Given keyslot 3 is already erased (inactive) "),
        ("state=inactive,keyslot=9", "Invalid keyslot 9 specified, must be between 0 and 7"),
        (
            "state=inactive,keyslot=1,new-secret=n",
            "'new-secret' must not be given when erasing keyslots",
        ),
        (
            "state=inactive,keyslot=1,iter-time=1",
            "'iter-time' must not be given when erasing keyslots",
        ),
        (
            "state=inactive,keyslot=1,old-secret=m",
            "Given keyslot 1 doesn't contain the given old password for erase operation",
        ),
        (
            "state=inactive,old-secret=m",
            "No keyslots match given (old) password for erase operation",
        ),
    ];
    sim::run(2, async {
        let disk = new_image().await;
        amend(&disk, FIRST, "state=active,iter-time=1,new-secret=n").await.unwrap();
        for (options, message) in cases {
            assert_eq!(amend(&disk, FIRST, options).await, Err(message.to_owned()));
        }
        amend(&disk, FIRST, "state=inactive,keyslot=1").await.unwrap();
        let last = "state=inactive,keyslot=0";
        let message = amend(&disk, FIRST, last).await.unwrap_err();
        assert!(message.starts_with("Attempt to erase the only active keyslot 0 "), "{message}");
        let last = "state=inactive,old-secret=s0";
        let message = amend(&disk, FIRST, last).await.unwrap_err();
        assert!(
            message.starts_with("All the active keyslots match the (old) password "),
            "{message}"
        );
        assert!(opens(&disk, FIRST).await);
    });
}

/// The LUKS header and the key material.
fn key_area(disk: &Disk) -> Vec<u8> {
    let bytes = disk.bytes();
    let (_, offset, len) = luks_header(&bytes);
    bytes[offset..offset + len].to_vec()
}

#[test]
fn an_amend_that_is_refused_changes_no_password() {
    sim::run(4, async {
        let disk = new_image().await;
        let image = Image { variant: luks(), disk: disk.clone() };
        let backend = chain::open(std::slice::from_ref(&image)).await.unwrap();
        let data = IoBuf::from(vec![1; 4096]);
        backend.write(0, data, WriteFlags::empty()).await.unwrap();
        backend.create_snapshot(&SnapshotInfo::default()).await.unwrap();
        let before = key_area(&disk);
        let options = "encrypt.state=active,encrypt.new-secret=s0,encrypt.iter-time=1";
        // A cluster that a snapshot shares has two references. A refcount of one bit cannot have the value 2.
        let refused = format!("{options},refcount_bits=1");
        for (options, accepted) in [(refused.as_str(), false), (options, true)] {
            let options = Options::from_dotted(options, None).unwrap();
            let request = AmendRequest { options, force: false, progress: Box::new(|_, _| ()) };
            let outcome = backend.amend(request).await;
            assert_eq!(outcome.is_ok(), accepted, "{outcome:?}");
            assert_eq!(key_area(&disk) == before, !accepted);
        }
        chain::close(backend).await.unwrap();
    });
}

/// Changes keys, and examines the disks that a power cut may leave at up to 64 write boundaries of the change. One of the
/// passwords `one_of` must open each disk.
fn cut(before: &[&str], options: &str, opened_with: &str, one_of: &[&str]) {
    let moments = RefCell::new(Vec::new());
    sim::run(3, async {
        let disk = new_image().await;
        for options in before {
            amend(&disk, FIRST, options).await.unwrap();
        }
        disk.keep_moments(3, 64);
        amend(&disk, opened_with, options).await.unwrap();
        *moments.borrow_mut() = disk.moments();
    });
    let moments = moments.into_inner();
    assert!(moments.len() > 2, "{}", moments.len());
    for (boundary, moment) in moments {
        let left = [
            moment.after_power_loss_all(),
            moment.after_power_loss_none(),
            moment.after_power_loss(boundary),
            moment.after_power_loss(!boundary),
        ];
        for disk in left {
            sim::run(boundary, async {
                for secret in one_of {
                    if opens(&disk, secret).await {
                        return;
                    }
                }
                panic!("{options}: cut at {boundary}: nothing opens the disk");
            });
        }
    }
}

#[test]
fn a_power_cut_during_a_key_change_leaves_a_password_that_opens_the_disk() {
    let add = "state=active,iter-time=1,new-secret=n";
    cut(&[], add, FIRST, &[FIRST]);
    // The header entry of this slot crosses a sector boundary.
    cut(&[], "state=active,iter-time=1,new-secret=n,keyslot=6", FIRST, &[FIRST]);
    cut(&[add], "state=inactive,keyslot=0", FIRST, &[SECOND]);
    cut(&[], "!state=active,iter-time=1,new-secret=n,keyslot=0", FIRST, &[FIRST, SECOND]);
}

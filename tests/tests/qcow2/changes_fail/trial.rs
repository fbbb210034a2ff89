//! Tests one change of one image: every operation of the disk fails, once or together with all later operations, and the power
//! is cut at every write boundary.

use oxblk_core::{Backend, Errno, Result, WriteFlags};
use oxblk_ring::sim::{self, FailRule, FaultOp, Faults};
use oxblk_ring::{IoBuf, is_zero};

use super::set::{Held, Kind, Set, bitmaps, contents};

const SECTOR: usize = 512;

/// The contents that a failed change may leave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// The old contents.
    Old,
    /// The old contents, but sectors from this byte offset on may read as zeroes.
    ZeroedFrom(usize),
}

impl Left {
    fn allows(self, old: &[u8], now: &[u8]) -> bool {
        match self {
            Self::Old => old == now,
            Self::ZeroedFrom(_) if old.len() != now.len() => false,
            Self::ZeroedFrom(end) => {
                let sectors = old.chunks(SECTOR).zip(now.chunks(SECTOR));
                sectors.enumerate().all(|(index, (old, now))| {
                    old == now || (index * SECTOR >= end && is_zero(now))
                })
            }
        }
    }
}

/// A change of an image of some kind.
pub(super) struct Trial<'a, C> {
    pub(super) kind: &'a Kind,
    pub(super) what: &'a str,
    pub(super) change: C,
    pub(super) left: Left,
    /// Whether a power cut may leave an image that must be repaired when it is opened for writing.
    pub(super) repairs_on_open: bool,
    /// Whether the image refuses all requests after the change, until it is reopened.
    pub(super) ends_use: bool,
}

impl<C: AsyncFn(&Backend) -> Result<()>> Trial<'_, C> {
    /// Runs all parts of the trial.
    pub(super) fn run(&self) {
        let image = self.kind.make();
        let (old, new) = sim::run(1, async {
            let old = Held::by(&image, self.what).await;
            let done = image.copy();
            let backend = done.open().await.unwrap();
            (self.change)(&backend)
                .await
                .unwrap_or_else(|error| panic!("{}: {error}", self.name()));
            backend.close().await.unwrap_or_else(|error| panic!("{}: {error}", self.name()));
            done.assert_sound(false, &self.name()).await;
            (old, Held::by(&done, self.what).await)
        });
        assert!(old != new, "{}: nothing changed", self.name());
        for errno in [Errno::NOSPC, Errno::IO] {
            self.fail_once(&image, &old, &new, errno);
        }
        self.fail_for_good(&image, &old, &new);
        self.cut(&image, &old, &new);
    }

    fn name(&self) -> String {
        format!("{}, {}", self.kind.name, self.what)
    }

    fn is_old(&self, old: &Held, now: &Held) -> bool {
        let same_bitmaps = now.bitmaps.is_empty() || now.bitmaps == old.bitmaps;
        self.left.allows(&old.active, &now.active)
            && old.snapshots == now.snapshots
            && same_bitmaps
            && old.info == now.info
    }

    /// After a power cut, bitmaps that were in use are lost.
    fn is_new(new: &Held, now: &Held) -> bool {
        let same_bitmaps = now.bitmaps.is_empty() || now.bitmaps == new.bitmaps;
        new.active == now.active
            && new.snapshots == now.snapshots
            && same_bitmaps
            && new.info == now.info
    }

    /// Makes the n-th operation of the image's own disk fail. Without `once`, all later operations fail too.
    fn arm(image: &Set, nth: u64, errno: i32, once: bool) {
        let rule = FailRule { op: FaultOp::Any, nth: Some(nth), range: None, errno, once };
        image.disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    }

    fn disarm(image: &Set) {
        image.disks().iter().for_each(|disk| disk.set_faults(Faults::default()));
    }

    /// Makes one operation fail. The change must have happened completely or not at all, and the returned result must be
    /// correct. The image stays in use.
    fn fail_once(&self, image: &Set, old: &Held, new: &Held, errno: i32) {
        let mut fine = 0;
        for nth in 1.. {
            let what = format!("{}: operation {nth} fails with {errno}", self.name());
            let failed = sim::run(nth, self.try_failing_once(image, old, new, (nth, errno), &what));
            fine = if failed { 0 } else { fine + 1 };
            // Some failures do not make the change fail. After 12 such failures in a row, all operations of the change have
            // been tried.
            if fine == 12 {
                // With `ENOSPC`, the driver may have another way to make the change.
                assert!(nth > fine || errno == Errno::NOSPC, "{what}: nothing fails");
                return;
            }
        }
    }

    async fn try_failing_once(
        &self,
        image: &Set,
        old: &Held,
        new: &Held,
        (nth, errno): (u64, i32),
        what: &str,
    ) -> bool {
        let tried = image.copy();
        let backend = tried.open().await.unwrap();
        Self::arm(&tried, nth, errno, true);
        let outcome = (self.change)(&backend).await;
        Self::disarm(&tried);
        let failed = outcome.is_err();
        if !self.ends_use || failed {
            let now = contents(&backend).await;
            let now = now.unwrap_or_else(|error| panic!("{what}: {outcome:?}, then {error}"));
            if failed {
                assert!(self.left.allows(&old.active, &now), "{what}: not the old contents");
            } else {
                assert!(new.active == now, "{what}: not the new contents");
            }
            let bits = bitmaps(&backend);
            assert!(bits == if failed { &old.bitmaps } else { &new.bitmaps }.clone(), "{what}");
            // Data that is written and flushed here must survive all later events.
            backend.write(0, IoBuf::from(vec![7; SECTOR]), WriteFlags::empty()).await.unwrap();
            backend.flush().await.unwrap_or_else(|error| panic!("{what}: {error}"));
            let cut = tried.map(oxblk_ring::sim::Disk::after_power_loss_none);
            let mut after = Held::by(&cut, what).await;
            assert_eq!(after.active[..SECTOR], [7; SECTOR], "{what}: a flushed write is lost");
            after.active[..SECTOR].copy_from_slice(&old.active[..SECTOR]);
            let right = if failed { self.is_old(old, &after) } else { Self::is_new(new, &after) };
            assert!(right, "{what}: a power cut after that leaves something else");
            backend
                .write(0, IoBuf::from(old.active[..SECTOR].to_vec()), WriteFlags::empty())
                .await
                .unwrap();
        }
        if failed {
            // The retry must make the change completely.
            (self.change)(&backend).await.unwrap_or_else(|error| panic!("{what}: retry: {error}"));
        }
        backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let dirty = self.repairs_on_open && word(&tried, 72) & 1 == 1;
        if !dirty {
            // After a shrink, a table that could not be read keeps its clusters.
            tried.assert_sound(self.left != Left::Old, what).await;
        }
        let mut now = Held::by(&tried, what).await;
        // The bitmaps have also recorded the write of this test.
        if !new.bitmaps.is_empty() {
            assert_eq!(now.bitmaps.len(), new.bitmaps.len(), "{what}: a bitmap is lost");
            now.bitmaps.clear();
        }
        assert!(Self::is_new(new, &now), "{what}: not the new image");
        failed
    }

    /// Makes all operations from the n-th on fail. After the failure, the image must be the old or the new image.
    fn fail_for_good(&self, image: &Set, old: &Held, new: &Held) {
        for nth in 1.. {
            let what = format!("{}: all fails from operation {nth} on", self.name());
            let failed = sim::run(nth, async {
                let tried = image.copy();
                let backend = tried.open().await.unwrap();
                Self::arm(&tried, nth, Errno::IO, false);
                let failed = (self.change)(&backend).await.is_err();
                drop(backend.close().await);
                Self::disarm(&tried);
                self.assert_old_or_new(&tried, old, new, &what).await;
                failed
            });
            if !failed {
                return;
            }
        }
    }

    /// Cuts the power at each write boundary.
    fn cut(&self, image: &Set, old: &Held, new: &Held) {
        let done = image.copy();
        let moments = sim::run(1, async {
            oxblk_ring::sim::Disk::keep_common_moments(&done.disks(), 1, usize::MAX);
            let backend = done.open().await.unwrap();
            (self.change)(&backend).await.unwrap();
            backend.close().await.unwrap();
            done.disk.common_moments()
        });
        assert!(moments.len() > 1, "{}: {} moments", self.name(), moments.len());
        for (boundary, disks) in moments {
            let left = image.on(&disks);
            let ways = [
                left.map(oxblk_ring::sim::Disk::after_power_loss_none),
                left.map(oxblk_ring::sim::Disk::after_power_loss_all),
                left.map(|disk| disk.after_power_loss(boundary)),
            ];
            for (number, left) in ways.iter().enumerate() {
                let what = format!("{}: cut at {boundary}, disk {number}", self.name());
                sim::run(boundary, self.assert_old_or_new(left, old, new, &what));
                if self.repairs_on_open && number == 0 {
                    self.check_by_qemu(left, &what);
                }
            }
        }
    }

    /// Runs `qemu-img check` on an image after a power cut. The image must have at worst leaks, or be dirty and pass the check
    /// after it has been opened.
    fn check_by_qemu(&self, left: &Set, what: &str) {
        let (code, text) = left.check_by_qemu();
        let dirty = word(left, 72) & 1 == 1;
        assert!(dirty || code == 0 || code == 3, "{what}: {text}");
        if dirty {
            let opened = left.copy();
            sim::run(1, async { opened.open().await.unwrap().close().await.unwrap() });
            let (code, text) = opened.check_by_qemu();
            assert_eq!(code, 0, "{what}, opened: {text}");
        }
    }

    async fn assert_old_or_new(&self, left: &Set, old: &Held, new: &Held, what: &str) {
        let dirty = word(left, 72) & 1 == 1;
        assert!(!dirty || self.repairs_on_open, "{what}: the image is dirty");
        if !dirty {
            left.assert_sound(true, what).await;
        }
        let now = Held::by(left, what).await;
        let is_old = self.is_old(old, &now);
        assert!(is_old || Self::is_new(new, &now), "{what}: neither the old image nor the new");
        let again = left.copy();
        let backend = again.open().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        if is_old && !old.bitmaps.is_empty() && now.bitmaps.is_empty() {
            // Bitmaps that were in use during the power cut prevent some changes.
        } else if is_old {
            (self.change)(&backend).await.unwrap_or_else(|error| panic!("{what}: retry: {error}"));
        }
        backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        again.assert_sound(true, what).await;
        if is_old && (old.bitmaps.is_empty() || !now.bitmaps.is_empty()) {
            let now = Held::by(&again, what).await;
            assert!(Self::is_new(new, &now), "{what}: a retry does not make the new image");
        }
    }
}

/// Returns a word of the header, or 0 for a version 2 image, which has no feature fields.
fn word(image: &Set, at: usize) -> u64 {
    let bytes = image.disk.bytes();
    if bytes[7] < 3 {
        return 0;
    }
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

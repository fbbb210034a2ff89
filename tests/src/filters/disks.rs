//! A stack of filters on simulated disks, and its recovery after a power cut.

use oxblk_core::{OpenFlags, Perm, Permissions};
use oxblk_ring::IoBufMut;
use oxblk_ring::sim::{Disk, Faults};
use serde_json::{Value, json};

use super::{START, Side, Stack};
use crate::crash::oracle::CrashOracle;
use crate::random::Random;
use crate::sim_disk::{self, Pace};

const SECTOR: usize = 512;

/// The disks of a stack: the disk of the image, and the copies that filters keep.
#[derive(Clone, Debug)]
pub(crate) struct Disks {
    stack: Stack,
    /// The disk with the image, which begins behind [`START`] bytes if the stack says so.
    image: Disk,
    /// The copies of the image's file.
    below: Vec<Disk>,
    /// The copies of the disk that the guest sees.
    above: Vec<Disk>,
    /// The size of the guest's disk in bytes.
    size: u64,
}

/// The image in a new disk, behind `START` bytes.
fn behind_start(image: &Disk) -> Disk {
    let start = usize::try_from(START).expect("a small number");
    let bytes = [vec![0xa5; start], image.bytes()].concat();
    Disk::from_bytes(START, &bytes)
}

impl Disks {
    /// Puts a stack on an image that is not open. The guest sees `content`.
    pub(crate) fn new(stack: &Stack, image: &Disk, content: &[u8]) -> Self {
        let copies = |side, bytes: &[u8]| {
            (0..stack.copies(side)).map(|number| Disk::from_bytes(number as u64, bytes)).collect()
        };
        Self {
            stack: stack.clone(),
            image: if stack.has_start() { behind_start(image) } else { image.clone() },
            below: copies(Side::Below, &image.bytes()),
            above: copies(Side::Above, content),
            size: content.len() as u64,
        }
    }

    /// All disks. The disk of the image is first.
    pub(crate) fn all(&self) -> Vec<&Disk> {
        std::iter::once(&self.image).chain(&self.below).chain(&self.above).collect()
    }

    /// The same stack on other disks, in the order of [`all`](Disks::all).
    pub(crate) fn on(&self, disks: &[Disk]) -> Self {
        let (first, copies) = disks.split_first().expect("the disk of the image");
        let (below, above) = copies.split_at(self.below.len());
        let (below, above) = (below.to_vec(), above.to_vec());
        Self { image: first.clone(), below, above, ..self.clone() }
    }

    /// Sets the faults of all disks.
    pub(crate) fn set_faults(&self, faults: &Faults) {
        self.all().iter().for_each(|disk| disk.set_faults(faults.clone()));
    }

    /// The disk with the image as the node above the filters sees it.
    pub(crate) fn image(&self) -> Disk {
        if !self.stack.has_start() {
            return self.image.clone();
        }
        let start = usize::try_from(START).expect("a small number");
        Disk::from_bytes(START, self.image.bytes().get(start..).unwrap_or_default())
    }

    /// The disk of the image, also if the image begins behind other bytes.
    pub(crate) fn image_disk(&self) -> &Disk {
        &self.image
    }

    /// The copies of one side, each with the name of its node.
    pub(crate) fn copies(&self, side: Side) -> Vec<(String, &Disk)> {
        let (prefix, disks) = match side {
            Side::Above => ("guest", &self.above),
            Side::Below => ("copy", &self.below),
        };
        disks.iter().enumerate().map(|(number, disk)| (format!("{prefix}{number}"), disk)).collect()
    }

    /// Puts the filters of one side above a node.
    pub(crate) fn wrap(&self, side: Side, node: Value) -> Value {
        let names: Vec<Value> =
            self.copies(side).into_iter().map(|(name, _)| name.into()).collect();
        self.stack.wrap(side, node, &names, self.size)
    }

    /// Checks that all copies are equal to their original. The disk must be closed.
    ///
    /// # Errors
    /// Names the copy that differs.
    pub(crate) fn check_copies(&self, content: &[u8]) -> Result<(), String> {
        let image = self.image().bytes();
        let below = self.copies(Side::Below).into_iter().map(|copy| (copy, &image[..]));
        let above = self.copies(Side::Above).into_iter().map(|copy| (copy, content));
        for ((name, disk), expected) in below.chain(above) {
            let bytes = disk.bytes();
            if bytes != expected {
                let at = bytes.iter().zip(expected).position(|(one, other)| one != other);
                let (len, other) = (bytes.len(), expected.len());
                return Err(format!("{name} ({len} of {other} bytes) differs at {at:?}"));
            }
        }
        Ok(())
    }

    /// Checks after a power cut that each copy of the guest's disk has a possible content.
    ///
    /// # Errors
    /// Names the copy, and the sector.
    pub(crate) fn check_guest_copies(&self, oracle: &CrashOracle) -> Result<(), String> {
        for (name, disk) in self.copies(Side::Above) {
            oracle.check(&disk.bytes()).map_err(|error| format!("{name}: {error}"))?;
        }
        Ok(())
    }

    /// Recovers the image after a power cut. The copies of a quorum may differ, so the copies vote on each sector that is not
    /// the same in all of them. Before the vote, sectors of one copy are corrupted on which the other two copies agree: the
    /// majority must correct them.
    ///
    /// # Errors
    /// The errors of the quorum, or a text if its children are not equal after the vote.
    pub(crate) async fn recover(&self, seed: u64) -> Result<Disk, String> {
        let image = self.image();
        let quorums = self.stack.side(Side::Below).iter();
        let mut copies = &self.below[..];
        for filter in quorums.filter(|filter| filter.copies() > 0) {
            let (own, rest) = copies.split_at(filter.copies());
            copies = rest;
            if let [one, other] = own {
                vote([&image, one, other], seed).await.map_err(|e| format!("the vote: {e}"))?;
            }
        }
        Ok(image)
    }
}

/// Makes three disks equal: a quorum corrects them.
async fn vote(disks: [&Disk; 3], seed: u64) -> Result<(), String> {
    // A quorum needs children of the same size.
    let longest = disks.iter().map(|disk| disk.len()).max().unwrap_or(0);
    for disk in disks {
        let file = oxblk_ring::File::sim(disk);
        file.set_len(longest).await.map_err(|e| e.to_string())?;
    }
    corrupt_minority(disks, &mut Random::new(seed));
    let graph = super::graph();
    let text = |error: oxblk_core::Error| error.to_string();
    let names = ["one", "two", "three"];
    for (name, disk) in names.into_iter().zip(disks) {
        graph
            .keep_open(sim_disk::add(&graph, name, disk, false, Pace::AtOnce).map_err(text)?)
            .map_err(text)?;
    }
    let options = json!({
        "driver": "quorum", "children": names, "vote-threshold": 1, "rewrite-corrupted": true,
    });
    let node = graph.open(super::options(&options), OpenFlags::default()).await.map_err(text)?;
    let reading = Permissions::sharing_all(Perm::CONSISTENT_READ);
    let backend = oxblk_core::Backend::new(&graph, "", node, reading).map_err(text)?;
    let bytes = disks.map(Disk::bytes);
    for at in (0..bytes[0].len()).step_by(SECTOR) {
        let sectors = bytes.each_ref().map(|bytes| bytes.get(at..bytes.len().min(at + SECTOR)));
        if sectors[0] == sectors[1] && sectors[1] == sectors[2] {
            continue;
        }
        let len = sectors[0].map_or(0, <[u8]>::len);
        backend.read(at as u64, IoBufMut::new(len)).await.map_err(text)?;
    }
    crate::model::chain::close(backend).await?;
    let [one, other, last] = disks.map(Disk::bytes);
    if one == other && other == last { Ok(()) } else { Err("the children differ".to_owned()) }
}

/// Corrupts sectors of one disk on which the other two disks agree.
fn corrupt_minority(disks: [&Disk; 3], random: &mut Random) {
    let victim = usize::try_from(random.below(3)).expect("a small number");
    let bytes = disks.map(Disk::bytes);
    let others = [&bytes[(victim + 1) % 3], &bytes[(victim + 2) % 3]];
    for at in (0..others[0].len()).step_by(SECTOR) {
        let sector = |bytes: &[u8]| bytes.get(at..bytes.len().min(at + SECTOR)).map(<[u8]>::to_vec);
        if random.one_in(4) && sector(others[0]) == sector(others[1]) {
            disks[victim].corrupt(at as u64..at as u64 + 1);
        }
    }
}

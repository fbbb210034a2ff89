//! The sectors of a simulated disk, and the versions of each sector that a power cut may leave.
//!
//! Durable data survives a power cut. `live` contains the sectors that reads return. `durable` contains the sectors
//! that were flushed or written with FUA. `pending` contains, for each sector, all versions since the durable version,
//! in order. After a power cut, each sector independently has its durable version or any pending version; the same
//! holds for the size. A flush makes the newest version durable that was complete when the flush began.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::rng::Rng;

pub(super) const SECTOR: u64 = 512;
const SECTOR_LEN: usize = 512;

/// The data of a sector, in memory that the copies of a disk share.
#[derive(Clone)]
struct Data {
    bytes: Arc<[u8; SECTOR_LEN]>,
    /// Whether reads of the sector succeed.
    is_readable: bool,
}

impl Data {
    fn new(bytes: [u8; SECTOR_LEN]) -> Data {
        Data { bytes: Arc::new(bytes), is_readable: true }
    }
}

/// Content of a sector; `None` is a hole.
type Sector = Option<Data>;

#[derive(Clone, Default)]
pub(super) struct Media {
    live: BTreeMap<u64, Data>,
    len: u64,
    durable: BTreeMap<u64, Data>,
    durable_len: u64,
    pending: BTreeMap<u64, Vec<(u64, Sector)>>,
    pending_len: Vec<(u64, u64)>,
    /// Number of the last change.
    change: u64,
}

/// Selects the pending versions that survive.
pub(super) enum Survivors<'a> {
    None,
    All,
    Any(&'a mut Rng),
}

impl Media {
    pub(super) fn with_len(len: u64) -> Media {
        Media { len, durable_len: len, ..Media::default() }
    }

    /// A disk whose content is durable.
    pub(super) fn from_bytes(bytes: &[u8]) -> Media {
        let mut media = Media::with_len(bytes.len() as u64);
        for (piece, at) in bytes.chunks(SECTOR_LEN).zip(0u64..) {
            if piece.iter().any(|&b| b != 0) {
                let mut sector = [0; SECTOR_LEN];
                for (to, from) in sector.iter_mut().zip(piece) {
                    *to = *from;
                }
                let sector = Data::new(sector);
                media.durable.insert(at, sector.clone());
                media.live.insert(at, sector);
            }
        }
        media
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The number of the last change. A flush records this number when it begins.
    pub(super) fn change(&self) -> u64 {
        self.change
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let available = self.len.saturating_sub(offset).min(out.len() as u64);
        let count = usize::try_from(available).unwrap_or(0);
        let mut done = 0;
        while done < count {
            let (number, within, n) = piece(offset + done as u64, count - done);
            let Some(to) = out.get_mut(done..done + n) else { break };
            match self.live.get(&number).and_then(|s| s.bytes.get(within..within + n)) {
                Some(from) => to.copy_from_slice(from),
                None => to.fill(0),
            }
            done += n;
        }
        count
    }

    /// The bytes of a sector, also of an unreadable sector.
    fn bytes_of(&self, number: u64) -> [u8; SECTOR_LEN] {
        self.live.get(&number).map_or([0; SECTOR_LEN], |data| *data.bytes)
    }

    /// Whether all sectors of a range can be read.
    pub(super) fn is_readable(&self, range: &Range<u64>) -> bool {
        let (first, last) = (range.start / SECTOR, range.end.min(self.len).div_ceil(SECTOR));
        self.live.range(first..last.max(first)).all(|(_, data)| data.is_readable)
    }

    /// Whether a change of this range can be made: the sectors of which it changes only a part can be read.
    pub(super) fn is_changeable(&self, range: &Range<u64>) -> bool {
        [range.start, range.end]
            .into_iter()
            .filter(|end| !end.is_multiple_of(SECTOR))
            .all(|end| self.live.get(&(end / SECTOR)).is_none_or(|data| data.is_readable))
    }

    /// Changes the content of a sector that the last change has written.
    pub(super) fn corrupt_written(&mut self, number: u64, fua: bool, rng: &mut Rng) {
        let mut bytes = self.bytes_of(number);
        flip(&mut bytes, &random_bits(rng));
        self.rewrite(number, Data::new(bytes), fua);
    }

    /// Makes a sector unreadable that the last change has written.
    pub(super) fn spoil_written(&mut self, number: u64, fua: bool) {
        let bytes = self.bytes_of(number);
        self.rewrite(number, Data { is_readable: false, ..Data::new(bytes) }, fua);
    }

    /// Replaces the version of a sector that the last change has written.
    fn rewrite(&mut self, number: u64, data: Data, fua: bool) {
        if fua {
            self.live.insert(number, data.clone());
            self.durable.insert(number, data);
            return;
        }
        if let Some(versions) = self.pending.get_mut(&number) {
            versions.pop();
        }
        self.set_sector(number, Some(data));
    }

    /// Changes the content of a sector at rest: all versions that a power cut may leave change in the same bits.
    pub(super) fn corrupt_at_rest(&mut self, number: u64, rng: &mut Rng) {
        let bits = random_bits(rng);
        self.change_at_rest(number, |data| flip(Arc::make_mut(&mut data.bytes), &bits));
    }

    /// Makes a sector at rest unreadable, in all versions that a power cut may leave.
    pub(super) fn spoil_at_rest(&mut self, number: u64) {
        self.change_at_rest(number, |data| data.is_readable = false);
    }

    fn change_at_rest(&mut self, number: u64, change: impl Fn(&mut Data)) {
        let empty = || Data::new([0; SECTOR_LEN]);
        change(self.live.entry(number).or_insert_with(empty));
        change(self.durable.entry(number).or_insert_with(empty));
        for (_, version) in self.pending.get_mut(&number).into_iter().flatten() {
            change(version.get_or_insert_with(empty));
        }
    }

    fn set_sector(&mut self, number: u64, new: Sector) {
        match &new {
            Some(data) => drop(self.live.insert(number, data.clone())),
            None => drop(self.live.remove(&number)),
        }
        self.pending.entry(number).or_default().push((self.change, new));
    }

    fn set_live_len(&mut self, len: u64) {
        self.len = len;
        self.pending_len.push((self.change, len));
    }

    /// Writes, and extends the disk if necessary. With `fua` the written sectors are durable immediately, and so are
    /// the changes of the size that a read of these sectors needs.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], fua: bool) {
        self.change += 1;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (number, within, n) = piece(at, data.len() - done);
            let mut sector = self.bytes_of(number);
            if let (Some(to), Some(from)) =
                (sector.get_mut(within..within + n), data.get(done..done + n))
            {
                to.copy_from_slice(from);
            }
            self.set_sector(number, Some(Data::new(sector)));
            if fua {
                self.settle_sector(number, u64::MAX);
            }
            done += n;
        }
        let end = offset + data.len() as u64;
        if end > self.len && !data.is_empty() {
            self.set_live_len(end);
        }
        if fua {
            self.settle_len_for(end);
        }
    }

    /// Zeroes a byte range. Complete sectors become holes.
    pub(super) fn zero(&mut self, offset: u64, len: u64, extend: bool) {
        self.change += 1;
        let end = offset.saturating_add(len);
        let reach = if extend { end } else { end.min(self.len) };
        let (first, last) = (offset / SECTOR, reach.div_ceil(SECTOR));
        let touched: Vec<u64> = self.live.range(first..last.max(first)).map(|(&n, _)| n).collect();
        for number in touched {
            let start = offset.max(number * SECTOR) - number * SECTOR;
            let stop = reach.min((number + 1) * SECTOR).saturating_sub(number * SECTOR);
            if start == 0 && stop == SECTOR {
                self.set_sector(number, None);
            } else if let Some(mut data) = self.live.get(&number).cloned() {
                let (start, stop) =
                    (usize::try_from(start).unwrap_or(0), usize::try_from(stop).unwrap_or(0));
                if let Some(bytes) = Arc::make_mut(&mut data.bytes).get_mut(start..stop) {
                    bytes.fill(0);
                }
                self.set_sector(number, Some(data));
            }
        }
        if extend && end > self.len {
            self.set_live_len(end);
        }
    }

    pub(super) fn truncate(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len, false);
            // All sectors after the new end are removed, also if the new end is not at a sector boundary.
            let first = len.div_ceil(SECTOR);
            let beyond: Vec<u64> = self.live.range(first..).map(|(&n, _)| n).collect();
            for number in beyond {
                self.set_sector(number, None);
            }
        }
        self.change += 1;
        self.set_live_len(len);
    }

    /// Makes all changes up to and including `change` durable.
    pub(super) fn settle(&mut self, change: u64) {
        let numbers: Vec<u64> = self.pending.keys().copied().collect();
        for number in numbers {
            self.settle_sector(number, change);
        }
        self.settle_len(change);
    }

    fn settle_sector(&mut self, number: u64, change: u64) {
        let Some(versions) = self.pending.get_mut(&number) else { return };
        let settled = versions.partition_point(|(c, _)| *c <= change);
        let newest = versions.drain(..settled).next_back();
        if versions.is_empty() {
            self.pending.remove(&number);
        }
        match newest {
            Some((_, Some(data))) => drop(self.durable.insert(number, data)),
            Some((_, None)) => drop(self.durable.remove(&number)),
            None => {}
        }
    }

    fn settle_len(&mut self, change: u64) {
        let settled = self.pending_len.partition_point(|(c, _)| *c <= change);
        if let Some((_, len)) = self.pending_len.drain(..settled).next_back() {
            self.durable_len = len;
        }
    }

    /// Makes the oldest changes of the size durable, as many as are needed so that no remaining version of the size is
    /// smaller than `end`. A file system records changes of the size in order. A write with FUA needs the change that
    /// made room for its data, and all earlier changes, but it needs no other change.
    fn settle_len_for(&mut self, end: u64) {
        let small = self.pending_len.iter().rposition(|(_, len)| *len < end);
        let needed = match small {
            Some(last) => last + 1,
            None if self.durable_len < end => 0,
            None => return,
        };
        if let Some((change, _)) = self.pending_len.get(needed).copied() {
            self.settle_len(change);
        }
    }

    /// The disk after a power cut.
    pub(super) fn after_power_loss(&self, mut survivors: Survivors<'_>) -> Media {
        let mut sectors = self.durable.clone();
        for (&number, versions) in &self.pending {
            let chosen = match &mut survivors {
                Survivors::None => None,
                Survivors::All => versions.last(),
                Survivors::Any(rng) => {
                    rng.index(versions.len() + 1).checked_sub(1).and_then(|i| versions.get(i))
                }
            };
            match chosen {
                Some((_, Some(data))) => drop(sectors.insert(number, data.clone())),
                Some((_, None)) => drop(sectors.remove(&number)),
                None => {}
            }
        }
        let lens = &self.pending_len;
        let len = match &mut survivors {
            Survivors::None => None,
            Survivors::All => lens.last(),
            Survivors::Any(rng) => {
                rng.index(lens.len() + 1).checked_sub(1).and_then(|i| lens.get(i))
            }
        };
        let len = len.map_or(self.durable_len, |(_, len)| *len);
        sectors.retain(|&number, _| number < len.div_ceil(SECTOR));
        if let Some(last) = sectors.get_mut(&(len / SECTOR)) {
            let keep = usize::try_from(len % SECTOR).unwrap_or(0);
            Arc::make_mut(&mut last.bytes).iter_mut().skip(keep).for_each(|b| *b = 0);
        }
        Media { live: sectors.clone(), len, durable: sectors, durable_len: len, ..Media::default() }
    }

    /// Whether the sector at `offset` has data, and the end of the run of sectors of the same kind.
    pub(super) fn extent(&self, offset: u64) -> (bool, u64) {
        let first = offset / SECTOR;
        let mut expected = first;
        for (&number, _) in self.live.range(first..) {
            if number != expected {
                break;
            }
            expected += 1;
        }
        if expected > first {
            return (true, (expected * SECTOR).min(self.len));
        }
        let next = self.live.range(first..).next().map_or(self.len, |(&n, _)| n * SECTOR);
        (false, next.min(self.len))
    }
}

/// Random bits of a sector. The first bit is always set.
fn random_bits(rng: &mut Rng) -> [u8; SECTOR_LEN] {
    let mut bits = [0; SECTOR_LEN];
    for eight in bits.chunks_exact_mut(8) {
        eight.copy_from_slice(&rng.next().to_le_bytes());
    }
    if let Some(first) = bits.first_mut() {
        *first |= 1;
    }
    bits
}

/// Inverts bits of a sector.
fn flip(bytes: &mut [u8; SECTOR_LEN], bits: &[u8; SECTOR_LEN]) {
    bytes.iter_mut().zip(bits).for_each(|(byte, bits)| *byte ^= bits);
}

/// The sector that contains `offset`, the offset within the sector, and how many of `len` bytes lie in the sector.
fn piece(offset: u64, len: usize) -> (u64, usize, usize) {
    let within = usize::try_from(offset % SECTOR).unwrap_or(0);
    (offset / SECTOR, within, len.min(SECTOR_LEN - within))
}

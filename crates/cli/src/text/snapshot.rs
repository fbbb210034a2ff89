//! The list of an image's internal snapshots.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use oxblk_core::names;
use oxblk_core::snapshot::SnapshotInfo;

use super::size;

/// A line with titles and one line for each snapshot. Dates are in local time.
pub(crate) fn list(snapshots: &[SnapshotInfo]) -> String {
    let mut text = "Snapshot list:\n".to_owned();
    text.push_str(&line(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]));
    for snapshot in snapshots {
        let icount = snapshot.icount.filter(|count| *count != u64::MAX);
        text.push_str(&line([
            &snapshot.id,
            &snapshot.name,
            &size::short(snapshot.vm_state_size),
            &date(snapshot.date.0, &TimeZone::system()),
            &clock(snapshot.vm_clock),
            &icount.map_or_else(|| "--".to_owned(), |count| count.to_string()),
        ]));
    }
    text
}

fn line([id, name, size, date, clock, icount]: [&str; 6]) -> String {
    let (id, name) = (padded(id, 7), padded(name, 16));
    format!("{id} {name} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
}

/// A name padded with spaces to a width in bytes.
fn padded(name: &str, width: usize) -> String {
    let blanks = width.saturating_sub(names::to_bytes(name).len());
    format!("{name}{}", " ".repeat(blanks))
}

fn date(seconds: u32, zone: &TimeZone) -> String {
    let time = Timestamp::from_second(seconds.into()).unwrap_or_default();
    time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// Guest time as hours, minutes, seconds and milliseconds.
fn clock(nanoseconds: u64) -> String {
    let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        rest / 1_000_000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_at_the_same_places_as_in_qemu() {
        let headline = line(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
        let expected =
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n";
        assert_eq!(headline, expected);
        assert_eq!(date(1_795_245_875, &TimeZone::UTC), "2026-11-21 07:24:35");
        assert_eq!(clock(3_723_004_999_999), "0001:02:03.004");
    }
}

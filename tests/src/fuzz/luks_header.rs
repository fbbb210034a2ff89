//! Fuzzes the LUKS header. Parsing never panics. The key material of an accepted header overlaps no other part. Such a header
//! stays the same when it is written and read again, and an attempt to unlock it needs a bounded amount of work.

use oxblk_crypto::luks::{Header, MAX_WORK};

/// Runs one input.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let Ok(header) = Header::parse(data) else { return };
    assert!(header.suite.check().is_ok());
    let places = header.slots.each_ref().map(|slot| slot.material(header.suite));
    for (index, place) in places.iter().enumerate() {
        assert!(place.start >= Header::LEN as u64 && place.end <= header.payload_offset());
        assert!(place.end - place.start < 1 << 20);
        let apart =
            |other: &std::ops::Range<u64>| other.end <= place.start || place.end <= other.start;
        assert!(places.iter().skip(index + 1).all(apart));
    }
    let again = Header::parse(&header.encode()).expect("what was written is read");
    assert_eq!(again, header);
    if header.check_work().is_ok() {
        let most = header.active_slots().map(|(_, slot)| u64::from(slot.iterations)).max();
        assert!(most.unwrap_or(0) <= MAX_WORK);
    }
}

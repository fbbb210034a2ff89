//! Fuzzes the footer, the header and entries of the BAT of VPC images. Parsing never panics, and an accepted footer or
//! header keeps the invariants of [`Footer`] and [`Header`].

use oxblk_formats::vpc::Entry;
use oxblk_formats::vpc::footer::{FOOTER_BYTES, Footer, MAX_SIZE, SizeRule};
use oxblk_formats::vpc::header::{HEADER_BYTES, Header};

/// Writes the correct checksum, so that parsing does not stop at the checksum.
fn correct(footer: &mut [u8]) {
    footer[64..68].fill(0);
    let sum = footer.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
}

/// Runs one input: the size of the file, the footer, and the header.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let Some((size, rest)) = data.split_first_chunk() else { return };
    let file_size = u64::from_be_bytes(*size);
    for word in rest.chunks_exact(4) {
        let number = u32::from_le_bytes(word.try_into().unwrap());
        let entry = Entry::from_number(number);
        assert_eq!(entry.number(), number);
        assert_eq!(entry == Entry::Zero, number == u32::MAX);
    }
    let Some((footer, header)) = rest.split_first_chunk::<512>() else { return };
    let mut footer = footer.to_vec();
    let as_given = Footer::parse(&footer);
    assert!(as_given.is_err() || as_given.is_ok_and(|parsed| parsed.encode() == footer));
    correct(&mut footer);
    let Ok(footer) = Footer::parse(&footer) else { return };
    assert_eq!(Footer::parse(&footer.encode()), Ok(footer));
    for rule in [SizeRule::ByCreator, SizeRule::Geometry, SizeRule::CurrentSize] {
        let Ok(size) = footer.size(rule) else { continue };
        assert!(size <= MAX_SIZE && size.is_multiple_of(512));
        let offset = footer.header_offset();
        let Ok(header) = Header::parse(header, offset, size, file_size) else { continue };
        let block = header.block();
        assert!(block.is_power_of_two() && block >= 512);
        assert!(
            size.div_ceil(block) == u64::from(header.blocks) && header.blocks <= header.entries()
        );
        assert!(header.bitmap().is_multiple_of(512) && header.bitmap() * 4096 >= block);
        assert!(offset >= FOOTER_BYTES && offset + HEADER_BYTES <= file_size);
        let (table, needed) = (header.table_offset(), u64::from(header.blocks) * 4);
        assert!(table >= FOOTER_BYTES && table + needed <= file_size);
        assert!(table >= offset + HEADER_BYTES || table + needed <= offset);
        assert!(header.metadata_end() >= offset + HEADER_BYTES);
        assert!(header.overlaps(0, 1) && header.overlaps(offset, offset + 1));

        let again = Header::parse(&header.encode(), offset, size, file_size);
        let again = again.expect("what was written is read");
        assert!(again.has_correct_checksum());
    }
}

//! Images in the form of other programs: blocks at other offsets, smaller blocks, sector bitmaps with unset bits, and
//! additional metadata.

use std::path::Path;

use oxblk_tests::program::Program;

/// Size of the disk in bytes.
const SIZE: u64 = 1 << 20;

fn checksum(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum = bytes.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
    bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Builds an image by the specification. `blocks` are the sectors of blocks in the file, for the first blocks of the disk.
/// Block `n` contains bytes of the value `n + 1`. Only the first half of its sector bitmap is set.
fn build(creator: &[u8; 4], block: u32, table: u64, blocks: &[u32], len: u64) -> Vec<u8> {
    let mut footer = [0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[8..16].copy_from_slice(&[0, 0, 0, 2, 0, 1, 0, 0]);
    footer[16..24].copy_from_slice(&512_u64.to_be_bytes());
    footer[28..32].copy_from_slice(creator);
    footer[40..48].copy_from_slice(&SIZE.to_be_bytes());
    footer[48..56].copy_from_slice(&SIZE.to_be_bytes());
    footer[63] = 3;
    checksum(&mut footer, 64);
    let mut header = [0; 1024];
    header[..8].copy_from_slice(b"cxsparse");
    header[8..16].fill(0xff);
    header[16..24].copy_from_slice(&table.to_be_bytes());
    header[24..28].copy_from_slice(&[0, 1, 0, 0]);
    let entries = u32::try_from(SIZE).expect("a small disk").div_ceil(block);
    header[28..32].copy_from_slice(&entries.to_be_bytes());
    header[32..36].copy_from_slice(&block.to_be_bytes());
    checksum(&mut header, 36);
    let mut image = vec![0; usize::try_from(len).expect("a small image")];
    image[..512].copy_from_slice(&footer);
    image[512..1536].copy_from_slice(&header);
    let end = image.len() - 512;
    image[end..].copy_from_slice(&footer);
    let table = usize::try_from(table).expect("a small image");
    image[table..table + 4 * entries as usize].fill(0xff);
    for (index, sector) in blocks.iter().enumerate() {
        image[table + 4 * index..table + 4 * index + 4].copy_from_slice(&sector.to_be_bytes());
        let at = *sector as usize * 512;
        let bits = block as usize / 4096;
        image[at..at + bits.div_ceil(2)].fill(0xff);
        let data = at + bits.max(1).next_multiple_of(512);
        image[data..data + block as usize].fill(u8::try_from(index + 1).expect("few blocks"));
    }
    image
}

fn io(directory: &Path, program: Program, commands: &[&str]) -> String {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let reply = program.args(["-f", "vpc"]).args(commands).arg("image").directory(directory);
    let said = reply.succeed().out();
    assert!(!said.contains("verification failed"), "{said}");
    said
}

#[test]
fn images_with_blocks_anywhere_are_read_written_and_checked() {
    // The blocks are out of order, and not a whole number of blocks apart.
    let far: u64 = 4096 * 512;
    for (block, sectors) in [(65536, [900, 200, 500]), (4096, [90, 70, 81]), (512, [30, 40, 35])] {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let directory = scratch.path();
        let path = directory.join("image");
        std::fs::write(&path, build(b"win ", block, 2048, &sectors, far)).expect("the image");
        let block = u64::from(block);
        let reads: Vec<String> =
            (0..3).map(|n| format!("read -P {} {} {block}", n + 1, n * block)).collect();
        let reads: Vec<&str> = reads.iter().map(String::as_str).collect();
        io(directory, Program::oxblk().arg("io"), &reads);
        let write = format!("write -P 7 {} {block}", 2 * block);
        let allocate = format!("write -P 8 {} {block}", 9 * block);
        io(directory, Program::oxblk().arg("io"), &[&write, &allocate]);
        let after = [
            reads[0].to_owned(),
            format!("read -P 7 {} {block}", 2 * block),
            format!("read -P 8 {} {block}", 9 * block),
        ];
        let after: Vec<&str> = after.iter().map(String::as_str).collect();
        io(directory, Program::oxblk().arg("io"), &after);
        // QEMU expects no sector bitmap in smaller blocks.
        if block >= 4096 {
            io(directory, Program::new("qemu-io"), &after);
        }
        let bytes = std::fs::read(&path).expect("the image");
        let bitmap = sectors[2] as usize * 512;
        let bits = usize::try_from(block / 4096).expect("a small block");
        assert!(bytes[bitmap..bitmap + bits].iter().all(|byte| *byte == 0xff), "unset bits");
        let check = Program::oxblk().args(["img", "check", "-f", "vpc", "image"]);
        check.directory(directory).succeed();
    }
}

#[test]
fn metadata_of_xenserver_behind_the_block_table_is_kept() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    let mut image = build(b"tap\0", 65536, 1536, &[], 4096);
    image[2048..2056].copy_from_slice(b"tdbatmap");
    std::fs::write(&path, image).expect("the image");
    io(scratch.path(), Program::oxblk().arg("io"), &["write -P 5 64k 64k"]);
    io(scratch.path(), Program::new("qemu-io"), &["read -P 5 64k 64k", "read -P 0 0 64k"]);
    let bytes = std::fs::read(&path).expect("the image");
    assert!(bytes[2048..].starts_with(b"tdbatmap"));
    assert!(bytes.ends_with(&bytes[..512]));
}

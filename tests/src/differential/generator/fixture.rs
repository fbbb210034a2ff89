//! The files that are present before every command line runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::program::Program;

/// The contents of the files of a directory, by their relative paths.
pub(super) type Files = BTreeMap<PathBuf, Vec<u8>>;

fn tool(directory: &Path, name: &str, line: &str) {
    Program::new(name).args(line.split('|')).directory(directory).succeed();
}

/// Creates the files with QEMU's tools.
///
/// # Panics
/// When a file cannot be created.
pub(super) fn make(directory: &Path) {
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(directory.join(name), bytes).expect("a file");
    };
    let guest: Vec<u8> =
        (0..1_048_576_u32).map(|at| if at % 65536 < 30000 { 7 } else { 0 }).collect();
    write("r.raw", &guest);
    write("odd.raw", &[7; 1000]);
    write("empty.raw", b"");
    write("com,ma.raw", &[6; 4096]);
    write("colon:x.raw", &[5; 4096]);
    write("sp ace.raw", &[4; 4096]);
    std::fs::create_dir(directory.join("dir")).expect("a directory");
    let img = |line: &str| tool(directory, "qemu-img", line);
    let io = |line: &str| tool(directory, "qemu-io", line);
    img("create|-q|-f|qcow2|b.qcow2|4M");
    io("-c|write -q -P 1 0 1M|b.qcow2");
    img("create|-q|-f|qcow2|a.qcow2|4M");
    io("-c|write -q -P 3 64k 200k|-c|write -q -z 1M 128k|-c|write -q -P 4 3M 64k|a.qcow2");
    img("snapshot|-c|s|a.qcow2");
    io("-c|write -q -P 5 2M 64k|a.qcow2");
    img("create|-q|-f|qcow2|m.qcow2|4M");
    img("bitmap|--add|m.qcow2|b0");
    img("bitmap|--add|--disable|m.qcow2|b1");
    io("-c|write -q -P 5 2M 64k|m.qcow2");
    img("create|-q|-f|qcow2|-b|b.qcow2|-F|qcow2|top.qcow2");
    io("-c|write -q -P 6 512k 64k|-c|write -q -c -P 8 2M 64k|top.qcow2");
    img("create|-q|-f|qcow2|-o|compat=0.10|old.qcow2|4M");
    io("-c|write -q -P 9 0 64k|old.qcow2");
    img("create|-q|-f|qcow2|-u|-b|gone.qcow2|-F|qcow2|lost.qcow2|4M");
    img("create|-q|-f|qcow2|dir/in.qcow2|1M");
}

/// Writes the files of a fixture into an empty directory.
///
/// # Panics
/// When a file cannot be written.
pub(super) fn write(files: &Files, directory: &Path) {
    std::fs::create_dir_all(directory.join("dir")).expect("a directory");
    for (name, bytes) in files {
        std::fs::write(directory.join(name), bytes).expect("a file");
    }
    symlink("a.qcow2", directory.join("link.qcow2")).expect("a link");
}

/// Reads all files below a directory.
///
/// # Panics
/// When a file cannot be read.
pub(super) fn read(directory: &Path) -> Files {
    let mut files = Files::new();
    collect(directory, Path::new(""), &mut files);
    files
}

fn collect(root: &Path, below: &Path, files: &mut Files) {
    for entry in std::fs::read_dir(root.join(below)).expect("a directory") {
        let entry = entry.expect("an entry");
        let path = below.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            collect(root, &path, files);
        } else if entry.file_type().expect("a type").is_file() {
            files.insert(path, ends(&entry.path()));
        }
    }
}

/// Returns the bytes of a file, or the length, the beginning and the end of a long file.
fn ends(path: &Path) -> Vec<u8> {
    const LONG: u64 = 64 << 20;
    const END: u64 = 1 << 20;
    let mut file = File::open(path).expect("a file");
    let len = file.metadata().expect("its length").len();
    let mut bytes = Vec::new();
    if len <= LONG {
        file.read_to_end(&mut bytes).expect("its bytes");
        return bytes;
    }
    bytes.extend(len.to_le_bytes());
    for start in [0, len - END] {
        file.seek(SeekFrom::Start(start)).expect("a place in it");
        file.by_ref().take(END).read_to_end(&mut bytes).expect("its bytes");
    }
    bytes
}

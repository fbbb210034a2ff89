//! Names that are not UTF-8: of files, backing files, snapshots and bitmaps.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use oxblk_tests::program::{Program, Reply, oxblk};

fn bytes(name: &[u8]) -> OsString {
    OsStr::from_bytes(name).to_owned()
}

/// Runs oxblk. A word that begins with `@` is replaced by the name with that index.
fn run(program: impl AsRef<OsStr>, directory: &Path, line: &str, names: &[&[u8]]) -> Reply {
    let word = |word: &str| match word.strip_prefix('@') {
        Some(index) => bytes(names[index.parse::<usize>().expect("an index")]),
        None => OsString::from(word),
    };
    Program::new(program).args(line.split(' ').map(word)).directory(directory).run()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

const FILE: &[u8] = b"caf\xe9.qcow2";
const SNAPSHOT: &[u8] = b"s\xe9\xff n";
const BITMAP: &[u8] = b"b\x80";

#[test]
fn names_that_are_not_utf8_are_stored_and_printed_unchanged() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    let names = [FILE, SNAPSHOT, BITMAP];
    let succeed = |line: &str| {
        let reply = run(oxblk(), directory, line, &names);
        assert_eq!(reply.code(), 0, "{line}: {}", reply.err());
        reply
    };
    let created = succeed("img create -f qcow2 @0 1M");
    assert!(contains(&created.stdout, b"Formatting 'caf\xe9.qcow2'"));
    assert!(directory.join(bytes(FILE)).exists());
    succeed("img create -q -f qcow2 -b @0 -F qcow2 top");
    succeed("img snapshot -c @1 top");
    succeed("img bitmap --add top @2");
    for program in [oxblk().as_os_str(), OsStr::new("qemu-img")] {
        let tool = if program == OsStr::new("qemu-img") { "" } else { "img " };
        let info = run(program, directory, &format!("{tool}info top"), &names);
        for name in names {
            assert!(contains(&info.stdout, name), "{}", info.out());
        }
    }
    succeed("img snapshot -a @1 top");
    succeed("img snapshot -d @1 top");
    succeed("img bitmap --remove top @2");
    succeed("img convert -O raw top copy");
    succeed("img rebase -b  top");
    let missing = run(oxblk(), directory, "img info @0", &[b"no\xe9"]);
    assert!(contains(&missing.stderr, b"Could not open 'no\xe9'"));
}

#[test]
fn json_output_escapes_names_that_are_not_utf8_and_its_escapes_are_accepted() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    let info = |line: &str| run(oxblk(), directory, line, &[FILE]);
    assert_eq!(info("img create -q -f qcow2 @0 1M").code(), 0);
    let shown = info("img info --output=json @0");
    assert!(shown.stdout.is_ascii());
    let value: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let name = value["filename"].as_str().expect("a name");
    assert_eq!(name, "caf\u{10fee9}.qcow2");
    let json = r#"json:{"driver":"qcow2","file.filename":"caf\uDBFF\uDEE9.qcow2"}"#;
    let again = Program::oxblk().args(["img", "info", json]).directory(directory).run();
    assert_eq!(again.code(), 0, "{}", again.err());
    assert!(contains(&again.stdout, b"image: caf\xe9.qcow2"));
}

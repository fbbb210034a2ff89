//! `--output json` of commands for which qemu-img prints text only: `snapshot -l` and `compare`.

use std::path::Path;

use oxblk_tests::program::Program;
use oxblk_tests::scratch::in_memory;
use serde_json::{Value, json};

fn qemu_img(folder: &Path, line: &str) {
    Program::new("qemu-img").args(line.split(' ')).directory(folder).succeed();
}

/// Returns the exit code and the JSON that `img` prints.
fn img(folder: &Path, line: &str) -> (i32, Value) {
    let reply = Program::oxblk().arg("img").args(line.split(' ')).directory(folder).run();
    let value = serde_json::from_str(&reply.out());
    (reply.code(), value.unwrap_or_else(|error| panic!("{line}: {error}: {}", reply.out())))
}

#[test]
fn snapshots_are_listed_as_in_the_json_of_info() {
    let folder = in_memory();
    let folder = folder.path();
    qemu_img(folder, "create -q -f qcow2 a.qcow2 1M");
    assert_eq!(img(folder, "snapshot --output json a.qcow2"), (0, json!([])));
    qemu_img(folder, "snapshot -c one a.qcow2");
    qemu_img(folder, "snapshot -c two a.qcow2");
    let (code, list) = img(folder, "snapshot -l --output=json a.qcow2");
    assert_eq!((code, list.as_array().unwrap().len()), (0, 2));
    let info = Program::new("qemu-img").args(["info", "--output", "json", "a.qcow2"]);
    let info: Value = serde_json::from_str(&info.directory(folder).succeed().out()).unwrap();
    assert_eq!(list, info["snapshots"]);
}

#[test]
fn the_result_of_a_comparison_names_the_difference_and_its_offset() {
    let folder = in_memory();
    let folder = folder.path();
    let write = |name: &str, len: usize, data: Option<usize>| {
        let mut bytes = vec![0; len];
        if let Some(data) = data {
            bytes[data] = 1;
        }
        std::fs::write(folder.join(name), bytes).unwrap();
    };
    write("zero", 1 << 20, None);
    write("data", 1 << 20, Some(5000));
    write("long", 2 << 20, None);
    qemu_img(folder, "convert -f raw -O qcow2 zero zero.qcow2");
    let compare = |line: &str| img(folder, &format!("compare --output json {line}"));
    let raw = "-f raw -F raw";
    assert_eq!(compare(&format!("{raw} zero zero")), (0, json!({"identical": true})));
    assert_eq!(compare(&format!("{raw} -q -p zero long")), (0, json!({"identical": true})));
    assert_eq!(
        compare(&format!("{raw} zero data")),
        (1, json!({"identical": false, "reason": "content", "offset": 4608}))
    );
    assert_eq!(
        compare(&format!("{raw} -s zero long")),
        (1, json!({"identical": false, "reason": "size"}))
    );
    assert_eq!(
        compare("-s -f raw -F qcow2 zero zero.qcow2"),
        (1, json!({"identical": false, "reason": "block-status", "offset": 0}))
    );
}

//! Resource limits. A tool works with limited resources, or ends with a one-line error.

use std::path::Path;

use oxblk_tests::program::{Program, Reply, oxblk};

const MIB: u64 = 1 << 20;

/// Creates an image with data.
fn image() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    Program::oxblk()
        .args(["img", "create", "-q", "-f", "qcow2", "s", "64M"])
        .directory(path)
        .succeed();
    Program::oxblk().args(["io", "-c", "write -q -P 5 0 24M", "s"]).directory(path).succeed();
    directory
}

/// Runs oxblk with limits, given as options of `prlimit`.
fn limited(directory: &Path, limits: &[&str], line: &str) -> Reply {
    let program = Program::new("prlimit").args(limits).arg("--core=0").arg("--").arg(oxblk());
    program.args(line.split(' ')).directory(directory).run()
}

fn holds_the_same(directory: &Path) {
    Program::oxblk()
        .args(["img", "compare", "-q", "-f", "qcow2", "-F", "raw", "s", "o"])
        .directory(directory)
        .succeed();
}

#[test]
fn many_threads_fit_in_a_small_address_space() {
    let directory = image();
    let path = directory.path();
    for (threads, size) in [(1, 1024), (16, 1024), (64, 1024), (64, 512)] {
        let line = format!("img convert --threads {threads} -O raw s o");
        let reply = limited(path, &[&format!("--as={}", size * MIB)], &line);
        assert_eq!((reply.code(), reply.err().as_str()), (0, ""), "{threads} in {size} MiB");
        holds_the_same(path);
    }
}

#[test]
fn with_too_little_memory_for_all_threads_a_command_uses_fewer_threads() {
    let directory = image();
    let path = directory.path();
    for size in [128, 256] {
        let reply = limited(
            path,
            &[&format!("--as={}", size * MIB)],
            "img convert --threads 64 -O raw s o",
        );
        let text = reply.err();
        assert_eq!(reply.code(), 0, "{text}");
        assert!(text.lines().count() == 1 && text.contains("of 64 threads"), "{text}");
        holds_the_same(path);
    }
}

#[test]
fn with_few_descriptors_a_command_works_or_ends_in_one_line() {
    let directory = image();
    let path = directory.path();
    let mut done = 0;
    for descriptors in (4..=12).chain([16, 24, 32]) {
        let limit = format!("--nofile={descriptors}:{descriptors}");
        let info = limited(path, &[&limit], "img info s");
        let convert = limited(path, &[&limit], "img convert --threads 8 -O raw s o");
        for (reply, lines) in [(&info, 0), (&convert, 1)] {
            let text = reply.err();
            match reply.code() {
                0 => assert!(text.lines().count() <= lines, "{descriptors}: {text}"),
                1 => {
                    assert!(text.lines().count() <= lines + 1, "{descriptors}: {text}");
                    assert!(text.contains("Too many open files"), "{descriptors}: {text}");
                    let said = text.matches("Could not open").count();
                    assert!(said <= 1, "{descriptors}: {text}");
                }
                code => panic!("{descriptors}: exit code {code}: {text}"),
            }
        }
        if convert.code() == 0 {
            done += 1;
            holds_the_same(path);
        }
    }
    assert!(done >= 3, "{done}");
}

#[test]
fn a_small_stack_is_enough() {
    let directory = image();
    let path = directory.path();
    for kib in [64, 256] {
        let limit = format!("--stack={}", kib << 10);
        for line in ["img info s", "img convert -O raw s o", "io -c quit s"] {
            let reply = limited(path, &[&limit], line);
            assert_eq!((reply.code(), reply.err().as_str()), (0, ""), "{line} in {kib} KiB");
        }
        holds_the_same(path);
    }
}

//! The files that an image may open: by default the same files as with QEMU, and no file with `--untrusted`.

use std::path::Path;

use oxblk::core::{ErrorKind, Gate, Graph, OpenFlags, Options};
use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

const JSON: &str = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base"}}"#;

fn qemu_img(directory: &Path, args: &[&str]) {
    Program::new("qemu-img").args(args).directory(directory).succeed();
}

/// Creates `base` (raw), its overlay `mid`, the overlay `top` of `mid`, and `data` with the data file `guest`.
fn images() -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    std::fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid"]);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", "data_file=guest", "data", "1M"]);
    scratch
}

/// Creates an overlay of 1 MiB with the backing file name `backing`. The backing file is not opened.
fn overlay(directory: &Path, name: &str, backing: &str) {
    let args = ["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", name, "1M"];
    qemu_img(directory, &args);
}

fn run(directory: &Path, args: &[&str]) -> oxblk_tests::program::Reply {
    Program::oxblk().args(args).directory(directory).run()
}

/// Asserts that the command fails with one line that contains all of `parts`.
fn is_refused(directory: &Path, args: &[&str], parts: &[&str]) {
    let reply = run(directory, args);
    let error = reply.err();
    // `compare` uses exit code 1 for images that differ.
    let expected = if args.contains(&"compare") { 2 } else { 1 };
    assert_eq!(reply.code(), expected, "{args:?}: {}{error}", reply.out());
    assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
    for part in parts {
        assert!(error.contains(part), "{args:?}: {error}");
    }
}

#[test]
fn a_backing_name_that_holds_options_opens_as_in_qemu() {
    let both = Differential::new();
    both.prepare(|dir| std::fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap());
    both.same(Img, &["create", "-f", "qcow2", "-F", "raw", "-b", JSON, "a"]);
    both.same(Img, &["info", "a"]);
    both.same(Img, &["info", "--backing-chain", "a"]);
    both.same(Img, &["map", "a"]);
    both.same(
        Io,
        &["-c", "read -P 7 0 1M", "-c", "write -P 8 4k 4k", "-c", "read -P 7 8k 4k", "a"],
    );
    both.same(Img, &["convert", "-O", "raw", "a", "out"]);
    both.same_bytes("out");
    let null = r#"json:{"driver":"null-co","size":1048576,"read-zeroes":true}"#;
    both.same(Img, &["create", "-f", "qcow2", "-F", "null-co", "-b", null, "b"]);
    both.same(Io, &["-c", "read -P 0 0 1M", "b"]);
    for wrong in [r#"json:{"driver":"raw"}"#, r#"json:{"driver":"nonsense"}"#] {
        let [directory, _] = both.our_directories();
        let create = ["img", "create", "-f", "qcow2", "-F", "raw", "-b", wrong, "c", "1M"];
        let reply = run(&directory, &create);
        assert_eq!(reply.code(), 1, "{wrong}");
    }
}

#[test]
fn a_backing_name_with_an_unsupported_protocol_is_reported_as_such() {
    let scratch = images();
    let json_nbd = r#"json:{"driver":"raw","file":{"driver":"nbd","host":"::1"}}"#;
    for name in [
        "nbd://127.0.0.1:1/x",
        "nbd:127.0.0.1:1",
        "nbd+unix:///x?socket=/s",
        "https://h/x",
        json_nbd,
    ] {
        overlay(scratch.path(), "o", name);
        is_refused(scratch.path(), &["img", "map", "o"], &["'o'", "is not supported yet"]);
    }
    overlay(scratch.path(), "o", "nonsense:x");
    is_refused(scratch.path(), &["img", "map", "o"], &["Unknown protocol 'nonsense'"]);
}

#[test]
fn an_untrusted_image_that_names_a_backing_file_is_refused_by_name() {
    let scratch = images();
    let dir = scratch.path();
    for name in ["base", "/etc/passwd", "/dev/zero", JSON, "nbd://127.0.0.1:1/x", "file:base"] {
        overlay(dir, "o", name);
        for args in [
            &["img", "map", "--untrusted", "o"][..],
            &["img", "convert", "--untrusted", "-O", "raw", "o", "out"],
            &["img", "convert", "-O", "raw", "o", "out", "--untrusted"],
            &["img", "dd", "--untrusted", "if=o", "of=out"],
            &["img", "compare", "--untrusted", "base", "o"],
            &["img", "measure", "--untrusted", "-O", "raw", "o"],
            &["img", "info", "--untrusted", "--backing-chain", "o"],
            &["io", "--untrusted", "-c", "read 0 512", "o"],
            &["serve", "--untrusted", "o", "--nbd", "./s"],
        ] {
            is_refused(dir, args, &["backing file", "untrusted", "backing.file.filename="]);
            assert!(!dir.join("out").exists(), "{args:?}");
        }
        let info = run(dir, &["img", "info", "--untrusted", "o"]);
        assert_eq!(info.code(), 0, "{}", info.err());
    }
}

#[test]
fn files_that_the_user_names_are_opened_and_files_that_those_name_are_not() {
    let scratch = images();
    let dir = scratch.path();
    let top = "driver=qcow2,file.filename=top";
    let mid = "backing.driver=qcow2,backing.file.filename=mid";
    let base = "backing.backing.driver=raw,backing.backing.file.filename=base";
    let map = ["img", "map", "--untrusted", "--image-opts"];
    for (image, mapped) in
        [(format!("{top},{mid},{base}"), "base"), (format!("{top},backing="), "")]
    {
        let reply = run(dir, &[&map[..], &[&image]].concat());
        assert_eq!(reply.code(), 0, "{image}: {}", reply.err());
        assert!(reply.out().contains(mapped), "{}", reply.out());
    }
    let half = format!("{top},{mid}");
    is_refused(dir, &["img", "map", "--untrusted", "--image-opts", &half], &["'base'"]);
    // The backing file of the new image is on the command line, so it is opened.
    let create = ["img", "create", "--untrusted", "-f", "qcow2", "-b", "base", "-F", "raw", "new"];
    assert_eq!(run(dir, &create).code(), 0);
    is_refused_with_hint(
        dir,
        &["img", "create", "--untrusted", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "new2"],
    );
}

#[test]
fn a_rebase_that_refuses_a_backing_file_says_that_it_can_change_only_the_name() {
    let scratch = images();
    let dir = scratch.path();
    overlay(dir, "o", "base");
    let rebase = ["img", "rebase", "--untrusted", "-f", "qcow2", "-b", "base", "-F", "raw", "o"];
    let reply = run(dir, &rebase);
    assert_eq!(reply.code(), 1, "{}", reply.err());
    assert!(
        reply.err().contains("'base'") && reply.err().contains("\nWith -u, "),
        "{}",
        reply.err()
    );
    assert_eq!(run(dir, &[&rebase[..], &["-u"]].concat()).code(), 0);
    is_refused(dir, &["img", "map", "--untrusted", "o"], &["'base'"]);
}

fn is_refused_with_hint(directory: &Path, args: &[&str]) {
    let reply = run(directory, args);
    assert_eq!(reply.code(), 1);
    assert!(reply.err().contains("untrusted"), "{}", reply.err());
}

#[test]
fn an_untrusted_image_with_a_data_file_is_refused_unless_the_user_names_it() {
    let scratch = images();
    let dir = scratch.path();
    assert_eq!(run(dir, &["img", "map", "data"]).code(), 0);
    is_refused(dir, &["img", "map", "--untrusted", "data"], &["'guest'", "data-file.filename="]);
    let named = "driver=qcow2,file.filename=data,data-file.filename=guest";
    assert_eq!(run(dir, &["img", "map", "--untrusted", "--image-opts", named]).code(), 0);
    assert_eq!(run(dir, &["img", "info", "--untrusted", "data"]).code(), 0);
}

#[test]
fn the_files_that_the_user_names_for_the_target_of_a_conversion_are_opened() {
    let scratch = images();
    let dir = scratch.path();
    let absolute = dir.join("base").to_str().unwrap().to_owned();
    let convert = ["img", "convert", "--untrusted", "-O", "qcow2"];
    for backing in ["base", "./base", "file:base", &absolute, JSON] {
        let reply =
            run(dir, &[&convert[..], &["-B", backing, "-F", "raw", "base", "out"]].concat());
        assert_eq!((reply.code(), reply.err().as_str()), (0, ""), "{backing}");
        let compare = ["compare", "-q", "-f", "qcow2", "-F", "raw", "out", "base"];
        qemu_img(dir, &compare);
        std::fs::remove_file(dir.join("out")).unwrap();
    }
    let reply = run(dir, &[&convert[..], &["-o", "data_file=new-guest", "base", "out"]].concat());
    assert_eq!((reply.code(), reply.err().as_str()), (0, ""));
    std::fs::remove_file(dir.join("out")).unwrap();
    // The backing file of the backing file is not opened.
    let args = [&convert[..], &["-B", "mid", "-F", "qcow2", "base", "out"]].concat();
    is_refused(dir, &args, &["'base'", "untrusted"]);
    assert!(!dir.join("out").exists());
}

#[test]
fn a_raw_image_that_looks_like_an_overlay_opens_no_other_file() {
    let scratch = images();
    let dir = scratch.path();
    overlay(dir, "raw", "/etc/passwd");
    is_refused(
        dir,
        &["img", "convert", "--untrusted", "-O", "raw", "raw", "out"],
        &["/etc/passwd"],
    );
    let convert = ["img", "convert", "--untrusted", "-f", "raw", "-O", "raw", "raw", "out"];
    assert_eq!(run(dir, &convert).code(), 0);
    let copy = std::fs::read(dir.join("out")).unwrap();
    assert!(copy.starts_with(&std::fs::read(dir.join("raw")).unwrap()));
}

#[test]
fn a_looping_chain_is_refused_in_one_line() {
    let scratch = images();
    let dir = scratch.path();
    qemu_img(dir, &["create", "-q", "-u", "-f", "qcow2", "-b", "x", "-F", "qcow2", "self", "1M"]);
    qemu_img(dir, &["rebase", "-u", "-b", "self", "-F", "qcow2", "self"]);
    qemu_img(dir, &["create", "-q", "-u", "-f", "qcow2", "-b", "./b", "-F", "qcow2", "a", "1M"]);
    qemu_img(dir, &["create", "-q", "-u", "-f", "qcow2", "-b", "a", "-F", "qcow2", "b", "1M"]);
    // The backing file name of the image is a `json:` name of the image itself, so the loop is detected only after the file is
    // open.
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"json"}}"#;
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "json", "1M"]);
    qemu_img(dir, &["rebase", "-u", "-b", json, "-F", "qcow2", "json"]);
    let lines = ["self", "a", "b"].map(|image| ["io", "-c", "read 0 512", image]);
    for args in
        lines.iter().map(|line| &line[..]).chain([&["io", "-r", "-c", "read 0 512", "json"][..]])
    {
        is_refused(dir, args, &["infinite loop"]);
        assert!(run(dir, args).err().len() < 300);
    }
    for image in ["self", "a", "b", "json"] {
        is_refused(dir, &["img", "map", image], &["infinite loop"]);
        assert!(run(dir, &["img", "map", image]).err().len() < 300);
        is_refused(dir, &["img", "info", "--backing-chain", image], &["infinite loop"]);
    }
}

#[test]
fn the_untrusted_option_cannot_be_abbreviated() {
    let scratch = images();
    assert_eq!(run(scratch.path(), &["img", "map", "--untrust", "base"]).code(), 1);
    assert_eq!(run(scratch.path(), &["img", "rebase", "--untrusted=x", "base"]).code(), 1);
}

#[test]
fn a_directory_gate_opens_only_files_inside_the_directory() {
    let scratch = images();
    let dir = scratch.path();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), vec![1; 1 << 20]).unwrap();
    let secret = outside.path().join("secret").to_str().unwrap().to_owned();
    overlay(dir, "outside", &secret);
    std::os::unix::fs::symlink(&secret, dir.join("link")).unwrap();
    overlay(dir, "linked", "link");
    overlay(dir, "json", JSON);
    let open = |gate: Gate, name: &str| {
        let path = dir.join(name).to_str().unwrap().to_owned();
        oxblk::ring::block_on(async move {
            let graph = Graph::new(oxblk::drivers(), gate);
            let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
            let backend = graph.open_backend(Some(&path), Options::new(), flags).await?;
            let data = backend.read(0, oxblk::ring::IoBufMut::new(512)).await?;
            let first = data.first().copied();
            backend.close().await?;
            Ok::<_, oxblk::core::Error>(first)
        })
    };
    let inside = || Gate::directory(dir).unwrap();
    assert_eq!(open(inside(), "top").unwrap(), Some(7));
    for name in ["outside", "linked", "json"] {
        let error = open(inside(), name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    }
    assert_eq!(open(Gate::AnyFile, "outside").unwrap(), Some(1));
    assert_eq!(open(Gate::AnyFile, "json").unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(open(Gate::Nothing, "top").unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(open(Gate::Nothing, "base").unwrap(), Some(7));
}

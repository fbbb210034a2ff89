//! Encrypted qcow2 images that one program creates and the other program uses. Both programs print the same information on
//! these images.

use std::path::{Path, PathBuf};

use oxblk_tests::differential::Differential;
use oxblk_tests::hostile::image::Image;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

const SECRET: &str = "secret,id=s,data=abc";
const LUKS: &str = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
const SMALL: &str = "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
const AES: &str = "encrypt.format=aes,encrypt.key-secret=s";
/// The offset of the LUKS header in a new image with clusters of 64 KiB.
const HEADER: usize = 0x4_0000;

/// The program that a test runs.
#[derive(Clone, Copy, Debug)]
enum Who {
    Qemu,
    Us,
}

impl Who {
    fn tool(self, name: &str) -> Program {
        let program = match self {
            Self::Qemu => Program::new(format!("qemu-{name}")),
            Self::Us => Program::oxblk().arg(name),
        };
        program.args(["--object", SECRET])
    }

    fn create(self, path: &Path, options: &str) {
        // QEMU's tools take their command first.
        let create = match self {
            Self::Qemu => Program::new("qemu-img").arg("create"),
            Self::Us => Program::oxblk().args(["img", "create"]),
        };
        let create = create.args(["--object", SECRET, "-q", "-f", "qcow2", "-o", options]);
        create.arg(path).arg("3M").succeed();
    }

    /// Runs commands of `io`; each must succeed.
    fn io(self, path: &Path, commands: &[&str]) {
        let mut io = self.tool("io").arg("--image-opts");
        for command in commands {
            io = io.args(["-c", command]);
        }
        let reply = io.arg(opening(path)).run();
        let said = format!("{}{}", reply.out(), reply.err());
        let fine = reply.code() == 0 && !said.contains("failed");
        assert!(fine, "{self:?}: {}: {commands:?}: {said}", path.display());
    }

    fn check(self, path: &Path) {
        let check = match self {
            Self::Qemu => Program::new("qemu-img").arg("check"),
            Self::Us => Program::oxblk().args(["img", "check"]),
        };
        check.args(["--object", SECRET, "--image-opts"]).arg(opening(path)).succeed();
    }
}

fn opening(path: &Path) -> String {
    format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", path.display())
}

/// `maker` creates and fills an image, and `user` reads, changes and checks the image.
fn share(directory: &Path, options: &str, maker: Who, user: Who) {
    let path = directory.join(format!("{maker:?}.qcow2"));
    maker.create(&path, options);
    maker.io(&path, &["write -P 0x11 0 300k", "write -P 0x12 1000513 777"]);
    user.io(
        &path,
        &[
            "read -P 0x11 0 300k",
            "read -P 0x12 1000513 777",
            "read -P 0 1001290 100k",
            "write -P 0x22 100k 3k",
            "write -P 0x33 2M 512k",
            "write -z 256k 64k",
        ],
    );
    maker.io(
        &path,
        &[
            "read -P 0x22 100k 3k",
            "read -P 0x11 103k 153k",
            "read -P 0 256k 64k",
            "read -P 0x33 2M 512k",
            "read -P 0x12 1000513 777",
        ],
    );
    maker.check(&path);
    user.check(&path);
}

/// Combinations of a cipher, a mode, an IV generator, its hash, and the hash of the key slots. The table contains every cipher,
/// mode, IV generator and hash that QEMU accepts. (QEMU supports keys of 24 bytes only with XTS.)
const SUITES: &[[&str; 5]] = &[
    ["aes-128", "ecb", "plain", "sha256", "md5"],
    ["aes-128", "cbc", "essiv", "sha256", "sha1"],
    ["aes-128", "xts", "plain64", "sha256", "sha224"],
    ["aes-128", "ctr", "essiv", "md5", "sha256"],
    ["aes-192", "xts", "plain", "sha256", "sha384"],
    ["aes-256", "xts", "essiv", "sha256", "sha512"],
    ["aes-256", "cbc", "plain64", "sha256", "ripemd160"],
    ["aes-256", "ctr", "plain", "sha256", "sm3"],
    ["aes-256", "ecb", "essiv", "sm3", "sha1"],
    ["cast5-128", "cbc", "essiv", "md5", "sha256"],
    ["cast5-128", "ctr", "plain64", "sha256", "sha512"],
    ["cast5-128", "ecb", "plain", "sha256", "ripemd160"],
    ["serpent-128", "xts", "essiv", "md5", "sha256"],
    ["serpent-128", "cbc", "plain", "sha256", "sm3"],
    ["serpent-192", "xts", "plain64", "sha256", "md5"],
    ["serpent-256", "ctr", "essiv", "sha256", "sha224"],
    ["serpent-256", "ecb", "plain64", "sha256", "sha384"],
    ["twofish-128", "cbc", "essiv", "sha256", "sha512"],
    ["twofish-128", "ctr", "plain64", "sha256", "sha1"],
    ["twofish-192", "xts", "plain", "sha256", "sha256"],
    ["twofish-256", "xts", "plain64", "sha256", "md5"],
    ["twofish-256", "ecb", "essiv", "md5", "ripemd160"],
];

#[test]
fn every_cipher_mode_iv_and_hash_is_compatible_with_qemu() {
    let directory = tempfile::tempdir().unwrap();
    // QEMU needs a long time to create a header, so QEMU creates only some of the images.
    for (index, [cipher, mode, iv, iv_hash, hash]) in SUITES.iter().enumerate() {
        let options = format!(
            "{LUKS},encrypt.cipher-alg={cipher},encrypt.cipher-mode={mode},encrypt.ivgen-alg={iv},\
             encrypt.ivgen-hash-alg={iv_hash},encrypt.hash-alg={hash}"
        );
        share(directory.path(), &options, Who::Us, Who::Qemu);
        if index % 4 == 1 {
            share(directory.path(), &options, Who::Qemu, Who::Us);
        }
    }
}

#[test]
fn images_of_every_layout_are_shared_with_qemu() {
    let directory = tempfile::tempdir().unwrap();
    for layout in ["cluster_size=512", "cluster_size=2M", "compat=0.10", "refcount_bits=1"] {
        for format in [LUKS, AES] {
            let options = format!("{format},{layout}");
            share(directory.path(), &options, Who::Us, Who::Qemu);
            if format == AES {
                share(directory.path(), &options, Who::Qemu, Who::Us);
            }
        }
    }
}

#[test]
fn keys_of_24_bytes_work_with_every_mode() {
    let directory = tempfile::tempdir().unwrap();
    for (cipher, mode) in [("aes-192", "cbc"), ("serpent-192", "ctr"), ("twofish-192", "ecb")] {
        let options = format!("{LUKS},encrypt.cipher-alg={cipher},encrypt.cipher-mode={mode}");
        share(directory.path(), &options, Who::Us, Who::Us);
    }
}

#[test]
fn no_plaintext_guest_data_is_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    for format in [LUKS, AES] {
        let path = directory.path().join("image");
        Who::Us.create(&path, format);
        Who::Us.io(&path, &["write -P 0xa5 0 1M", "write -P 0xa5 1100000 100"]);
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(32).any(|window| window == [0xa5; 32]));
    }
}

#[test]
fn new_encrypted_images_have_qemus_layout() {
    let directory = tempfile::tempdir().unwrap();
    let layouts = [
        "cluster_size=64k",
        "cluster_size=4k,compat=0.10",
        "cluster_size=2M",
        "preallocation=metadata",
        "encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=md5",
    ];
    for layout in layouts {
        for format in [LUKS, AES] {
            if format == AES && layout.contains("cipher") {
                continue;
            }
            let options = format!("{format},{layout}");
            let images = [Who::Qemu, Who::Us].map(|who| {
                let path = directory.path().join("image");
                who.create(&path, &options);
                without_keys(std::fs::read(&path).unwrap())
            });
            assert_eq!(images[0].len(), images[1].len(), "{options}");
            let first = images[0].iter().zip(&images[1]).position(|(a, b)| a != b);
            assert_eq!(first, None, "first differing byte, {options}");
        }
    }
}

/// Clears the random bytes of a LUKS header, and the bytes that depend on the machine's speed.
fn without_keys(mut bytes: Vec<u8>) -> Vec<u8> {
    let Some(at) = bytes.windows(6).position(|window| window == b"LUKS\xba\xbe") else {
        return bytes;
    };
    // The ranges contain: digest, salt, iterations and UUID of the header; iterations and salt of the slot; key material.
    for (start, len) in [(112, 96), (212, 36), (4096, 256_000)] {
        let end = (at + start + len).min(bytes.len());
        bytes[at + start..end].fill(0);
    }
    bytes
}

/// Returns the bytes of an image that QEMU creates.
fn image(options: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("image");
    Who::Qemu.create(&path, options);
    std::fs::read(path).unwrap()
}

fn with_images() -> Differential {
    let both = Differential::new();
    both.file("l.qcow2", &image(LUKS));
    both.file(
        "e.qcow2",
        &image(&format!("{LUKS},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv")),
    );
    both.file("a.qcow2", &image(AES));
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "p.qcow2", "3M"]);
    both
}

/// Splits a command line. `@` stands for the definition of a secret, and `NAME!` for the options that open the image `NAME`.
fn words(line: &str) -> Vec<String> {
    let word = |word: &str| match word.strip_suffix('!') {
        Some(name) => format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}"),
        None => word.to_owned(),
    };
    line.replace('@', &format!("--object {SECRET}")).split_whitespace().map(word).collect()
}

#[test]
fn the_tools_print_the_same_as_qemus_for_encrypted_images() {
    let both = with_images();
    let lines = [
        "info l.qcow2",
        "info --output=json l.qcow2",
        "info e.qcow2",
        "info --output=json e.qcow2",
        "info a.qcow2",
        "info --output=json a.qcow2",
        "info @ --image-opts l.qcow2!",
        "map @ --image-opts l.qcow2!",
        "map @ --output=json --image-opts l.qcow2!",
        "map l.qcow2",
        "check @ --image-opts l.qcow2!",
        "check @ --image-opts a.qcow2!",
        "compare @ --image-opts l.qcow2! a.qcow2!",
        "snapshot -l l.qcow2",
        "snapshot @ --image-opts -c one l.qcow2!",
        "resize l.qcow2 4M",
        "resize @ --image-opts l.qcow2! 4M",
        "measure -O qcow2 @ -o encrypt.format=luks,encrypt.key-secret=s --size 1M",
        "measure -O qcow2 -o encrypt.format=luks --size 1M",
        "measure -O qcow2 -o encrypt.format=aes --size 1M",
        "measure -O qcow2 -o encrypt.format=foo --size 1M",
        "measure -O qcow2 -o encryption=on --size 1M",
        "measure -O qcow2 @ -o encrypt.format=luks,encrypt.key-secret=z --size 1M",
        "measure -O qcow2 @ -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=x --size 1M",
        "measure -O qcow2 @ -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-mode=cbc --size 1M",
        "measure -O qcow2 @ -o encrypt.format=luks,encrypt.key-secret=s p.qcow2",
        "create -f qcow2 -b l.qcow2 -F qcow2 o.qcow2",
        "convert -O raw l.qcow2 o.raw",
        "convert @ -O qcow2 --image-opts l.qcow2! o.qcow2",
        "convert @ -c -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s p.qcow2 c.qcow2",
        "convert -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s p.qcow2 c.qcow2",
        "convert @ -O qcow2 -o encrypt.format=aes,encrypt.key-secret=s p.qcow2 c.qcow2",
    ];
    for line in lines {
        let words = words(line);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        both.same(Img, &words);
    }
}

#[test]
fn wrong_encryption_options_are_refused_with_qemus_messages() {
    let both = Differential::new();
    let wrong = [
        "encrypt.format=luks",
        "encrypt.format=aes",
        "encrypt.format=luks,encrypt.key-secret=x",
        "encrypt.format=foo,encrypt.key-secret=s",
        "encrypt.key-secret=s",
        "encrypt.iter-time=5",
        "encryption=on",
        "encryption=off,encrypt.key-secret=s",
        "encryption=on,encrypt.format=luks,encrypt.key-secret=s",
        "encrypt.format=aes,encrypt.key-secret=s,encrypt.cipher-alg=aes-128",
    ];
    for options in wrong {
        both.same(Img, &["create", "--object", SECRET, "-f", "qcow2", "-o", options, "n", "1M"]);
    }
    let wrong = [
        "cipher-alg=foo",
        "cipher-alg=3des",
        "cipher-mode=foo",
        "ivgen-alg=foo",
        "hash-alg=foo",
        "ivgen-hash-alg=foo",
        "cipher-alg=cast5-128",
        "ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1",
        "cipher-alg=serpent-128,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha512",
        "cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
    ];
    for option in wrong {
        let options = format!("{LUKS},encrypt.{option}");
        both.same(Img, &["create", "--object", SECRET, "-f", "qcow2", "-o", &options, "n", "1M"]);
    }
}

#[test]
fn wrong_keys_are_refused_as_by_qemu() {
    let both = with_images();
    let lines = [
        "l.qcow2",
        "a.qcow2",
        "@ --image-opts l.qcow2!",
        "@ --image-opts l.qcow2!,encrypt.format=luks",
        "@ --image-opts l.qcow2!,encrypt.format=aes",
        "@ --image-opts a.qcow2!,encrypt.format=luks",
        "@ --image-opts a.qcow2!,encrypt.format=bogus",
        "@ --image-opts a.qcow2!,encrypt.bogus=x",
        "@ --image-opts p.qcow2!",
        "@ --image-opts p.qcow2!,encrypt.format=luks",
        "--image-opts l.qcow2!",
        "--object secret,id=s,data=wrong --image-opts l.qcow2!",
        "--object secret,id=s,data=//4=,format=base64 --image-opts l.qcow2!",
        "--object secret,id=s,data=YWJj,format=base64 --image-opts l.qcow2!",
        "--object secret,id=s,data=YW*j,format=base64 --image-opts l.qcow2!",
        "--object secret,id=s,data=abc,format=foo --image-opts l.qcow2!",
        "--object secret,id=s,file=nowhere --image-opts l.qcow2!",
        "@ @ --image-opts l.qcow2!",
    ];
    for line in lines {
        let mut words = vec!["-c".to_owned(), "read 0 512".to_owned()];
        for word in self::words(line) {
            words.push(word);
        }
        // The options of the image are the last word, so that more options can follow.
        let words: Vec<String> = words
            .iter()
            .map(|word| match word.split_once("!,") {
                Some((name, more)) => {
                    format!("driver=qcow2,encrypt.key-secret=s,file.filename={name},{more}")
                }
                None => word.clone(),
            })
            .collect();
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        both.same(Io, &words);
    }
}

#[test]
fn secrets_may_be_encrypted_with_another_secret() {
    let both = with_images();
    let key = "secret,id=k,format=base64,data=AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    let iv = "iv=AgICAgICAgICAgICAgICAg==";
    let data = "data=MwrSmU5PR5fx5IvS/6JXVg==";
    let secrets = [
        format!("secret,id=s,format=base64,keyid=k,{iv},{data}"),
        format!("secret,id=s,format=base64,keyid=k,{data}"),
        format!("secret,id=s,format=base64,keyid=q,{iv},{data}"),
        format!("secret,id=s,format=base64,keyid=k,iv=YWJj,{data}"),
        format!("secret,id=s,format=base64,keyid=k,{iv},data=YWJj"),
        format!("secret,id=s,keyid=k,{iv},{data}"),
    ];
    let image = "driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2";
    for secret in &secrets {
        let read = ["-c", "read -P 0 0 512", "--object", key, "--object", secret, "--image-opts"];
        both.same(Io, &[&read[..], &[image]].concat());
    }
}

/// Ways to corrupt a LUKS image for which QEMU and oxblk print the same error.
type Spoil = fn(&mut Image);
const SPOILS: &[Spoil] = &[
    |i| i.put(HEADER, b"X"),
    |i| i.put32(HEADER + 4, 0xbabe_0002),
    |i| name(i, 8, "foo"),
    |i| name(i, 8, "des3_ede"),
    |i| name(i, 8, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
    |i| name(i, 40, "foo"),
    |i| name(i, 40, "foo-plain"),
    |i| name(i, 40, "xts-foo"),
    |i| name(i, 40, "xts-plain64:sha256"),
    |i| name(i, 40, "cbc-essiv:foo"),
    |i| name(i, 40, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
    |i| name(i, 72, "foo"),
    |i| name(i, 72, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
    |i| i.put32(HEADER + 104, 0),
    |i| i.put32(HEADER + 104, 8),
    |i| i.put32(HEADER + 104, u32::MAX),
    |i| i.put32(HEADER + 108, 0),
    |i| i.put32(HEADER + 108, 16),
    |i| i.put32(HEADER + 108, 0x7fff_ffff),
    |i| i.put32(HEADER + 164, 0),
    |i| i.put32(HEADER + 208, 1),
    |i| i.put32(HEADER + 212, 0),
    |i| i.put32(HEADER + 248, 0),
    |i| i.put32(HEADER + 248, 512),
    |i| i.put32(HEADER + 248, 4030),
    |i| i.put32(HEADER + 252, 0),
    |i| i.put32(HEADER + 252, u32::MAX),
    |i| i.put32(HEADER + 300, 1),
    |i| i.put32(32, 0),
    |i| i.put32(32, 1),
    |i| i.put32(32, 3),
    |i| i.put64(0x78, 0x4_0200),
    |i| i.put64(0x78, 0x4000_0000),
    |i| i.put64(0x80, 0),
    |i| i.put64(0x80, 592),
];

fn name(image: &mut Image, at: usize, name: &str) {
    image.put(HEADER + at, &[0; 32]);
    image.put(HEADER + at, name.as_bytes());
}

#[test]
fn broken_luks_headers_are_refused_with_qemus_messages() {
    let both = Differential::new();
    let good = Image::new(image(LUKS));
    let options = "driver=qcow2,encrypt.key-secret=s,file.filename=x.qcow2";
    for spoil in SPOILS {
        let mut image = good.clone();
        spoil(&mut image);
        both.file("x.qcow2", image.bytes());
        both.same(Io, &["--object", SECRET, "-c", "read 0 512", "--image-opts", options]);
        both.same(Img, &["info", "x.qcow2"]);
    }
}

/// Ways to corrupt a LUKS image that QEMU accepts, or that make QEMU compute for hours.
const WORSE: &[(Spoil, &str)] = &[
    (|i| i.put32(HEADER + 212, u32::MAX), "LUKS key slots require "),
    (|i| i.put32(HEADER + 164, u32::MAX), "LUKS key slots require "),
    (|i| i.put32(HEADER + 248, u32::MAX), "Keyslot 0 is overlapping with the encrypted payload"),
    (|i| i.put32(HEADER + 108, 33), "XTS cipher key length should be a multiple of 2"),
    (|i| i.put64(0x78, 0xffff_ffff_fff0_0000), ""),
];

#[test]
fn no_luks_header_makes_a_tool_compute_for_hours_or_read_past_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let good = Image::new(image(LUKS));
    for (spoil, expected) in WORSE {
        let mut image = good.clone();
        spoil(&mut image);
        std::fs::write(&path, image.bytes()).unwrap();
        let io = Who::Us.tool("io").args(["-c", "read 0 512", "--image-opts"]).arg(opening(&path));
        let reply = io.time_limit(std::time::Duration::from_secs(20)).run();
        assert_eq!(reply.code(), 1);
        assert!(reply.err().contains(expected), "{}", reply.err());
        for command in ["info", "check"] {
            let img = Program::oxblk().args(["img", command]).arg(&path);
            let reply = img.time_limit(std::time::Duration::from_secs(20)).run();
            assert!(reply.code() < 4, "{command}: {}{}", reply.out(), reply.err());
        }
    }
}

#[test]
fn an_image_is_checked_without_its_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    Who::Us.create(&path, LUKS);
    Who::Us.io(&path, &["write 0 1M"]);
    let reply = Program::oxblk().args(["img", "check"]).arg(&path).succeed();
    assert!(reply.out().starts_with("No errors were found on the image."));
}

#[test]
fn added_space_reads_as_zeroes_with_every_preallocation_mode() {
    let directory = tempfile::tempdir().unwrap();
    for options in [LUKS.to_owned(), format!("{AES},compat=0.10")] {
        let path = directory.path().join("image");
        Who::Us.create(&path, &options);
        let mut size = 3;
        for mode in ["metadata", "falloc", "full"] {
            size += 1;
            let resize = Program::oxblk().args(["img", "resize", "--object", SECRET]);
            let resize = resize.args(["--image-opts", &format!("--preallocation={mode}")]);
            resize.arg(opening(&path)).arg(format!("{size}M")).succeed();
        }
        for who in [Who::Us, Who::Qemu] {
            who.io(&path, &["read -P 0 3M 3M", "write -P 7 4M 100k", "read -P 0 4300k 100k"]);
            who.io(&path, &["write -P 0 4M 100k"]);
            who.check(&path);
        }
    }
}

#[test]
fn encrypted_images_work_as_overlays_and_as_backing_files() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    Who::Qemu.create(&at("base"), LUKS);
    Who::Qemu.io(&at("base"), &["write -P 1 0 3M"]);
    let create = |name: &str, options: &str, below: &str| {
        let create = Program::oxblk().args(["img", "create", "--object", SECRET, "-q"]);
        let create = create.args(["-f", "qcow2", "-o", options, "-F", "qcow2", "-b"]);
        create.arg(at(below)).arg(at(name)).succeed();
    };
    create("plain", "cluster_size=64k", "base");
    create("top", AES, "plain");
    let below = "backing.backing.encrypt.key-secret=s";
    let top = format!("{},{below}", opening(&at("top")));
    let io = |who: Who, commands: &[&str]| {
        let mut io = who.tool("io").arg("--image-opts");
        for command in commands {
            io = io.args(["-c", command]);
        }
        let reply = io.arg(&top).succeed();
        assert!(!reply.out().contains("failed"), "{}", reply.out());
    };
    io(Who::Us, &["read -P 1 0 3M", "write -P 2 70001 3", "write -P 3 1M 200k"]);
    io(Who::Qemu, &["read -P 1 0 70001", "read -P 2 70001 3", "read -P 1 70004 100k"]);
    io(Who::Qemu, &["read -P 3 1M 200k", "write -P 4 2M 1000"]);
    io(Who::Us, &["read -P 4 2M 1000", "read -P 1 2098152 100k"]);
    let check = Program::new("qemu-img").args(["check", "--object", SECRET, "--image-opts"]);
    check.arg(&top).succeed();
}

#[test]
fn compressed_writes_to_an_encrypted_image_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    Who::Us.create(&path, LUKS);
    let write = Who::Us.tool("io").args(["-c", "write -c 0 64k", "--image-opts"]);
    assert_eq!(write.arg(opening(&path)).run().code(), 1);
    // oxblk can read compressed clusters of QEMU's tools.
    Who::Qemu.io(&path, &["write -c -P 5 0 64k", "write -P 6 64k 64k"]);
    Who::Us.io(
        &path,
        &["read -P 5 0 64k", "read -P 6 64k 64k", "write -P 7 1k 1k", "read -P 5 2k 62k"],
    );
    Who::Us.check(&path);
}

#[test]
fn snapshots_and_vm_state_of_encrypted_images_are_shared_with_qemu() {
    let directory = tempfile::tempdir().unwrap();
    for (number, options) in [LUKS, AES, SMALL].iter().enumerate() {
        for (first, second) in [(Who::Us, Who::Qemu), (Who::Qemu, Who::Us)] {
            let path = directory.path().join(format!("{first:?}{number}"));
            let snapshot = |who: Who, action: &str| {
                let command = match who {
                    Who::Qemu => Program::new("qemu-img").arg("snapshot"),
                    Who::Us => Program::oxblk().args(["img", "snapshot"]),
                };
                let command = command.args(["--object", SECRET, "--image-opts", action, "kept"]);
                command.arg(opening(&path)).succeed();
            };
            first.create(&path, options);
            first.io(&path, &["write -P 1 0 1M", "write -b -P 2 512 300k"]);
            let file = std::fs::read(&path).unwrap();
            let plain = |byte: u8| file.windows(64).any(|bytes| bytes.iter().all(|b| *b == byte));
            assert!(!plain(1) && !plain(2), "{first:?}: {options}: the plaintext is in the file");
            second.io(&path, &["read -b -P 2 512 300k"]);
            snapshot(first, "-c");
            first.io(&path, &["write -P 3 512k 1M"]);
            second.io(&path, &["read -P 1 0 512k", "read -P 3 512k 1M"]);
            snapshot(second, "-a");
            // After the snapshot was applied, the header still has the encryption method and its parameters: reads and writes
            // work.
            first.io(&path, &["read -P 1 0 1M", "write -P 4 2M 100k"]);
            second.io(&path, &["read -P 1 0 1M", "read -P 4 2M 100k", "write -b -P 5 1M 4k"]);
            first.io(&path, &["read -b -P 5 1M 4k"]);
            snapshot(first, "-d");
            first.check(&path);
            second.check(&path);
        }
    }
}

//! Compaction of images that QEMU's tools created, for every kind of cluster that can be at the end of a file. The contents
//! stay the same, QEMU's check finds no fault, and the file becomes shorter.

use std::path::PathBuf;

use oxblk_tests::differential::check_clean;
use oxblk_tests::host_clusters;
use oxblk_tests::program::Program;
use oxblk_tests::random::Random;
use oxblk_tests::scratch;
use serde_json::Value;
use tempfile::TempDir;

/// The number of clusters that may still be free if compressed data is at the end of the file. A piece of compressed data
/// cannot be split. Freeing the last cluster needs space for all pieces that overlap this cluster. The first piece may begin in
/// the previous cluster, so freeing one cluster may need more than one free cluster.
const PACKED: usize = 2;

/// An image in its own directory.
pub(super) struct Image {
    pub(super) directory: TempDir,
    /// The definition of the secret that opens an encrypted image.
    pub(super) secret: Option<&'static str>,
}

impl Image {
    pub(super) fn new(options: &str, size: &str) -> Self {
        let image = Self { directory: scratch::in_memory(), secret: None };
        image.img(&["create", "-q", "-f", "qcow2", "-o", options, "image", size]);
        image
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    pub(super) fn len(&self) -> u64 {
        std::fs::metadata(self.path()).unwrap().len()
    }

    pub(super) fn img(&self, args: &[&str]) -> String {
        let program = Program::new("qemu-img").args(args).directory(self.directory.path());
        program.succeed().out().to_owned()
    }

    /// Runs commands of qemu-io, with discards passed on to the file.
    pub(super) fn io(&self, commands: &[&str]) {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let secret = self.secret.iter().flat_map(|secret| ["--object", secret]);
        let image = match self.secret {
            None => "driver=qcow2,discard=unmap,file.filename=image",
            Some(_) => "driver=qcow2,discard=unmap,encrypt.key-secret=key,file.filename=image",
        };
        let program = Program::new("qemu-io").args(secret).args(commands).arg("--image-opts");
        program.arg(image).directory(self.directory.path()).succeed();
    }

    /// Writes data of varying compressibility with qemu-io's `command` and its options.
    pub(super) fn write_mixed(&self, command: &str, seed: u64, offset: u64, len: u64) {
        let mut random = Random::new(seed);
        let mut data = vec![0; usize::try_from(len).unwrap()];
        for piece in data.chunks_mut(4096) {
            let noise = usize::try_from(random.below(piece.len() as u64 - 256)).unwrap();
            random.fill(&mut piece[..noise]);
        }
        std::fs::write(self.directory.path().join("data"), data).unwrap();
        self.io(&[&format!("{command} -s data {offset} {len}")]);
    }

    fn compact(&self, options: &str) -> Value {
        let program = Program::oxblk().args(["img", "compact", "--output=json"]);
        let program = match (self.secret, options) {
            (None, "") => program.arg("image"),
            (None, options) => program
                .args(["--image-opts", &format!("driver=qcow2{options},file.filename=image")]),
            (Some(secret), _) => program
                .args(["--object", secret, "--image-opts"])
                .arg("driver=qcow2,encrypt.key-secret=key,file.filename=image"),
        };
        let said = program.directory(self.directory.path()).succeed().out().to_owned();
        serde_json::from_str(&said).unwrap()
    }

    /// Returns the disk contents of the snapshots.
    fn snapshots(&self, names: &[&str], image: &str) -> Vec<Vec<u8>> {
        let one = |name: &&str| {
            self.img(&["convert", "-l", name, "-O", "raw", image, "snapshot"]);
            std::fs::read(self.directory.path().join("snapshot")).unwrap()
        };
        names.iter().map(one).collect()
    }

    fn compare(&self, what: &str) {
        let program = Program::new("qemu-img").args(["compare", "-s"]);
        let program = match self.secret {
            None => program.args(["before", "image"]),
            Some(secret) => program.args(["--object", secret, "--image-opts"]).args([
                "driver=qcow2,encrypt.key-secret=key,file.filename=before",
                "driver=qcow2,encrypt.key-secret=key,file.filename=image",
            ]),
        };
        let reply = program.directory(self.directory.path()).run();
        assert_eq!(reply.code(), 0, "{what}: {}{}", reply.out(), reply.err());
    }

    /// Compacts the image, opened with `options`, and checks the result. Up to `room` clusters in front of the last cluster may
    /// still be free.
    fn compact_and_look(&self, what: &str, snapshots: &[&str], options: &str, room: usize) {
        let before = self.directory.path().join("before");
        std::fs::copy(self.path(), &before).unwrap();
        let length = self.len();
        let held = self.snapshots(snapshots, "before");
        let said = self.compact(options);
        let gaps = host_clusters::gaps_in(&self.path());
        assert!(said["obstacle"].is_null() && gaps == 0 || gaps <= room, "{what}: {gaps}, {said}");
        assert!(said["moved"].as_u64().unwrap() > 0, "{what}: {said}");
        assert!(self.len() < length, "{what}: {length} -> {}", self.len());
        match self.secret {
            None => check_clean(&self.path()),
            Some(secret) => {
                let image = "driver=qcow2,encrypt.key-secret=key,file.filename=image";
                self.img(&["check", "--object", secret, "--image-opts", image]);
            }
        }
        self.compare(what);
        assert!(held == self.snapshots(snapshots, "image"), "{what}: snapshots");
    }

    fn assert_compacted(&self, what: &str) {
        let said = self.compact("");
        assert_eq!(said["moved"].as_u64(), Some(0), "{what}: {said}");
    }
}

/// The front of each image is free, and its end has compressed data. Some of the images have snapshots with compressed data.
#[test]
fn compressed_data_moves() {
    const MIB: u64 = 1 << 20;
    for kind in ["zlib", "zstd"] {
        for cluster in ["4k", "64k", "4k,refcount_bits=8"] {
            for snapshots in [&[][..], &["one", "two"]] {
                let what = format!("{kind}, clusters of {cluster}, {} snapshots", snapshots.len());
                let options = format!("cluster_size={cluster},compression_type={kind}");
                let image = Image::new(&options, "32M");
                image.io(&["write -P 7 0 4M"]);
                image.img(&["snapshot", "-c", "zero", "image"]);
                image.write_mixed("write -c", 1, 4 * MIB, 6 * MIB);
                image.io(&["write -P 9 11M 300k"]);
                for (name, seed) in snapshots.iter().zip(2..) {
                    image.img(&["snapshot", "-c", name, "image"]);
                    image.io(&["discard 5M 1M"]);
                    image.write_mixed("write -c", seed, (10 + 2 * seed) * MIB, MIB);
                }
                image.io(&["discard 0 4M"]);
                image.img(&["snapshot", "-d", "zero", "image"]);
                image.compact_and_look(&what, snapshots, "", PACKED);
                image.assert_compacted(&what);
            }
        }
    }
}

/// Some pieces of compressed data are freed, so the other pieces in the same cluster have free space between them.
#[test]
fn compressed_data_with_gaps_moves() {
    for cluster in ["512", "4k", "64k", "2M"] {
        let image = Image::new(&format!("cluster_size={cluster}"), "64M");
        image.io(&["write -P 7 0 8M"]);
        image.write_mixed("write -c", 1, 8 << 20, 16 << 20);
        for at in (8..24).step_by(2) {
            image.io(&[
                &format!("discard {at}M 64k"),
                &format!("write -P 5 {}k 4k", at * 1024 + 512),
            ]);
        }
        image.io(&["discard 0 6M"]);
        image.compact_and_look(&format!("clusters of {cluster}"), &[], "", PACKED);
    }
}

#[test]
fn an_image_with_lazy_refcounts_is_compacted() {
    for options in ["", ",lazy-refcounts=on"] {
        let image = Image::new("cluster_size=4k,lazy_refcounts=on", "32M");
        image.io(&["write -P 7 0 4M"]);
        image.write_mixed("write -c", 1, 4 << 20, 4 << 20);
        image.io(&["write -P 8 8M 1M", "discard 0 4M"]);
        image.compact_and_look("lazy refcounts", &[], options, PACKED);
        image.assert_compacted("lazy refcounts");
    }
}

/// Creates a LUKS image that the secret `key` opens.
pub(super) fn encrypted(options: &str, size: &str) -> Image {
    let secret = "secret,id=key,data=abc";
    let image = Image { directory: scratch::in_memory(), secret: Some(secret) };
    let options =
        format!("{options},encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10");
    let create = ["create", "-q", "-f", "qcow2", "--object", secret];
    image.img(&[&create[..], &["-o", &options, "image", size]].concat());
    image
}

/// Returns the position of the header field with the offset of the LUKS header, that offset, and the length.
pub(super) fn luks_header(bytes: &[u8]) -> (usize, usize, usize) {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let at = (104..512).step_by(8).find(|at| word(*at) == 0x0537_be77_0000_0010).unwrap() + 8;
    let [offset, len] = [at, at + 8].map(|at| usize::try_from(word(at)).unwrap());
    (at, offset, len)
}

/// Moves the LUKS header to the end of the file, so that its old clusters are free.
pub(super) fn put_luks_header_at_the_end(image: &Image) {
    let mut bytes = std::fs::read(image.path()).unwrap();
    let (at, _, len) = luks_header(&bytes);
    host_clusters::put_at_the_end(&mut bytes, at, len);
    std::fs::write(image.path(), bytes).unwrap();
}

#[test]
fn the_data_of_an_encrypted_image_moves() {
    let image = encrypted("cluster_size=4k", "16M");
    image.io(&["write -P 7 0 8M", "write -P 8 8M 1M", "discard 0 8M"]);
    image.compact_and_look("LUKS", &[], "", 0);
    image.io(&["read -P 8 8M 1M"]);
}

#[test]
fn a_luks_header_moves_and_leaves_nothing_behind() {
    for cluster in ["4k", "64k"] {
        let image = encrypted(&format!("cluster_size={cluster}"), "16M");
        image.io(&["write -P 8 8M 1M"]);
        put_luks_header_at_the_end(&image);
        let before = luks_header(&std::fs::read(image.path()).unwrap());
        image.compact_and_look(&format!("a LUKS header, {cluster}"), &[], "", 0);
        let bytes = std::fs::read(image.path()).unwrap();
        let after = luks_header(&bytes);
        assert!(after.1 < before.1 && after.2 == before.2, "{before:?} -> {after:?}");
        assert_eq!(bytes.windows(6).filter(|bytes| *bytes == b"LUKS\xba\xbe").count(), 1);
        // QEMU's tools can change passwords in the moved header.
        let secrets = ["--object", "secret,id=key,data=abc", "--object", "secret,id=new,data=def"];
        let opened = "driver=qcow2,encrypt.key-secret=key,file.filename=image";
        let add = "encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=10";
        image.img(&[&["amend"], &secrets[..], &["--image-opts", "-o", add, opened]].concat());
        let opened = "driver=qcow2,encrypt.key-secret=new,file.filename=image";
        let out = ["convert", "--image-opts", opened, "-O", "raw", "plain"];
        image.img(&[&out[..1], &secrets[..], &out[1..]].concat());
        let plain = std::fs::read(image.directory.path().join("plain")).unwrap();
        assert!(plain[8 << 20..9 << 20].iter().all(|byte| *byte == 8));
    }
}

/// In the active disk state, the clusters read as zeroes and keep their host offsets. A snapshot reads their data.
#[test]
fn data_of_a_snapshot_moves_although_the_active_state_reads_as_zeroes() {
    let image = Image::new("cluster_size=4k", "16M");
    image.io(&["write -P 7 0 1M"]);
    image.img(&["snapshot", "-c", "zero", "image"]);
    image.io(&["discard 0 1M", "write -P 8 1M 64k"]);
    image.img(&["snapshot", "-c", "one", "image"]);
    image.img(&["snapshot", "-d", "zero", "image"]);
    image.io(&["write -z 1M 64k"]);
    image.compact_and_look("zeroes", &["one"], "", 0);
    image.img(&["snapshot", "-a", "one", "image"]);
    image.io(&["read -P 8 1M 64k"]);
}

#[test]
fn bitmaps_move() {
    for cluster in ["4k", "64k"] {
        let image = Image::new(&format!("cluster_size={cluster}"), "64M");
        image.io(&["write -P 7 0 8M"]);
        image.img(&["bitmap", "--add", "-g", "512", "image", "one"]);
        image.io(&["write -P 8 8M 1M", "write -P 9 40M 1M"]);
        image.img(&["bitmap", "--add", "image", "two"]);
        image.img(&["bitmap", "--disable", "image", "one"]);
        image.io(&["discard 0 8M"]);
        image.compact_and_look(&format!("bitmaps, {cluster}"), &[], "", 0);
        let info = image.img(&["info", "image"]);
        assert!(info.contains("name: one") && !info.contains("in-use"), "{info}");
    }
}

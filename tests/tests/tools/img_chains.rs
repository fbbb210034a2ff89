//! Random chains of images that are amended, rebased and committed in any order. The guest-visible contents of the top image
//! stay the same, and every image passes the check.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::Img;
use oxblk_tests::random::Random;
use tempfile::TempDir;

const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=64k,lazy_refcounts=on",
    "cluster_size=2M",
    "cluster_size=16k,compat=0.10",
    "cluster_size=32k,extended_l2=on",
    "cluster_size=8k,compression_type=zstd,refcount_bits=64",
];

struct Chain {
    directory: TempDir,
    random: Random,
    /// The images below the top image, base first.
    below: Vec<String>,
    steps: Vec<String>,
}

impl Chain {
    fn new(seed: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut chain =
            Self { directory, random: Random::new(seed), below: Vec::new(), steps: Vec::new() };
        chain.qemu("qemu-img", "create -q -f raw base 3M");
        chain.write("base", "raw", 3 << 20);
        chain.below.push("base".to_owned());
        for name in ["middle", "top"] {
            let kind = chain.kind();
            let (below, size) = (chain.below.last().unwrap(), 2048 + chain.random.below(3000));
            let format = if below == "base" { "raw" } else { "qcow2" };
            let line =
                format!("create -q -f qcow2 -o {kind} -b {below} -F {format} {name} {size}k");
            chain.qemu("qemu-img", &line);
            chain.write(name, "qcow2", size << 10);
            chain.below.push(name.to_owned());
        }
        chain.below.pop();
        chain.qemu("qemu-img", "create -q -f qcow2 -o cluster_size=4k other 4M");
        chain.write("other", "qcow2", 4 << 20);
        chain.keep();
        chain
    }

    fn kind(&mut self) -> &'static str {
        KINDS[usize::try_from(self.random.below(KINDS.len() as u64)).unwrap()]
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn qemu(&self, tool: &str, line: &str) {
        Program::new(tool).args(line.split(' ')).directory(self.path()).succeed();
    }

    /// Makes random writes, zero writes and discards.
    fn write(&mut self, name: &str, format: &str, size: u64) {
        let mut io = Program::oxblk().args(["io", "-f", format]);
        for _ in 0..6 {
            let offset = self.random.below(size / 512) * 512;
            let len = (512 + self.random.below(size / 4) / 512 * 512).min(size - offset);
            let what = match self.random.below(4) {
                0 => "write -z".to_owned(),
                1 => "discard".to_owned(),
                _ => format!("write -P {}", 1 + self.random.below(255)),
            };
            io = io.args(["-c".to_owned(), format!("{what} {offset} {len}")]);
        }
        io.arg(name).directory(self.path()).succeed();
    }

    /// Stores the current contents of the top image. Later contents are compared with these contents.
    fn keep(&self) {
        self.qemu("qemu-img", "convert -f qcow2 -O raw top seen");
    }

    fn img(&mut self, line: &str) -> bool {
        self.steps.push(line.to_owned());
        let words = line.split(' ').map(|word| if word == "''" { "" } else { word });
        let img = Program::oxblk().arg("img").args(words);
        let reply = img.directory(self.path()).run();
        eprintln!("{line}: {}", reply.err());
        reply.code() == 0
    }

    fn amend(&mut self) {
        let options = [
            "compat=1.1",
            "compat=0.10",
            "compat=1.1,refcount_bits=64",
            "refcount_bits=16",
            "refcount_bits=2",
            "lazy_refcounts=on",
            "lazy_refcounts=off",
        ];
        let pick = usize::try_from(self.random.below(options.len() as u64)).unwrap();
        // Some changes are impossible for some images.
        self.img(&format!("amend -f qcow2 -o {} top", options[pick]));
    }

    fn rebase(&mut self) {
        let (name, format) = match self.random.below(4) {
            0 => ("''", "raw"),
            1 => ("base", "raw"),
            2 => ("other", "qcow2"),
            _ => ("middle", "qcow2"),
        };
        let compress = if self.random.one_in(3) { "-c " } else { "" };
        let done = self.img(&format!("rebase {compress}-b {name} -F {format} -f qcow2 top"));
        assert!(done, "{:?}", self.steps);
        self.below = match name {
            "''" => Vec::new(),
            "middle" => vec!["base".to_owned(), "middle".to_owned()],
            name => vec![name.to_owned()],
        };
    }

    /// Commits the top image. After the commit, the image directly below the top must have the contents of the top.
    fn commit(&mut self) {
        let Some(below) = self.below.last().cloned() else { return };
        assert!(self.img("commit -f qcow2 top"), "{:?}", self.steps);
        let format = if below == "base" { "raw" } else { "qcow2" };
        // The image below may be longer than the top.
        self.qemu("qemu-img", &format!("convert -f {format} -O raw {below} committed"));
        let read = |name: &str| std::fs::read(self.path().join(name)).unwrap();
        let (seen, committed) = (read("seen"), read("committed"));
        assert!(committed.starts_with(&seen), "{:?}", self.steps);
    }

    fn compare(&self, line: &str) {
        let reply = Program::new("qemu-img").args(line.split(' ')).directory(self.path()).run();
        assert_eq!(
            reply.code(),
            0,
            "{line} after {:?}: {}{}",
            self.steps,
            reply.out(),
            reply.err()
        );
    }

    fn step(&mut self) {
        match self.random.below(4) {
            0 => self.amend(),
            1 => self.commit(),
            2 => {
                let size = std::fs::metadata(self.path().join("seen")).unwrap().len();
                self.steps.push("write".to_owned());
                self.write("top", "qcow2", size);
                self.keep();
            }
            _ => self.rebase(),
        }
        self.compare("compare -q -f qcow2 -F raw top seen");
        self.compare("check -q -f qcow2 top");
    }
}

#[test]
fn amends_rebases_and_commits_keep_the_contents_of_the_top() {
    for seed in 1..=5 {
        let mut chain = Chain::new(seed);
        for _ in 0..8 {
            chain.step();
        }
        for image in ["middle", "other"] {
            chain.compare(&format!("check -q -f qcow2 {image}"));
        }
    }
}

#[test]
fn an_unknown_backing_node_is_reported_as_by_qemu_img() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a", "1M"]);
    both.same(Img, &["map", "--image-opts", "driver=qcow2,file.filename=a,backing=x"]);
}

#[test]
fn a_loop_of_names_that_are_not_utf8_is_detected() {
    let directory = tempfile::tempdir().expect("a scratch directory");
    let (name, backing) = (OsStr::from_bytes(b"a\xff"), OsStr::from_bytes(b"./a\xff"));
    let program = |program: Program| program.directory(directory.path());
    let qemu = || program(Program::new("qemu-img"));
    qemu().args(["create", "-q", "-f", "qcow2"]).arg(name).arg("1M").succeed();
    qemu().args(["rebase", "-u", "-F", "qcow2", "-b"]).arg(backing).arg(name).succeed();
    let info = program(Program::oxblk()).args(["img", "info", "--backing-chain"]).arg(name).run();
    assert_eq!(info.code(), 1);
    assert!(info.err().contains("creates an infinite loop"), "{}", info.err());
}

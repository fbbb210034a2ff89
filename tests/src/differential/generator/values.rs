//! Good, bad and odd values for options and operands, by kind.
//!
//! Every value lets a tool end soon: numbers are small, or so large that the tools refuse them.

/// The purpose of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A format's name.
    Format,
    /// A cache mode.
    Cache,
    /// A size with an optional suffix.
    Size,
    /// The new size of `resize`.
    NewSize,
    /// An offset or length in bytes.
    Offset,
    /// A small number: a count, a depth.
    Count,
    /// A request size.
    Block,
    /// A file that may or may not exist.
    Image,
    /// An image, in most cases an image with bitmaps.
    WithBitmaps,
    /// A name for a new file.
    NewImage,
    /// An option string for `--image-opts`.
    ImageOptions,
    /// `-o` of `create`, `convert`, `measure` and `amend`.
    CreateOptions,
    /// `--output`.
    Output,
    /// `-r` of `check`.
    Repair,
    /// A snapshot's name.
    Snapshot,
    /// `-l` of `convert` and `measure`.
    SourceSnapshot,
    /// A bitmap's name.
    Bitmap,
    /// A value of `--aio`.
    Aio,
    /// A preallocation mode.
    Preallocation,
    /// `--object`.
    Object,
    /// A pattern byte.
    Pattern,
    /// Operands of `dd`.
    Dd,
    /// A value of `-S` of `convert`.
    Sparse,
    /// A rate in bytes per second.
    Rate,
    /// A discard mode of `io`.
    Discard,
    /// Options of `reopen` and `open`.
    RunOptions,
}

/// Good, bad and odd values.
type Pool = (&'static [&'static str], &'static [&'static str], &'static [&'static str]);

impl Kind {
    /// The values of the kind.
    pub(super) fn pool(self) -> Pool {
        match self {
            Kind::Format => (&["qcow2", "raw"], &["bogus", "", "QCOW2", "qcow2,", "-"], &["file"]),
            Kind::Cache => (
                &["none", "writeback", "writethrough", "unsafe", "directsync", "off"],
                &["", "bogus", "None", "writeback,unsafe"],
                &["on"],
            ),
            Kind::Size => (
                &["1M", "64k", "4194304", "1.5M", "0x20000", "3m", "100K", "0"],
                &SIZES_BAD,
                &SIZES_ODD,
            ),
            Kind::NewSize => (
                &["8M", "+1M", "-1M", "4M", "2M", "+64k", "4194304", "+0", "5000000"],
                &["", "+", "-", "+-1", "-+1", "1X", "-100M", "+9E", "abc", "--1", "+1.5"],
                &["+1.0", " 8M", "0", "4000001", "+1000", "-0", "0x800000", "+0x10000", "-0.5M"],
            ),
            Kind::Offset => (
                &["0", "64k", "65536", "1M", "4096", "512", "3M", "1.5M", "0x10000"],
                &SIZES_BAD,
                &SIZES_ODD,
            ),
            Kind::Count => (
                &["1", "2", "8", "16"],
                &["-1", "", "abc", "1x", "4294967296", "99999999999999999999", "1.5", "-5k"],
                &["0", " 3", "+2", "0x2", "02", "1.0", "2b"],
            ),
            Kind::Block => (
                &["512", "4k", "64k", "1M"],
                &["", "abc", "-1", "3G", "9E", "1.5", "99999999999999999999"],
                &["0", "513", "1000", "0x1000", "1.5k", "0.5k", "1"],
            ),
            Kind::Image => (
                &["a.qcow2", "top.qcow2", "r.raw", "old.qcow2", "b.qcow2", "m.qcow2"],
                &["missing", "", "dir", "dir/missing", "nodir/x", "bogus:x", "a.qcow2/x"],
                &[
                    "./a.qcow2",
                    "file:a.qcow2",
                    "odd.raw",
                    "empty.raw",
                    "com,ma.raw",
                    "colon:x.raw",
                    "./colon:x.raw",
                    "link.qcow2",
                    "json:{'driver':'qcow2','file.filename':'a.qcow2'}",
                    "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"r.raw\"}}",
                    "json:{\"driver\":\"raw\",\"offset\":512,\"file\":{\"driver\":\"file\",\"filename\":\"r.raw\"}}",
                    "json:{\"file.filename\":\"a.qcow2\"}",
                    "json:{}",
                    "dir/in.qcow2",
                    "sp ace.raw",
                    "lost.qcow2",
                ],
            ),
            Kind::WithBitmaps => {
                (&["m.qcow2"], &["missing", "r.raw", "old.qcow2"], &["a.qcow2", "top.qcow2"])
            }
            Kind::NewImage => (
                &["n.qcow2", "n.raw", "n"],
                &["", "dir", "nodir/n", "bogus:n"],
                &["a.qcow2", "./n", "file:n", "dir/n", "new name", "n,x", "r.raw", "-"],
            ),
            Kind::ImageOptions => (&IMAGE_OPTIONS_GOOD, &IMAGE_OPTIONS_BAD, &IMAGE_OPTIONS_ODD),
            Kind::CreateOptions => (&CREATE_GOOD, &CREATE_BAD, &CREATE_ODD),
            Kind::Output => (&["json", "human"], &["", "xml", "JSON", "json,human"], &["human"]),
            Kind::Repair => (&["leaks", "all"], &["", "none", "leak", "all,leaks"], &["all"]),
            Kind::Snapshot => {
                (&["s", "2", "1", "new"], &["", "missing"], &["0", "s s", "name=s", "1s"])
            }
            Kind::SourceSnapshot => (
                &["s", "1", "snapshot.name=s", "snapshot.id=1"],
                &["missing", "", "snapshot.id=9", "snapshot.x=1", "snapshot.id=1,foo=2"],
                &["snapshot.id=1,snapshot.name=s", "snapshot.name", "snapshot.id=1,", "id=1"],
            ),
            Kind::Bitmap => (&["b0", "b1", "new"], &["", "missing"], &["b 2", "b,3", LONG]),
            Kind::Aio => (&["threads", "io_uring"], &["", "bogus", "native"], &["threads"]),
            Kind::Preallocation => {
                (&["off", "metadata", "falloc", "full"], &["", "bogus", "on"], &["metadata"])
            }
            Kind::Object => (
                &["secret,id=k0,data=abc", "throttle-group,id=t0"],
                &[
                    "",
                    ",",
                    "bogus,id=x",
                    "secret",
                    "secret,id=1x,data=x",
                    "secret,id=k0",
                    "secret,id=k0,data=a,file=b",
                    "secret,id",
                    "secret,id=k0,data=x,bogus=1",
                    "id=k0",
                    "secret,id=k0,file=missing",
                    "secret,id=k0,format=bad,data=x",
                    "secret,id=k0,data=x,x.=1",
                    "secret,id=k0,data=x,data.y=1",
                ],
                &[
                    "secret,id=k0,data=a,,b",
                    "{'qom-type':'secret','id':'k0','data':'x'}",
                    "qom-type=secret,id=k0,data=x",
                ],
            ),
            Kind::Pattern => {
                (&["0", "1", "0xff", "255"], &["256", "-1", "", "abc", "1x"], &["07", "+3", " 4"])
            }
            Kind::Dd => (
                &["bs=4k", "count=2", "skip=1", "bs=512", "count=1", "bs=1M", "skip=2"],
                &[
                    "bs=0", "bs=", "bs=abc", "count=", "count=-1", "skip=-1", "bogus=1", "x",
                    "bs=-1", "skip=x", "bs=3G",
                ],
                &[
                    "count=0",
                    "skip=100M",
                    "bs=513",
                    "count=0x2",
                    "skip=0",
                    "bs=1.5k",
                    "conv=notrunc",
                    "count=1,5",
                ],
            ),
            Kind::Sparse => (
                &["0", "4k", "64k", "1M", "512"],
                &["-1", "abc", "", "9E", "3G"],
                &["513", "1000", "1", "0x1000"],
            ),
            Kind::Rate => {
                (&["100M", "1G", "1073741824"], &["-1", "abc", "", "9E", "1X"], &["0x10000000"])
            }
            Kind::Discard => (&["unmap", "ignore", "on", "off"], &["", "bogus"], &["unmap"]),
            Kind::RunOptions => (
                &[
                    "lazy-refcounts=on",
                    "cache-size=2M",
                    "l2-cache-size=1M",
                    "refcount-cache-size=256k",
                    "cache-clean-interval=30",
                    "overlap-check=none",
                    "overlap-check.template=all",
                    "pass-discard-request=off",
                    "discard-no-unref=on",
                    "detect-zeroes=on",
                ],
                &[
                    "lazy-refcounts=maybe",
                    "cache-size=foo",
                    "bogus=1",
                    "overlap-check=bogus",
                    "cache-size=-1",
                    "cache-clean-interval=-5",
                    "refcount-cache-size=9E",
                    "overlap-check=constant,overlap-check.template=all",
                    "overlap-check.bogus=on",
                    "id=1",
                    "cache.direct=maybe",
                    "l2-cache-size=2M,cache-size=1M",
                    "overlap-check.main-header=2",
                    "detect-zeroes=bogus",
                    "discard=bogus",
                    "cache-clean-interval=99999999999",
                    "l2-cache-size=1M,refcount-cache-size=1M,cache-size=4M",
                    "lazy-refcounts=",
                    "=x",
                    "",
                ],
                &[
                    "lazy-refcounts",
                    "nolazy-refcounts",
                    "lazy-refcounts=y",
                    "cache-size=1.5M",
                    "discard=unmap",
                    "overlap-check=all,overlap-check.template=all",
                    "pass-discard-other=yes",
                    "cache-clean-interval=0x10",
                    "l2-cache-size=0",
                    "cache-size=0",
                    "refcount-cache-size=0",
                    "overlap-check.active-l1=no",
                ],
            ),
        }
    }
}

const LONG: &str = "bitmap-of-a-name-so-long-that-it-cannot-be-stored-0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789";

const SIZES_BAD: [&str; 16] = [
    "",
    "-1",
    "abc",
    "1X",
    "1kk",
    "1.5",
    "9E",
    "16E",
    "99999999999999999999",
    "-1k",
    "1e3",
    ".",
    "0x",
    "0x1k",
    "1 k",
    "--1",
];
const SIZES_ODD: [&str; 12] = [
    " 64k",
    "+64k",
    "64k ",
    "1.0",
    "1024.",
    ".5M",
    "010",
    "1.00000000000000000001k",
    "65536b",
    "0X10000",
    "513",
    "1000001",
];

const IMAGE_OPTIONS_GOOD: [&str; 7] = [
    "driver=qcow2,file.filename=a.qcow2",
    "driver=raw,file.filename=r.raw",
    "driver=qcow2,file.driver=file,file.filename=top.qcow2",
    "file.filename=a.qcow2",
    "driver=file,filename=r.raw",
    "driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
    "driver=qcow2,file.filename=b.qcow2,lazy-refcounts=on",
];
const IMAGE_OPTIONS_BAD: [&str; 32] = [
    "",
    ",",
    "=",
    "a.qcow2",
    "help",
    "driver=bogus",
    "driver=qcow2",
    "driver=",
    "driver=qcow2,file.filename=missing",
    "driver=qcow2,file.filename=r.raw",
    "driver=qcow2,file.filename=a.qcow2,bogus=1",
    "driver=qcow2,file.filename=a.qcow2,bogus.x=1",
    "driver=qcow2,file.filename=a.qcow2,file.bogus=1",
    "driver=raw,file=x,file.filename=r.raw",
    "driver=raw,file.filename=r.raw,file=x",
    "driver=qcow2,file.filename=top.qcow2,backing=x,backing.driver=raw",
    "driver=qcow2,file.filename=top.qcow2,backing=x",
    "driver=raw,offset=foo,file.filename=r.raw",
    "driver=raw,offset=-1,file.filename=r.raw",
    "driver=raw,size=100M,file.filename=r.raw",
    "driver=raw,offset=4M,file.filename=r.raw",
    "driver=raw,file.filename=r.raw,read-only=maybe",
    "driver=raw,file.filename=r.raw,cache=none",
    "driver=raw,file.filename=r.raw,cache.bogus=on",
    "driver=raw,file.filename=r.raw,discard=bogus",
    "driver=raw,file.filename=r.raw,detect-zeroes=bogus",
    "id=1,driver=raw,file.filename=r.raw",
    "id=x,driver=raw,file.filename=r.raw",
    "driver=file,filename=r.raw,locking=bogus",
    "driver=file,filename=r.raw,aio=bogus",
    "driver=file,filename=dir",
    "driver=raw,file.filename=r.raw,node-name=1x",
];
const IMAGE_OPTIONS_ODD: [&str; 20] = [
    "driver=raw,file.filename=r.raw,",
    "driver=raw,file.filename=com,,ma.raw",
    "driver=raw,file.driver=file,file.filename=colon:x.raw",
    "driver=raw,driver=qcow2,file.filename=a.qcow2",
    "driver=raw,noread-only,file.filename=r.raw",
    "driver=raw,read-only,file.filename=r.raw",
    "driver=raw,read-only=y,file.filename=r.raw",
    "driver=raw,size=1k,file.filename=r.raw",
    "driver=raw,offset=512,size=1.5k,file.filename=r.raw",
    "driver=raw,offset=0x200,file.filename=r.raw",
    "driver=raw,offset=1024.0,file.filename=r.raw",
    "driver=qcow2,file.filename=top.qcow2,backing=",
    "driver=qcow2,file.filename=top.qcow2,backing.driver=raw",
    "driver=qcow2,file.filename=top.qcow2,backing.file.filename=b.qcow2,backing.driver=qcow2",
    "driver=qcow2,file.filename=a.qcow2,cache-size=2M",
    "driver=raw,file.filename=r.raw,node-name=x",
    "file.filename=r.raw",
    "driver=raw,file.filename=./colon:x.raw,cache.direct=off",
    "driver=null-co,size=1M",
    "driver=qcow2,file.filename=a.qcow2,discard=unmap,detect-zeroes=unmap",
];

const CREATE_GOOD: [&str; 22] = [
    "size=2M",
    "cluster_size=4k",
    "cluster_size=512",
    "cluster_size=2M",
    "lazy_refcounts=on",
    "refcount_bits=1",
    "refcount_bits=64",
    "compat=0.10",
    "compat=1.1",
    "compat=v3",
    "compat=v2",
    "extended_l2=on",
    "preallocation=metadata",
    "preallocation=off",
    "preallocation=falloc",
    "preallocation=full",
    "compression_type=zlib",
    "compression_type=zstd",
    "nocow=off",
    "backing_file=b.qcow2,backing_fmt=qcow2",
    "data_file=n.data",
    "data_file=n.data,data_file_raw=on",
];
const CREATE_BAD: [&str; 46] = [
    "",
    ",",
    "size=-1",
    "size=foo",
    "size=",
    "size",
    "bogus=1",
    "bogus",
    "=x",
    ",size=1M",
    "size=1M,",
    "cluster_size=0",
    "cluster_size=100",
    "cluster_size=4M",
    "cluster_size=-1",
    "cluster_size=513",
    "cluster_size=64k,cluster_size=x",
    "lazy_refcounts=maybe",
    "lazy_refcounts=",
    "refcount_bits=0",
    "refcount_bits=3",
    "refcount_bits=128",
    "refcount_bits=-1",
    "refcount_bits=x",
    "refcount_bits=16.0",
    "refcount_bits=99999999999999999999",
    "compat=2",
    "compat=",
    "compat=0.10,lazy_refcounts=on",
    "compat=0.10,refcount_bits=1",
    "compat=v2,extended_l2=on",
    "extended_l2=on,cluster_size=4k",
    "preallocation=bogus",
    "preallocation=",
    "compression_type=bogus",
    "compat=0.10,compression_type=zstd",
    "data_file_raw=on",
    "backing_file=missing,backing_fmt=qcow2",
    "backing_file=b.qcow2",
    "backing_fmt=qcow2",
    "backing_file=,backing_fmt=raw",
    "encryption=on",
    "encrypt.format=bogus",
    "encrypt.key-secret=x",
    "backing_file=b.qcow2,backing_fmt=bogus",
    "nocow=maybe",
];
const CREATE_ODD: [&str; 22] = [
    "help",
    "?",
    "size=1M,help",
    "backing_file=a,,help",
    "x=help",
    "size=1M,size=2M",
    "lazy_refcounts",
    "nolazy_refcounts",
    "nocow",
    "lazy_refcounts=yes",
    "lazy_refcounts=n",
    "cluster_size=65536.0",
    "cluster_size=0x10000",
    "refcount_bits=0x10",
    "refcount_bits=010",
    "id=x",
    "size=1000001",
    "backing_file=r.raw,backing_fmt=raw",
    "data_file=com,,ma",
    "extent_size_hint=1M",
    "size=0",
    "preallocation=metadata,cluster_size=512",
];

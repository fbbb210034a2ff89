//! The comparisons, each with a target for the time of QEMU divided by the time of oxblk.

/// One comparison: the arguments after `oxblk img` and `qemu-img`.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) arguments: &'static [&'static str],
    /// Arguments for QEMU only. With these arguments, QEMU is fastest.
    pub(super) qemu_only: &'static [&'static str],
    /// The state that is prepared before each run, untimed.
    pub(super) fresh: Fresh,
    /// The target for the time of QEMU divided by the time of oxblk.
    pub(super) mark: f64,
}

/// The state from which a run starts.
pub(super) enum Fresh {
    /// The file of this name does not exist.
    Absent(&'static str),
    /// An empty qcow2 image of this name.
    Image(&'static str),
    /// An empty overlay of this name over `disk.qcow2`.
    Overlay(&'static str),
    /// An empty qcow2 image, written over the start of this file. The file keeps its length, so the memory of newly allocated
    /// clusters already exists.
    Emptied(&'static str),
    Nothing,
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "convert raw to qcow2",
        arguments: &["convert", "-O", "qcow2", "disk.raw", "out.qcow2"],
        qemu_only: &[],
        fresh: Fresh::Absent("out.qcow2"),
        mark: 1.0,
    },
    Case {
        name: "convert qcow2 to raw",
        arguments: &["convert", "-O", "raw", "disk.qcow2", "out.raw"],
        qemu_only: &[],
        fresh: Fresh::Absent("out.raw"),
        mark: 1.0,
    },
    Case {
        name: "convert raw to qcow2 in place",
        arguments: &["convert", "-n", "--target-is-zero", "-O", "qcow2", "disk.raw", "old.qcow2"],
        qemu_only: &[],
        fresh: Fresh::Emptied("old.qcow2"),
        mark: 1.0,
    },
    Case {
        name: "convert qcow2 to raw in place",
        arguments: &["convert", "-n", "-O", "raw", "disk.qcow2", "old.raw"],
        qemu_only: &[],
        fresh: Fresh::Nothing,
        mark: 1.0,
    },
    Case {
        name: "convert -c, zlib",
        arguments: &["convert", "-c", "-O", "qcow2", "disk.raw", "out.qcow2"],
        qemu_only: &["-W", "-m", "8"],
        fresh: Fresh::Absent("out.qcow2"),
        mark: 2.0,
    },
    Case {
        name: "convert -c, zstd",
        arguments: &[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            "compression_type=zstd",
            "disk.raw",
            "out.qcow2",
        ],
        qemu_only: &["-W", "-m", "8"],
        fresh: Fresh::Absent("out.qcow2"),
        mark: 2.0,
    },
    Case {
        name: "bench: 4 KiB reads, depth 32",
        arguments: &["bench", "-f", "qcow2", "-c", "1000000", "-d", "32", "-s", "4k", "full.qcow2"],
        qemu_only: &["-i", "io_uring"],
        fresh: Fresh::Nothing,
        mark: 2.0,
    },
    Case {
        name: "bench: 64 KiB allocating writes, depth 32",
        arguments: &[
            "bench",
            "-w",
            "-f",
            "qcow2",
            "-c",
            "32768",
            "-d",
            "32",
            "-s",
            "64k",
            "new.qcow2",
        ],
        qemu_only: &["-i", "io_uring"],
        fresh: Fresh::Image("new.qcow2"),
        mark: 2.0,
    },
    Case {
        name: "bench: 64 KiB allocating writes, depth 32, in place",
        arguments: &[
            "bench",
            "-w",
            "-f",
            "qcow2",
            "-c",
            "32768",
            "-d",
            "32",
            "-s",
            "64k",
            "old.qcow2",
        ],
        qemu_only: &["-i", "io_uring"],
        fresh: Fresh::Emptied("old.qcow2"),
        mark: 2.0,
    },
    Case {
        name: "compare raw with qcow2",
        arguments: &["compare", "disk.raw", "disk.qcow2"],
        qemu_only: &[],
        fresh: Fresh::Nothing,
        mark: 1.5,
    },
    Case {
        name: "decompress zlib, in place",
        arguments: &["convert", "-n", "-O", "raw", "zlib.qcow2", "old.raw"],
        qemu_only: &["-W", "-m", "8"],
        fresh: Fresh::Nothing,
        mark: 2.0,
    },
    Case {
        name: "decompress zstd, in place",
        arguments: &["convert", "-n", "-O", "raw", "zstd.qcow2", "old.raw"],
        qemu_only: &["-W", "-m", "8"],
        fresh: Fresh::Nothing,
        mark: 1.5,
    },
    Case {
        name: "rebase, an eighth differs",
        arguments: &["rebase", "-f", "qcow2", "-F", "raw", "-b", "other.raw", "top.qcow2"],
        qemu_only: &[],
        fresh: Fresh::Overlay("top.qcow2"),
        mark: 2.0,
    },
    Case {
        name: "map, two million extents",
        arguments: &["map", "--output=json", "pieces.qcow2"],
        qemu_only: &[],
        fresh: Fresh::Nothing,
        mark: 2.0,
    },
];

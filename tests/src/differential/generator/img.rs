//! The commands of `img` with their options and operands.

use super::values::Kind;

/// An option of a command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opt {
    pub(super) short: Option<char>,
    pub(super) long: Option<&'static str>,
    pub(super) value: Option<Kind>,
}

/// A command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) options: &'static [Opt],
    pub(super) operands: &'static [Kind],
    /// Options that choose the command's action. Most generated command lines have one of them.
    pub(super) main: &'static [&'static [&'static str]],
}

/// An option with a letter, a word and a value.
pub(super) const fn value(short: char, long: &'static str, kind: Kind) -> Opt {
    Opt { value: Some(kind), ..flag(short, long) }
}

/// An option with a letter and a word, without a value.
pub(super) const fn flag(short: char, long: &'static str) -> Opt {
    Opt { short: Some(short), ..self::long(long, None) }
}

/// An option with a word only.
pub(super) const fn long(long: &'static str, value: Option<Kind>) -> Opt {
    Opt { short: None, long: Some(long), value }
}

/// An option with a letter only.
pub(super) const fn short(letter: char, value: Option<Kind>) -> Opt {
    Opt { short: Some(letter), long: None, value }
}

const IMAGE_OPTS: Opt = long("image-opts", None);
const OBJECT: Opt = long("object", Some(Kind::Object));
const OUTPUT: Opt = long("output", Some(Kind::Output));
const SHARE: Opt = flag('U', "force-share");
const QUIET: Opt = flag('q', "quiet");
const FORMAT: Opt = value('f', "format", Kind::Format);

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "create",
        options: &[
            QUIET,
            FORMAT,
            value('o', "options", Kind::CreateOptions),
            value('o', "options", Kind::CreateOptions),
            value('b', "backing", Kind::Image),
            value('F', "backing-format", Kind::Format),
            flag('u', "backing-unsafe"),
            OBJECT,
        ],
        operands: &[Kind::NewImage, Kind::Size],
        main: &[
            &["-f", "qcow2"],
            &["-f", "qcow2"],
            &["-f", "raw"],
            &["-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2"],
        ],
    },
    Command {
        name: "info",
        options: &[FORMAT, IMAGE_OPTS, long("backing-chain", None), SHARE, OBJECT, OUTPUT],
        operands: &[Kind::Image],
        main: &[&[], &["--output=json"]],
    },
    Command {
        name: "check",
        options: &[
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            value('T', "cache", Kind::Cache),
            SHARE,
            OUTPUT,
            value('r', "repair", Kind::Repair),
            OBJECT,
        ],
        operands: &[Kind::Image],
        main: &[&[]],
    },
    Command {
        name: "convert",
        options: &[
            QUIET,
            value('f', "source-format", Kind::Format),
            long("image-opts", None),
            value('l', "snapshot", Kind::SourceSnapshot),
            value('T', "source-cache", Kind::Cache),
            value('O', "output-format", Kind::Format),
            long("target-image-opts", None),
            value('o', "options", Kind::CreateOptions),
            short('c', None),
            value('t', "output-cache", Kind::Cache),
            value('B', "backing", Kind::Image),
            value('F', "backing-format", Kind::Format),
            short('n', None),
            long("target-is-zero", None),
            value('S', "sparse-size", Kind::Sparse),
            long("bitmaps", None),
            long("skip-broken-bitmaps", None),
            SHARE,
            value('r', "rate", Kind::Rate),
            value('m', "parallel", Kind::Count),
            flag('C', "copy-range-offloading"),
            long("salvage", None),
            flag('W', "oob-writes"),
            OBJECT,
        ],
        operands: &[Kind::Image, Kind::NewImage],
        main: &[&["-O", "qcow2"], &["-O", "raw"], &["-n", "-O", "qcow2"], &["-O", "qcow2", "-c"]],
    },
    Command {
        name: "resize",
        options: &[
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            long("shrink", None),
            long("shrink", None),
            long("preallocation", Some(Kind::Preallocation)),
            OBJECT,
        ],
        operands: &[Kind::Image, Kind::NewSize],
        main: &[&[], &["--shrink"]],
    },
    Command {
        name: "amend",
        options: &[
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            value('t', "cache", Kind::Cache),
            value('o', "options", Kind::CreateOptions),
            long("force", None),
            OBJECT,
        ],
        operands: &[Kind::Image],
        main: &[
            &["-o", "lazy_refcounts=on"],
            &["-o", "compat=0.10"],
            &["-o", "compat=1.1"],
            &["-o", "size=8M"],
            &["-o", "refcount_bits=8"],
            &[],
        ],
    },
    Command {
        name: "rebase",
        options: &[
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            value('t', "cache", Kind::Cache),
            value('b', "backing", Kind::Image),
            value('F', "backing-format", Kind::Format),
            value('T', "backing-cache", Kind::Cache),
            flag('u', "backing-unsafe"),
            flag('c', "compress"),
            SHARE,
            OBJECT,
        ],
        operands: &[Kind::Image],
        main: &[
            &["-b", ""],
            &["-b", "a.qcow2", "-F", "qcow2"],
            &["-u", "-b", "x", "-F", "raw"],
            &[],
        ],
    },
    Command {
        name: "commit",
        options: &[
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            value('t', "cache", Kind::Cache),
            flag('d', "drop"),
            value('b', "base", Kind::Image),
            value('r', "rate", Kind::Rate),
            OBJECT,
        ],
        operands: &[Kind::Image],
        main: &[&[], &["-b", "b.qcow2"], &["-d"]],
    },
    Command {
        name: "map",
        options: &[
            FORMAT,
            IMAGE_OPTS,
            long("start-offset", Some(Kind::Offset)),
            long("max-length", Some(Kind::Offset)),
            OUTPUT,
            SHARE,
            OBJECT,
        ],
        operands: &[Kind::Image],
        main: &[&[], &["--output=json"]],
    },
    Command {
        name: "measure",
        options: &[
            value('O', "target-format", Kind::Format),
            value('o', "options", Kind::CreateOptions),
            long("size", Some(Kind::Size)),
            FORMAT,
            IMAGE_OPTS,
            value('l', "snapshot", Kind::SourceSnapshot),
            OUTPUT,
            SHARE,
            OBJECT,
        ],
        operands: &[Kind::Image],
        main: &[&["-O", "qcow2"], &["-O", "raw"]],
    },
    Command {
        name: "compare",
        options: &[
            QUIET,
            value('f', "a-format", Kind::Format),
            value('F', "b-format", Kind::Format),
            IMAGE_OPTS,
            flag('s', "strict"),
            value('T', "cache", Kind::Cache),
            SHARE,
            OBJECT,
        ],
        operands: &[Kind::Image, Kind::Image],
        main: &[&[]],
    },
    Command {
        name: "snapshot",
        options: &[
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            SHARE,
            flag('l', "list"),
            short('a', Some(Kind::Snapshot)),
            short('c', Some(Kind::Snapshot)),
            short('d', Some(Kind::Snapshot)),
            OBJECT,
        ],
        operands: &[Kind::Image],
        main: &[&["-l"], &["-d", "s"], &["-c", "new"], &["-a", "s"], &[]],
    },
    Command {
        name: "bitmap",
        options: &[
            short('f', Some(Kind::Format)),
            IMAGE_OPTS,
            long("add", None),
            value('g', "granularity", Kind::Block),
            long("remove", None),
            long("clear", None),
            long("enable", None),
            long("disable", None),
            long("merge", Some(Kind::Bitmap)),
            value('b', "source-file", Kind::Image),
            value('F', "source-format", Kind::Format),
            OBJECT,
        ],
        operands: &[Kind::WithBitmaps, Kind::Bitmap],
        main: &[
            &["--add"],
            &["--remove"],
            &["--clear"],
            &["--enable"],
            &["--merge", "b0"],
            &["--disable"],
            &[],
        ],
    },
    Command {
        name: "dd",
        options: &[FORMAT, IMAGE_OPTS, value('O', "output-format", Kind::Format), SHARE, OBJECT],
        operands: &[Kind::Dd, Kind::Dd],
        main: &[
            &["if=r.raw", "of=n.raw"],
            &["if=a.qcow2", "of=n", "-O", "qcow2"],
            &["if=missing", "of=n"],
            &["if=r.raw"],
            &["of=n"],
        ],
    },
    Command {
        name: "bench",
        options: &[
            short('q', None),
            FORMAT,
            IMAGE_OPTS,
            value('t', "cache", Kind::Cache),
            value('c', "count", Kind::Count),
            value('d', "depth", Kind::Count),
            value('o', "offset", Kind::Offset),
            value('s', "buffer-size", Kind::Block),
            value('S', "step-size", Kind::Block),
            value('i', "aio", Kind::Aio),
            flag('w', "write"),
            long("pattern", Some(Kind::Pattern)),
            long("flush-interval", Some(Kind::Count)),
            long("no-drain", None),
            SHARE,
        ],
        operands: &[Kind::Image],
        main: &[&["-c", "3"], &["-c", "2", "-w"]],
    },
];

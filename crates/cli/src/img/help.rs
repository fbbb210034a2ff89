//! The output of `--help`.

use oxblk_core::DriverTable;

use super::COMMANDS;
use crate::program::{Program, out};

/// Prints the help of the tool, with a list of all commands.
pub(super) fn overview(program: &Program) {
    let name = program.name();
    out(format_args!(
        "{name} version {}\nWorks on disk images.\n\nUsage: {name} [-h|--help] [-V|--version] COMMAND [ARGUMENTS]\n\nCommands:\n\n",
        crate::VERSION
    ));
    for command in COMMANDS {
        out(format_args!("  {:<8} - {}\n", command.name, command.about));
    }
    out(format_args!("\n{name} COMMAND --help explains a command.\n\nSupported formats:"));
    let drivers: DriverTable = oxblk::drivers();
    let there = drivers.iter().filter(|driver| !oxblk::is_absent(driver.name()));
    let mut names: Vec<_> = there.map(|driver| driver.name()).collect();
    names.sort_unstable();
    for name in names {
        out(format_args!(" {name}"));
    }
    out(format_args!("\n"));
}

/// Prints the help of one command.
pub(super) fn command(program: &Program, command: &str) {
    let name = program.name();
    let Some(about) = COMMANDS.iter().find(|known| known.name == command) else { return };
    let (usage, options) = text(command);
    out(format_args!(
        "{name} {command}: {}\n\nUsage: {name} {command} {usage}\n\n{options}",
        about.about
    ));
    out(format_args!("{COMMON}"));
}

const COMMON: &str = "  --object DEFINITION      a secret or other object that images refer to
  --untrusted              refuse images that name other files (backing file, data file)
  -h, --help               this text

Sizes take a suffix: k, M, G, T, P or E (powers of 1024).
";

const IMAGE: &str =
    "  -f, --format FORMAT      format of the image; without it, the format is probed
  --image-opts             the file name is a list of options (driver=…,file.filename=…)
";

fn text(command: &str) -> (&'static str, String) {
    let (usage, own, names_images) = match command {
        "amend" => AMEND,
        "bitmap" => BITMAP,
        "create" => CREATE,
        "info" => INFO,
        "check" => CHECK,
        "commit" => COMMIT,
        "convert" => CONVERT,
        "compare" => COMPARE,
        "compact" => COMPACT,
        "map" => MAP,
        "measure" => MEASURE,
        "rebase" => REBASE,
        "resize" => RESIZE,
        "dd" => DD,
        "snapshot" => SNAPSHOT,
        _ => BENCH,
    };
    let image = if names_images { IMAGE } else { "" };
    (usage, format!("{image}{own}"))
}

type Text = (&'static str, &'static str, bool);

const AMEND: Text = (
    "[OPTIONS] -o LIST FILENAME",
    "  -o, --options LIST       key=value,…; '-o help' lists them
  -t, --cache MODE         cache mode (writeback)
  --force                  allow what may lock you out
  -p, --progress           show progress
  -q, --quiet              print errors only
",
    true,
);

const BITMAP: Text = (
    "[OPTIONS] ACTION... FILENAME [BITMAP]",
    "  --add                    make the bitmap; it records what is written from now on
  -g, --granularity SIZE   bytes that one bit stands for, with --add
  --remove                 take the bitmap out of the image, also a broken one
  --remove-all             take all bitmaps out of the image; BITMAP is not needed then
  --clear                  forget what was recorded
  --enable, --disable      begin and end recording
  --merge NAME             add what the bitmap NAME has recorded
  -b, --source-file FILE   the image that --merge takes bitmaps from, if another
  -F, --source-format FMT  format of that image
The actions are carried out in the order in which they are given.
",
    true,
);

const CREATE: Text = (
    "[OPTIONS] FILENAME [SIZE]",
    "  -f, --format FORMAT      format of the new image (raw)
  -o, --options LIST       key=value,… for the format; '-o help' lists them
  -b, --backing FILE       what the new image does not have is read from FILE
  -F, --backing-format FMT format of that file
  -u, --backing-unsafe     do not look whether that file can be opened
  -q, --quiet              print errors only
",
    false,
);

const INFO: Text = (
    "[OPTIONS] FILENAME",
    "  -b, --backing-chain      also tell of the images below
  -U, --force-share        do not mind that others write to it
  --output human|json      how to print
",
    true,
);

const CHECK: Text = (
    "[OPTIONS] FILENAME",
    "  -r, --repair leaks|all   repair what is found
  -T, --cache MODE         cache mode (writeback)
  -U, --force-share        do not mind that others write to it
  -q, --quiet              print errors only
  --output human|json      how to print

Exit codes: 0 consistent, 1 not checked, 2 corrupt, 3 leaked space, 63 the format has no check.

",
    true,
);

const COMPACT: Text = (
    "[OPTIONS] FILENAME",
    "  -p, --progress           show how far it is
  -q, --quiet              print errors only
  --output human|json      how to print

What lies at the end of the file moves into free space in front of it, the file is cut off behind the last cluster in
use, and holes are punched where clusters are free. The content of the disk and of snapshots stays what it is.

",
    true,
);

const CONVERT: Text = (
    "[OPTIONS] SOURCE [SOURCE…] TARGET",
    "  -f, --source-format FMT  format of the sources; without it, the format is probed
  --source-image-opts      the sources are lists of options
  -T, --source-cache MODE  cache mode of the sources (writeback)
  -O, --target-format FMT  format of the target (raw)
  --target-image-opts      the target is a list of options (with -n)
  -o, --target-options L   key=value,… for a new target; '-o help' lists them
  -t, --target-cache MODE  cache mode of the target (unsafe)
  -B, --backing FILE       backing file of the target
  -F, --backing-format FMT format of that file
  -c, --compress           write compressed clusters
  -n, --no-create          the target is there already
  --target-is-zero         …and reads as zeroes
  -S, --sparse-size SIZE   runs of zeroes from this length on become holes (4k; 0: no holes)
  -m, --parallel N         requests in flight, 1 to 16 (8)
  -W, --oob-writes         write in any order (always so)
  -C, --copy-range-offloading
                           let the host copy where it can
  -r, --rate BYTES         bytes a second, at most
  --salvage                take what cannot be read for zeroes
  -U, --force-share        do not mind that others write to the sources
  --threads N              I/O threads (one a core)
  -p, --progress           show progress
  -q, --quiet              print errors only
",
    false,
);

const COMMIT: Text = (
    "[OPTIONS] FILENAME",
    "  -b, --base FILE          image of the backing chain to commit to; implies -d
  -d, --drop               FILENAME keeps what it holds
  -t, --cache MODE         cache mode (writeback)
  -r, --rate BYTES         bytes a second, at most
  --threads N              I/O threads (one a core)
  -p, --progress           show progress
  -q, --quiet              print errors only
",
    true,
);

const REBASE: Text = (
    "[OPTIONS] (-b FILE | -u) FILENAME",
    "  -b, --backing FILE       the new backing file; '' for none
  -F, --backing-format FMT format of that file
  -u, --backing-unsafe     change the name only: FILE must hold what the old one held
  -c, --compress           compress what is copied
  -t, --cache MODE         cache mode of the image (writeback)
  -T, --backing-cache MODE cache mode of the new backing file (writeback)
  -U, --force-share        do not mind that others write to the new backing file
  --threads N              I/O threads (one a core)
  -p, --progress           show progress
  -q, --quiet              print errors only
",
    true,
);

const SNAPSHOT: Text = (
    "[OPTIONS] [-l | -c NAME | -a NAME | -d NAME] FILENAME",
    "  -l, --list               list the snapshots (what is done if nothing is said)
  -c, --create NAME        keep the disk as it is now
  -a, --apply NAME         make the disk what it was; takes an id, too
  -d, --delete NAME        give the snapshot up
  -U, --force-share        do not mind that others write to it
  -q, --quiet              print errors only
",
    true,
);

const COMPARE: Text = (
    "[OPTIONS] FILENAME1 FILENAME2",
    "  -f, --a-format FORMAT    format of the first image
  -F, --b-format FORMAT    format of the second image
  --image-opts             the file names are lists of options
  -s, --strict             sizes and allocation must be the same, too
  -T, --cache MODE         cache mode (writeback)
  -U, --force-share        do not mind that others write to them
  --threads N              I/O threads (one a core)
  -p, --progress           show progress
  -q, --quiet              print errors only

Exit codes: 0 same, 1 different, 2 cannot open, 3 no status, 4 cannot read.

",
    false,
);

const MAP: Text = (
    "[OPTIONS] FILENAME",
    "  -s, --start-offset N     begin there
  -l, --max-length N       end after so many bytes
  -U, --force-share        do not mind that others write to it
  --output human|json      how to print
",
    true,
);

const MEASURE: Text = (
    "[OPTIONS] (--size SIZE | FILENAME)",
    "  -O, --target-format FMT  format of the image to be made (raw)
  -o, --options LIST       its options
  -s, --size SIZE          its size, for an empty image
  -U, --force-share        do not mind that others write to FILENAME
  --output human|json      how to print
",
    true,
);

const RESIZE: Text = (
    "[OPTIONS] FILENAME [+-]SIZE",
    "  --shrink                 allow the image to become smaller
  --preallocation MODE     how to allocate what is added
  -q, --quiet              print errors only
",
    true,
);

const DD: Text = (
    "[OPTIONS] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    "  -O, --output-format FMT  format of the output (raw)
  -U, --force-share        do not mind that others write to the input
  --threads N              I/O threads (one a core)
",
    true,
);

const BENCH: Text = (
    "[OPTIONS] FILENAME",
    "  -w, --write              write; without it, read
  -c, --count N            requests (75000)
  -d, --depth N            requests in parallel (64)
  -s, --buffer-size SIZE   bytes a request (4k)
  -o, --offset N           where the first request goes
  -S, --step-size SIZE     from one request to the next (the buffer size)
  --pattern BYTE           what is written (0)
  --flush-interval N       flush after every N requests
  --no-drain               …without waiting for those in flight
  -t, --cache MODE         cache mode (writeback)
  -i, --aio MODE           threads, native or io_uring
  -n, --native             the same as -i native
  -U, --force-share        do not mind that others write to it
  --threads N              I/O threads (one a core; one for long writes)
  -q, --quiet              accepted; changes nothing
",
    true,
);

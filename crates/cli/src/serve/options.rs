//! The command line of `oxblk serve`.

use super::Result;
use super::address::{self, Listen};
use crate::flags::page::{Example, Note, Page};
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Alias, Value, both, long};
use crate::flags::{self, Flag, Line, Stop, shared};
use crate::objects;
use oxblk_core::{Gate, names, parse_size};
use oxblk_nbd::proto::MAX_STRING;

/// Maximum number of I/O threads.
const MAX_THREADS: usize = 64;
/// Maximum number of I/O threads by default. The default is one for each core, up to this number.
const DEFAULT_THREADS: usize = 4;

const FLAGS: &[Flag<Options>] = &[
    Flag::value(
        long("nbd"),
        Value::text("ADDRESS").default("a socket in $XDG_RUNTIME_DIR, or beside the image"),
        "where to listen; may be given several times",
        |a, given| {
            a.addresses.push(address::parse(names::to_path(&given).as_os_str())?);
            Ok(())
        },
    ),
    Flag::text(
        both('f', "format"),
        Value::FORMAT,
        "format of the image; without it, the format is probed, and writes to the first sector of a raw \
         image are restricted",
        |a| &mut a.format,
    ),
    Flag::switch(
        long("image-opts"),
        "IMAGE is a list of options, for example driver=qcow2,file.filename=disk.qcow2",
        |a| &mut a.image_opts,
    ),
    Flag::value(
        long("size"),
        Value::size("SIZE"),
        "create the image with this size if it does not exist",
        |a, text| {
            a.size = Some(size(&text)?);
            Ok(())
        },
    ),
    Flag::switch(both('r', "read-only"), "refuse writes", |a| &mut a.read_only),
    Flag::value(
        long("threads"),
        Value::text("N").default("one per core, at most 4"),
        "number of I/O threads, from 1 to 64",
        |a, text| {
            a.threads = threads(&text)?;
            Ok(())
        },
    ),
    Flag::value(
        long("export-name"),
        Value::text("NAME"),
        "name of the export; clients that give no name get it too",
        |a, name| {
            a.given_name = Some(string("export name", name)?);
            Ok(())
        },
    ),
    Flag::value(long("description"), Value::text("TEXT"), "text that clients show", |a, text| {
        a.description = Some(string("description", text)?);
        Ok(())
    }),
    Flag::value(
        both('e', "shared").aliases(&[Alias::Word("max-connections")]),
        Value::text("N").default("what the memory and the limit on open files allow"),
        "maximum number of connections at a time; further ones are refused; 0: the default",
        |a, text| {
            a.max_connections = connections(&text)?;
            Ok(())
        },
    ),
    Flag::switch(
        long("untrusted").common(),
        "refuse images that refer to other files (backing file, data file); give these files with --image-opts instead",
        |a| &mut a.untrusted,
    ),
    Flag::value(
        long("object").common(),
        Value::text("DEFINITION"),
        shared::OBJECT,
        |a, definition| {
            if objects::print_help(&definition)? {
                return Err(Refusal::answered());
            }
            a.objects.push(definition);
            Ok(())
        },
    ),
    Flag::help(),
];

/// The description of the command.
pub(crate) static PAGE: Page = Page {
    path: "serve",
    about: "serve an image over NBD until Ctrl-C or SIGTERM",
    usage: "[IMAGE] [OPTIONS]",
    operands: &[Value::file("IMAGE")],
    flags: &FLAGS,
    notes: &[
        Note::Text(
            "Without IMAGE, a disk of 10 GiB in your data directory is served \
             ($XDG_DATA_HOME/oxblk/disk.qcow2). It is created if it does not exist.",
        ),
        Note::List(
            "Addresses",
            &[
                ("PATH, unix:PATH", "a Unix socket; PATH has a slash or ends in .sock"),
                (
                    "HOST:PORT, tcp:HOST:PORT, [IPV6]:PORT, PORT",
                    "TCP; without HOST this machine only, without PORT 10809",
                ),
                (
                    "nbd://HOST:PORT/NAME, nbd+unix:///NAME?socket=PATH",
                    "the same as a URI, with the name of the export",
                ),
            ],
        ),
        Note::Text(
            "The server has neither encryption nor passwords: every program that can connect can use the disk. It \
             listens for this machine only, unless an ADDRESS says otherwise; then it prints a warning.",
        ),
        Note::Text(
            "Not there yet: TLS, and the dirty bitmaps of the image as NBD metadata contexts \
             (qemu:dirty-bitmap).",
        ),
    ],
    exit_codes: &[
        (0, "stopped by a signal; the data of completed writes is on stable storage"),
        (1, "failure; a message gives the reason"),
    ],
    examples: &[
        Example {
            about: "serve an image at a Unix socket",
            arguments: "disk.qcow2 --nbd ./disk.sock",
        },
        Example {
            about: "serve an image read-only to other machines",
            arguments: "disk.qcow2 -r --nbd 0.0.0.0:10809",
        },
    ],
};

/// The parsed and checked command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) image: Option<String>,
    pub(super) addresses: Vec<Listen>,
    /// A list of options describes the image.
    pub(super) image_opts: bool,
    /// Definitions of objects that the image may refer to.
    pub(super) objects: Vec<String>,
    pub(super) format: Option<String>,
    /// Size of a new image in bytes.
    pub(super) size: Option<u64>,
    pub(super) read_only: bool,
    /// The image must not refer to other files.
    pub(super) untrusted: bool,
    pub(super) threads: usize,
    /// The value of `--export-name`.
    given_name: Option<String>,
    /// The name of the export, from `--export-name` or from a URI.
    pub(super) export_name: String,
    /// Maximum number of concurrent connections. `None`: memory and descriptors determine the limit.
    pub(super) max_connections: Option<usize>,
    pub(super) description: Option<String>,
}

impl Options {
    /// Which other files the image may refer to.
    pub(super) fn gate(&self) -> Gate {
        if self.untrusted { Gate::Nothing } else { Gate::Anything }
    }
}

/// The result of parsing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    Help,
    /// A list that an option requests has been printed.
    Answered,
    Serve(Box<Options>),
}

/// Parses the arguments after `serve`.
///
/// # Errors
/// A one-line message with the reason.
pub(super) fn parse(arguments: Vec<String>) -> Result<Parsed> {
    let mut options = Options {
        image: None,
        addresses: Vec::new(),
        image_opts: false,
        objects: Vec::new(),
        format: None,
        size: None,
        read_only: false,
        untrusted: false,
        threads: default_threads(),
        given_name: None,
        export_name: String::new(),
        max_connections: None,
        description: None,
    };
    let operands = match flags::parse(Line::new("oxblk serve", arguments), FLAGS, &mut options) {
        Ok(operands) => operands,
        Err(Stop::Help | Stop::Version) => return Ok(Parsed::Help),
        Err(Stop::Invalid(fault)) => return Err(fault.message),
        Err(Stop::Refused(refusal, _)) if refusal.answered => return Ok(Parsed::Answered),
        Err(Stop::Refused(refusal, _)) => return Err(refusal.messages.join("; ")),
    };
    let mut operands = operands.into_iter();
    options.image = operands.next();
    if let Some(extra) = operands.next() {
        return Err(format!("Unexpected argument: {extra}"));
    }
    options.export_name = one_export_name(options.given_name.as_deref(), &options.addresses)?;
    if options.read_only && options.size.is_some() {
        return Err("--size makes an image to write to; it does not go with --read-only".into());
    }
    if options.image_opts {
        if options.image.is_none() {
            return Err("--image-opts needs the image's options".into());
        }
        if options.format.is_some() || options.size.is_some() {
            return Err("--format and --size do not go with --image-opts".into());
        }
    }
    Ok(Parsed::Serve(Box::new(options)))
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(DEFAULT_THREADS)
}

fn threads(text: &str) -> Result<usize> {
    match text.parse() {
        Ok(threads) if (1..=MAX_THREADS).contains(&threads) => Ok(threads),
        _ => Err(format!("--threads must be from 1 to {MAX_THREADS}, not '{text}'")),
    }
}

fn size(text: &str) -> Result<u64> {
    match parse_size(text) {
        Ok(0) | Err(_) => Err(format!("--size must be a size such as 512M or 10G, not '{text}'")),
        Ok(size) => Ok(size),
    }
}

/// A number of connections; `None` for 0, as with `qemu-nbd --shared`.
fn connections(text: &str) -> Result<Option<usize>> {
    match text.parse() {
        Ok(connections) => Ok(Some(connections).filter(|connections| *connections > 0)),
        Err(_) => Err(format!("--max-connections must be a number, not '{text}'")),
    }
}

/// The name of the export, from `--export-name` or from the URIs. All given names must be equal.
fn one_export_name(given: Option<&str>, addresses: &[Listen]) -> Result<String> {
    let in_uris = addresses.iter().filter_map(|listen| listen.export.as_deref());
    let mut names = given.into_iter().chain(in_uris);
    let first = names.next().unwrap_or_default();
    match names.find(|name| *name != first) {
        Some(other) => Err(format!("One export cannot be named both '{first}' and '{other}'")),
        None => Ok(first.to_owned()),
    }
}

/// Checks a string against the rules of the NBD protocol: it must be UTF-8 of at most [`MAX_STRING`] bytes.
fn string(what: &str, value: String) -> Result<String> {
    if std::str::from_utf8(&names::to_bytes(&value)).is_err() {
        return Err(format!("The {what} '{value}' is not UTF-8"));
    }
    if value.len() > MAX_STRING {
        return Err(format!("The {what} is longer than {MAX_STRING} bytes"));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oxblk_ring::Address;
    use std::path::PathBuf;

    fn parsed(line: &str) -> Result<Parsed> {
        parse(line.split_whitespace().map(str::to_owned).collect())
    }

    fn options(line: &str) -> Options {
        match parsed(line) {
            Ok(Parsed::Serve(options)) => *options,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn all_options_are_parsed() {
        let options = options(
            "d.img --nbd /tmp/s --nbd localhost:10809 -f raw --size 1.5G --threads 2 \
             --export-name=x --description text",
        );
        assert_eq!(options.image.as_deref(), Some("d.img"));
        let addresses: Vec<_> = options.addresses.iter().map(|listen| &listen.address).collect();
        let tcp = Address::Tcp { host: "localhost".into(), port: 10809 };
        assert_eq!(addresses, [&Address::Unix(PathBuf::from("/tmp/s")), &tcp]);
        assert_eq!(options.format.as_deref(), Some("raw"));
        assert_eq!(options.size, Some(3 << 29));
        assert_eq!((options.threads, options.read_only), (2, false));
        assert_eq!(options.export_name, "x");
        assert_eq!(options.description.as_deref(), Some("text"));
    }

    #[test]
    fn the_connection_limit_accepts_the_option_names_of_qemu_nbd() {
        for line in ["-e 7", "--shared=7", "--max-connections 7"] {
            assert_eq!(options(line).max_connections, Some(7), "{line}");
        }
        assert_eq!(options("-e 0").max_connections, None);
    }

    #[test]
    fn a_uri_names_the_export() {
        assert_eq!(options("--nbd nbd://h/x --nbd ./s").export_name, "x");
        assert_eq!(options("--nbd nbd://h/x --export-name x").export_name, "x");
        assert_eq!(options("--nbd nbd://h/").export_name, "");
    }

    #[test]
    fn an_empty_command_line_gives_the_defaults() {
        let options = options("");
        assert_eq!(options.image, None);
        assert!((1..=DEFAULT_THREADS).contains(&options.threads));
        assert_eq!(parsed("--help"), Ok(Parsed::Help));
    }

    #[test]
    fn errors_in_the_command_line_have_one_line_messages() {
        for line in [
            "a b",
            "--frobnicate",
            "--threads 0",
            "--threads 65",
            "--threads many",
            "--size 0",
            "--size much",
            "--size -1",
            "--nbd",
            "-r --size 1G",
            "--image-opts",
            "--image-opts -f raw file.filename=a",
            "--object",
            "--max-connections -1",
            "--shared many",
            "--nbd nbd://h/x --export-name y",
            "--nbd nbd://h/x --nbd nbd://i/y",
            "--nbd myhost",
        ] {
            let message = parsed(line).unwrap_err();
            assert!(!message.is_empty() && !message.contains('\n'), "{line}: {message}");
        }
    }
}

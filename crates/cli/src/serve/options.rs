//! The command line of `oxblk serve`.

use super::Result;
use super::address::{self, Listen};
use lexopt::{Arg, Parser};
use oxblk_core::{Gate, names, parse_size};
use oxblk_nbd::proto::MAX_STRING;
use std::ffi::OsString;

/// Maximum number of I/O threads.
const MAX_THREADS: usize = 64;
/// Maximum number of I/O threads by default. The default is one for each core, up to this number.
const DEFAULT_THREADS: usize = 4;

pub(super) const HELP: &str = "\
Usage: oxblk serve [IMAGE] [OPTIONS]

Serves a disk image over NBD until Ctrl-C or SIGTERM. Without IMAGE, serves a 10 GiB disk in your
data directory ($XDG_DATA_HOME/oxblk/disk.qcow2), which is made when it is not there.

  --nbd ADDRESS       where to listen; may be given several times (default: a socket in
                      $XDG_RUNTIME_DIR, or beside the image):
                        PATH, unix:PATH         a Unix socket; PATH has a slash or ends in .sock
                        HOST:PORT, tcp:HOST:PORT, [IPV6]:PORT, PORT
                                                TCP; without HOST this machine only, without
                                                PORT 10809
                        nbd://HOST:PORT/NAME, nbd+unix:///NAME?socket=PATH
                                                the same as a URI, with the export's name
  -f, --format FMT    the image's format (default: found out by looking; raw images should be named,
                      as writes to their first sector are restricted otherwise)
  --image-opts        IMAGE is a list of options (driver=qcow2,file.filename=disk.qcow2,…)
  --untrusted         refuse an image that names other files (backing file, data file); name them
                      with --image-opts instead
  --object DEFINITION a secret that the image refers to (secret,id=NAME,file=PATH); goes with
                      --image-opts and encrypt.key-secret=NAME
  --size SIZE         make the image with this size (64M, 10G) if it does not exist
  -r, --read-only     refuse writes
  --threads N         I/O threads to spread connections over
  --export-name NAME  name of the export (clients that give none get it too)
  --description TEXT  text that clients show
  -e, --shared N, --max-connections N
                      connections at a time; further ones are refused (default: what memory and
                      the limit on open files allow; 0 means the default)
  -h, --help          this text
";

/// The parsed and checked command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) image: Option<String>,
    pub(super) addresses: Vec<Listen>,
    /// The image is described by a list of options.
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
    pub(super) export_name: String,
    /// Maximum number of connections at a time; `None`: memory and descriptors determine the limit.
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
    Serve(Box<Options>),
}

/// Parses the arguments after `serve`.
///
/// # Errors
/// A one-line message with the reason.
pub(super) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Parsed> {
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
        export_name: String::new(),
        max_connections: None,
        description: None,
    };
    let mut export_name = None;
    let mut parser = Parser::from_args(arguments);
    while let Some(argument) = parser.next().map_err(told)? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Parsed::Help),
            Arg::Short('r') | Arg::Long("read-only") => options.read_only = true,
            Arg::Short('f') | Arg::Long("format") => options.format = Some(text(&mut parser)?),
            Arg::Long("untrusted") => options.untrusted = true,
            Arg::Long("image-opts") => options.image_opts = true,
            Arg::Long("object") => options.objects.push(text(&mut parser)?),
            Arg::Long("nbd") => {
                let given = parser.value().map_err(told)?;
                options.addresses.push(address::parse(&given)?);
            }
            Arg::Long("size") => options.size = Some(size(&text(&mut parser)?)?),
            Arg::Long("threads") => options.threads = threads(&text(&mut parser)?)?,
            Arg::Long("export-name") => {
                export_name = Some(string("export name", text(&mut parser)?)?);
            }
            Arg::Long("description") => {
                options.description = Some(string("description", text(&mut parser)?)?);
            }
            Arg::Short('e') | Arg::Long("shared" | "max-connections") => {
                options.max_connections = connections(&text(&mut parser)?)?;
            }
            Arg::Value(value) if options.image.is_none() => {
                options.image = Some(names::from_os(value));
            }
            other => return Err(other.unexpected().to_string()),
        }
    }
    options.export_name = one_export_name(export_name.as_deref(), &options.addresses)?;
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

#[expect(clippy::needless_pass_by_value, reason = "made for `map_err`")]
fn told(error: lexopt::Error) -> String {
    error.to_string()
}

fn text(parser: &mut Parser) -> Result<String> {
    parser.value().map(names::from_os).map_err(told)
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

/// The name of the export: that of `--export-name` or of the URIs. All given names must be equal.
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
        parse(line.split_whitespace().map(OsString::from))
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

//! The addresses of the server: parsing, the default, and the files of Unix sockets.
//!
//! The file of a Unix socket remains when its server is killed. So if the path exists, the new server tries to connect
//! to it. If the connection is refused, the file is left over from a killed server and is replaced. If a server accepts
//! the connection, if the connection fails with another error, or if the file is not a socket, the new server does not start
//! and the file is not changed. At its end the server removes its file, unless another program has replaced the file.

use super::Result;
use oxblk::SocketFile;
use oxblk_core::names;
use oxblk_nbd::proto::DEFAULT_PORT;
use oxblk_nbd::uri::{Endpoint as UriEndpoint, NbdUri};
use oxblk_ring::{Address, Listener};
use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest path of a Unix socket, in bytes.
const MAX_PATH: usize = 107;

/// An address to listen at, as given by the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listen {
    /// The socket.
    pub(super) address: Address,
    /// Name of the export, if a URI contains one.
    pub(super) export: Option<String>,
}

/// Parses the value of `--nbd`: a URI, `unix:PATH`, `tcp:HOST:PORT`, `HOST:PORT`, a port or a path.
///
/// A name without a slash is a path only if it ends in `.sock` or `.socket`. Any other name could be a host, so no file is
/// created for it. A port alone means localhost.
///
/// # Errors
/// A one-line message with the reason.
pub(super) fn parse(given: &OsStr) -> Result<Listen> {
    let bytes = given.as_bytes();
    if let Some(path) = bytes.strip_prefix(b"unix:") {
        return unix(OsStr::from_bytes(path));
    }
    let Some(text) = given.to_str() else {
        return if bytes.contains(&b'/') { unix(given) } else { Err(ambiguous(given)) };
    };
    if text.contains("://") {
        return uri(text);
    }
    if let Some(rest) = text.strip_prefix("tcp:") {
        return tcp(rest, text);
    }
    if text.contains('/') {
        return unix(given);
    }
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number || text.contains(':') || text == "localhost" || text.parse::<IpAddr>().is_ok() {
        return tcp(text, text);
    }
    if text.ends_with(".sock") || text.ends_with(".socket") {
        return unix(given);
    }
    Err(ambiguous(given))
}

fn ambiguous(given: &OsStr) -> String {
    let name = given.display();
    if given.is_empty() {
        return "An address to listen on must not be empty".into();
    }
    format!(
        "'{name}' is no address: write './{name}' for a Unix socket, or '{name}:PORT' for a host"
    )
}

fn unix(path: &OsStr) -> Result<Listen> {
    if path.is_empty() {
        return Err("The path of a Unix socket must not be empty".into());
    }
    Ok(Listen { address: Address::Unix(path.into()), export: None })
}

fn uri(text: &str) -> Result<Listen> {
    let uri = NbdUri::parse(text).map_err(|error| format!("'{text}': {error}"))?;
    let address = match uri.endpoint {
        UriEndpoint::Unix(path) => Address::Unix(path),
        UriEndpoint::Tcp { host, port } => Address::Tcp { host, port },
    };
    Ok(Listen { address, export: Some(uri.export).filter(|name| !name.is_empty()) })
}

/// Parses `HOST:PORT`. The host or the port may be missing. `given` is the complete argument, for messages.
fn tcp(text: &str, given: &str) -> Result<Listen> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(|| invalid("host", given))?;
        let is_address = host.parse::<Ipv6Addr>().is_ok();
        let port = if rest.is_empty() { Some("") } else { rest.strip_prefix(':') };
        (host, port.filter(|_| is_address).ok_or_else(|| invalid("host", given))?)
    } else if is_number {
        ("", text)
    } else if text.parse::<Ipv6Addr>().is_ok() {
        (text, "")
    } else {
        let (host, port) = text.split_once(':').unwrap_or((text, ""));
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if !host.chars().all(legal) {
            return Err(invalid("host", given));
        }
        (host, port)
    };
    let port = match port {
        "" => DEFAULT_PORT,
        digits => digits.parse().map_err(|_| invalid("port", given))?,
    };
    let host = if host.is_empty() { "localhost" } else { host };
    Ok(Listen { address: Address::Tcp { host: host.to_owned(), port }, export: None })
}

fn invalid(what: &str, given: &str) -> String {
    format!("Invalid {what} in '{given}'")
}

/// The default address for an image: a Unix socket named after the image. The socket is in `$XDG_RUNTIME_DIR` if this is the
/// absolute path of a directory, otherwise in the directory of the image.
pub(super) fn default_for(image: &str) -> Address {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    Address::Unix(default_path(image, runtime.filter(|dir| dir.is_absolute() && dir.is_dir())))
}

fn default_path(image: &str, runtime: Option<PathBuf>) -> PathBuf {
    let path = names::to_path(image);
    let mut socket = match (runtime, path.file_stem()) {
        (Some(dir), Some(stem)) => {
            let mut name = OsString::from("oxblk-");
            name.push(stem);
            dir.join(name).into_os_string()
        }
        _ => path.into_owned().into_os_string(),
    };
    socket.push(".sock");
    socket.into()
}

/// A listening socket. Dropping it removes its file.
pub(super) struct Endpoint {
    listener: Option<Listener>,
    address: Address,
    /// The IP address and the port of a TCP socket.
    bound: Option<SocketAddr>,
    /// The socket's file.
    _file: Option<SocketFile>,
}

impl Endpoint {
    /// Starts to listen.
    ///
    /// # Errors
    /// A one-line message with the address and the reason.
    pub(super) fn bind(address: &Address) -> Result<Endpoint> {
        if let Address::Unix(path) = address {
            if path.as_os_str().len() > MAX_PATH {
                return Err(format!(
                    "Socket path '{}' is longer than {MAX_PATH} bytes; give another with --nbd",
                    path.display()
                ));
            }
            remove_leftover(path)?;
        }
        let listener = Listener::bind(address)
            .map_err(|error| format!("Cannot listen on {address}: {error}"))?;
        let bound = bound(&listener.local_address());
        let (address, file) = match address {
            Address::Unix(path) => {
                let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                (Address::Unix(absolute), SocketFile::new(path))
            }
            Address::Tcp { host, .. } => match listener.local_address() {
                // Keep the host name given by the user, because it is easier to read than the IP address.
                Address::Tcp { port, .. } => (Address::Tcp { host: host.clone(), port }, None),
                other @ Address::Unix(_) => (other, None),
            },
        };
        Ok(Endpoint { listener: Some(listener), address, bound, _file: file })
    }

    /// Returns the listener at the first call, and `None` at later calls.
    pub(super) fn take_listener(&mut self) -> Option<Listener> {
        self.listener.take()
    }

    /// The address of the socket.
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The address and the port, if other machines may be able to connect to them.
    pub(super) fn exposed(&self) -> Option<SocketAddr> {
        self.bound.filter(|bound| !bound.ip().to_canonical().is_loopback())
    }

    /// The URI with which clients on this machine connect to an export at this address.
    pub(super) fn uri(&self, export: &str) -> NbdUri {
        let endpoint = match &self.address {
            Address::Unix(path) => UriEndpoint::Unix(path.clone()),
            Address::Tcp { host, port } => {
                UriEndpoint::Tcp { host: reachable(host).to_owned(), port: *port }
            }
        };
        NbdUri { endpoint, export: export.to_owned() }
    }
}

fn bound(address: &Address) -> Option<SocketAddr> {
    match address {
        Address::Tcp { host, port } => Some(SocketAddr::new(host.parse().ok()?, *port)),
        Address::Unix(_) => None,
    }
}

/// The host to which clients on this machine connect if the server listens at `host`.
pub(super) fn reachable(host: &str) -> &str {
    match host {
        "0.0.0.0" | "::" => "localhost",
        other => other,
    }
}

/// Removes the file of a socket on which no server listens.
fn remove_leftover(path: &Path) -> Result<()> {
    let Ok(file) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !file.file_type().is_socket() {
        return Err(format!("'{}' exists and is not a socket", path.display()));
    }
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                let removed = std::fs::remove_file(path);
                return removed
                    .map_err(|error| format!("Cannot replace '{}': {error}", path.display()));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(format!("Cannot listen on '{}': {error}", path.display())),
            Ok(socket) if is_dying(&socket) => std::thread::sleep(Duration::from_millis(10)),
            Ok(_) => {
                return Err(format!("Another server listens on '{}' already", path.display()));
            }
        }
    }
}

/// Whether the peer closes the connection without sending data. The socket of a killed process may accept connections
/// until the kernel has released the io_uring of this process. Such connections are reset.
fn is_dying(mut socket: &UnixStream) -> bool {
    let _ = socket.set_read_timeout(Some(Duration::from_secs(1)));
    match socket.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn parsed(text: &str) -> Result<Listen> {
        parse(OsStr::new(text))
    }

    #[test]
    fn paths_and_hosts_are_distinguished() {
        let tcp = |host: &str, port| Address::Tcp { host: host.to_owned(), port };
        for (text, address) in [
            ("/tmp/a.sock", Address::Unix("/tmp/a.sock".into())),
            ("a.sock", Address::Unix("a.sock".into())),
            ("a.socket", Address::Unix("a.socket".into())),
            ("./a:1", Address::Unix("./a:1".into())),
            ("./10809", Address::Unix("./10809".into())),
            ("unix:a:1", Address::Unix("a:1".into())),
            ("unix:10809", Address::Unix("10809".into())),
            ("host:10810", tcp("host", 10810)),
            ("host:", tcp("host", 10809)),
            (":10810", tcp("localhost", 10810)),
            ("10810", tcp("localhost", 10810)),
            ("tcp:10810", tcp("localhost", 10810)),
            ("tcp:host:10810", tcp("host", 10810)),
            ("tcp:host", tcp("host", 10809)),
            ("localhost", tcp("localhost", 10809)),
            ("127.0.0.1", tcp("127.0.0.1", 10809)),
            ("0.0.0.0:0", tcp("0.0.0.0", 0)),
            ("::1", tcp("::1", 10809)),
            ("[::1]", tcp("::1", 10809)),
            ("[::1]:10810", tcp("::1", 10810)),
            ("tcp:[::]:10810", tcp("::", 10810)),
        ] {
            assert_eq!(parsed(text), Ok(Listen { address, export: None }), "{text}");
        }
    }

    #[test]
    fn uris_are_parsed_with_their_export_name() {
        let tcp = |host: &str, port| Address::Tcp { host: host.to_owned(), port };
        for (text, address, export) in [
            ("nbd://h", tcp("h", 10809), None),
            ("nbd://h:1/", tcp("h", 1), None),
            ("nbd://h:1/a%20b", tcp("h", 1), Some("a b")),
            ("nbd://[::1]:10810/x", tcp("::1", 10810), Some("x")),
            ("nbd+unix:///?socket=/a%20b", Address::Unix("/a b".into()), None),
            ("nbd+unix:///x?socket=rel", Address::Unix("rel".into()), Some("x")),
        ] {
            let export = export.map(str::to_owned);
            assert_eq!(parsed(text), Ok(Listen { address, export }), "{text}");
        }
    }

    #[test]
    fn an_invalid_address_is_refused_with_a_one_line_message() {
        for text in [
            "",
            "unix:",
            "myhost",
            "example.com",
            "disk",
            "host:nbd",
            "host:70000",
            "70000",
            "a b:1",
            "nbd:host:1",
            "[::1",
            "[x]:1",
            "[::1]1",
            "nbds://h/",
            "http://h/",
            "nbd+unix:///x",
            "nbd://h:x/",
            "1:2:3",
        ] {
            let message = parsed(text).unwrap_err();
            assert!(!message.contains('\n'), "{text}: {message}");
        }
        assert!(parse(OsStr::from_bytes(b"caf\xe9")).is_err());
    }

    #[test]
    fn a_path_that_is_not_utf8_is_a_path() {
        for path in [&b"./caf\xe9"[..], b"unix:caf\xe9"] {
            let Address::Unix(path) = parse(OsStr::from_bytes(path)).unwrap().address else {
                panic!()
            };
            assert!(path.as_os_str().as_bytes().ends_with(b"caf\xe9"));
        }
    }

    #[test]
    fn the_default_socket_is_named_after_the_image() {
        let runtime = Some(PathBuf::from("/run/user/1"));
        assert_eq!(
            default_path("/a/disk.qcow2", runtime),
            Path::new("/run/user/1/oxblk-disk.sock")
        );
        assert_eq!(default_path("/a/disk.qcow2", None), Path::new("/a/disk.qcow2.sock"));
    }

    #[test]
    fn a_leftover_socket_is_replaced_and_a_listening_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = Address::Unix(path.clone());
        let living = UnixListener::bind(&path).unwrap();
        let refused = Endpoint::bind(&address).err().unwrap();
        assert!(refused.contains("Another server"), "{refused}");
        drop(living);
        let endpoint = Endpoint::bind(&address).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(endpoint);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(Endpoint::bind(&Address::Unix(path.clone())).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_socket_file_of_another_program_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let endpoint = Endpoint::bind(&Address::Unix(path.clone())).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(endpoint);
        assert!(path.exists());
    }

    #[test]
    fn the_error_for_a_socket_path_that_is_too_long_names_the_limit() {
        let path = format!("/tmp/{}", "x".repeat(120));
        let message = Endpoint::bind(&Address::Unix(path.into())).err().unwrap();
        assert!(message.contains("107"), "{message}");
    }
}

//! Where to listen.
//!
//! A Unix socket is a file that stays when its server dies. So when the path is taken, a connection is
//! tried: if nobody answers, the file is a leftover and is replaced; if somebody does, or if the file
//! is no socket, it is left alone. At the end the file is removed, provided that it is still ours.

use super::Result;
use oxblk_nbd::proto::DEFAULT_PORT;
use oxblk_nbd::uri::{Endpoint as UriEndpoint, NbdUri};
use oxblk_ring::{Address, Listener};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest path of a Unix socket, in bytes.
const MAX_PATH: usize = 107;

/// Parses an address: `HOST:PORT`, `:PORT` (this machine only), `unix:PATH` or a path.
///
/// # Errors
/// A line that says what is wrong.
pub(super) fn parse(text: &str) -> Result<Address> {
    if text.is_empty() {
        return Err("an address to listen on must not be empty".into());
    }
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(Address::Unix(path.into()));
    }
    let Some((host, port)) = text.rsplit_once(':').filter(|_| !text.contains('/')) else {
        return Ok(Address::Unix(text.into()));
    };
    let port = match port {
        "" => DEFAULT_PORT,
        digits => digits.parse().map_err(|_| format!("invalid port in '{text}'"))?,
    };
    let host = match host {
        "" => "localhost",
        _ => host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host),
    };
    Ok(Address::Tcp { host: host.to_owned(), port })
}

/// Where an image is served when nothing is said: a socket named after it in `$XDG_RUNTIME_DIR`, or
/// beside it.
pub(super) fn default_for(image: &str) -> Address {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    Address::Unix(default_path(image, runtime.filter(|dir| dir.is_absolute() && dir.is_dir())))
}

fn default_path(image: &str, runtime: Option<PathBuf>) -> PathBuf {
    let path = Path::new(image);
    match (runtime, path.file_stem()) {
        (Some(dir), Some(stem)) => dir.join(format!("oxblk-{}.sock", stem.to_string_lossy())),
        _ => PathBuf::from(format!("{image}.sock")),
    }
}

/// A socket that is listened on. Dropping it removes its file.
pub(super) struct Endpoint {
    listener: Option<Listener>,
    address: Address,
    /// Device and inode of the socket's file.
    file: Option<(u64, u64)>,
}

impl Endpoint {
    /// Listens.
    ///
    /// # Errors
    /// A line that names the address and says why not.
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
        let (address, file) = match address {
            Address::Unix(path) => {
                let file = std::fs::symlink_metadata(path).ok();
                let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                (Address::Unix(absolute), file.map(|file| (file.dev(), file.ino())))
            }
            Address::Tcp { host, .. } => match listener.local_address() {
                // The name that was asked for says more than the number it stands for.
                Address::Tcp { port, .. } => (Address::Tcp { host: host.clone(), port }, None),
                other @ Address::Unix(_) => (other, None),
            },
        };
        Ok(Endpoint { listener: Some(listener), address, file })
    }

    /// The listener, once.
    pub(super) fn take_listener(&mut self) -> Option<Listener> {
        self.listener.take()
    }

    /// Where it listens.
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The URI of an export here.
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

/// A host to connect to for one to listen on.
pub(super) fn reachable(host: &str) -> &str {
    match host {
        "0.0.0.0" | "::" => "localhost",
        other => other,
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let (Address::Unix(path), Some(ours)) = (&self.address, self.file) else { return };
        let there = std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()));
        if there.is_ok_and(|there| there == ours) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes a socket on which nobody listens.
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

/// Whether the peer hangs up without a word. A killed process may leave its socket listening for a
/// moment, until the kernel has taken apart its io_uring; connections made then are reset.
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

    #[test]
    fn addresses_are_told_apart() {
        let tcp = |host: &str, port| Address::Tcp { host: host.to_owned(), port };
        for (text, address) in [
            ("/tmp/a.sock", Address::Unix("/tmp/a.sock".into())),
            ("a.sock", Address::Unix("a.sock".into())),
            ("./a:1", Address::Unix("./a:1".into())),
            ("unix:a:1", Address::Unix("a:1".into())),
            ("host:10810", tcp("host", 10810)),
            ("host:", tcp("host", 10809)),
            (":10810", tcp("localhost", 10810)),
            ("[::1]:10810", tcp("::1", 10810)),
            ("0.0.0.0:0", tcp("0.0.0.0", 0)),
        ] {
            assert_eq!(parse(text), Ok(address), "{text}");
        }
        assert!(parse("host:nbd").is_err());
        assert!(parse("host:70000").is_err());
        assert!(parse("").is_err());
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
    fn a_leftover_socket_is_replaced_and_a_living_one_is_not() {
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
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(Endpoint::bind(&Address::Unix(path.clone())).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_socket_that_another_has_put_in_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let endpoint = Endpoint::bind(&Address::Unix(path.clone())).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(endpoint);
        assert!(path.exists());
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_told_so() {
        let path = format!("/tmp/{}", "x".repeat(120));
        let message = Endpoint::bind(&Address::Unix(path.into())).err().unwrap();
        assert!(message.contains("107"), "{message}");
    }
}

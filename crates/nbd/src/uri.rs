//! NBD URIs (`doc/uri.md` of the NBD project): `nbd://host:port/export` and `nbd+unix:///export?socket=/path`.
//!
//! The parser handles user input, never the contents of an image. It refuses the TLS schemes, so that a user who
//! requests encryption never gets an unencrypted connection.

use crate::proto::{DEFAULT_PORT, MAX_STRING};
use std::ffi::OsString;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The address of a server and the name of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// The address to connect to.
    pub endpoint: Endpoint,
    /// Name of the export; empty for the default export.
    pub export: String,
}

/// The address part of a URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// TCP. The host has no brackets, also for IPv6.
    Tcp {
        /// Host name or IP address.
        host: String,
        /// Port; 10809 if the URI has none.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// The reason why a text is not a usable NBD URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UriError {
    /// The scheme is not an NBD scheme.
    Scheme(String),
    /// The scheme asks for TLS.
    Tls(String),
    /// A percent sign is not followed by two hexadecimal digits, or the export name is not UTF-8.
    Escape,
    /// The host is missing, or is neither a name nor an address (IPv6 in brackets).
    Host,
    /// The port is not a number up to 65535.
    Port(String),
    /// `nbd+unix` without `socket=`, or an empty `socket=`.
    NoSocket,
    /// An unknown query parameter, or the parameter `socket` with the scheme `nbd`.
    Parameter(String),
    /// The export name is too long or contains a NUL.
    Export,
}

impl fmt::Display for UriError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UriError::Scheme(scheme) => write!(f, "'{scheme}' is not an NBD URI scheme"),
            UriError::Tls(scheme) => write!(f, "TLS ('{scheme}') is not supported"),
            UriError::Escape => f.write_str("invalid percent-encoding in NBD URI"),
            UriError::Host => f.write_str("NBD URI has no valid host"),
            UriError::Port(port) => write!(f, "invalid port '{port}' in NBD URI"),
            UriError::NoSocket => f.write_str("NBD URI needs the parameter 'socket'"),
            UriError::Parameter(name) => write!(f, "unknown parameter '{name}' in NBD URI"),
            UriError::Export => f.write_str("invalid export name in NBD URI"),
        }
    }
}

impl std::error::Error for UriError {}

impl NbdUri {
    /// Parses a URI.
    ///
    /// # Errors
    /// The reason why the text is not a usable NBD URI.
    pub fn parse(uri: &str) -> Result<NbdUri, UriError> {
        let (scheme, rest) =
            uri.split_once("://").ok_or_else(|| UriError::Scheme(uri.to_owned()))?;
        let unix = match scheme {
            "nbd" => false,
            "nbd+unix" => true,
            "nbds" | "nbds+unix" => return Err(UriError::Tls(scheme.to_owned())),
            other => return Err(UriError::Scheme(other.to_owned())),
        };
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = String::from_utf8(unescape(path)?).map_err(|_| UriError::Escape)?;
        if export.len() > MAX_STRING || export.contains('\0') {
            return Err(UriError::Export);
        }
        let socket = parse_query(query)?;
        let endpoint = match (unix, socket) {
            (true, Some(socket)) => Endpoint::Unix(PathBuf::from(OsString::from_vec(socket))),
            (true, None) => return Err(UriError::NoSocket),
            (false, Some(_)) => return Err(UriError::Parameter("socket".to_owned())),
            (false, None) => parse_authority(authority)?,
        };
        Ok(NbdUri { endpoint, export })
    }
}

/// Parses the query; only `socket` is supported.
fn parse_query(query: &str) -> Result<Option<Vec<u8>>, UriError> {
    let mut socket = None;
    for parameter in query.split(['&', ';']).filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match name {
            "socket" if !value.is_empty() => socket = Some(unescape(value)?),
            "socket" => return Err(UriError::NoSocket),
            other => return Err(UriError::Parameter(other.to_owned())),
        }
    }
    Ok(socket)
}

fn parse_authority(authority: &str) -> Result<Endpoint, UriError> {
    let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = if let Some(bracketed) = host_port.strip_prefix('[') {
        let (host, after) = bracketed.split_once(']').ok_or(UriError::Host)?;
        if host.parse::<Ipv6Addr>().is_err() {
            return Err(UriError::Host);
        }
        match after.strip_prefix(':') {
            Some(port) => (host, port),
            None if after.is_empty() => (host, ""),
            None => return Err(UriError::Host),
        }
    } else {
        let (host, port) = host_port.split_once(':').unwrap_or((host_port, ""));
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if host.is_empty() || !host.chars().all(legal) {
            return Err(UriError::Host);
        }
        (host, port)
    };
    let port = match port {
        "" => DEFAULT_PORT,
        digits => digits.parse().map_err(|_| UriError::Port(digits.to_owned()))?,
    };
    Ok(Endpoint::Tcp { host: host.to_owned(), port })
}

fn unescape(text: &str) -> Result<Vec<u8>, UriError> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|digit| char::from(digit).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else { return Err(UriError::Escape) };
        out.push(u8::try_from(high * 16 + low).map_err(|_| UriError::Escape)?);
    }
    Ok(out)
}

fn escape(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for &byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                write!(f, "{}", char::from(byte))?;
            }
            other => write!(f, "%{other:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "nbd://[{host}]")?;
                } else {
                    write!(f, "nbd://{host}")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                escape(f, self.export.as_bytes())
            }
            Endpoint::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                escape(f, self.export.as_bytes())?;
                f.write_str("?socket=")?;
                escape(f, path.as_os_str().as_bytes())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        let endpoint = Endpoint::Tcp { host: host.to_owned(), port };
        NbdUri { endpoint, export: export.to_owned() }
    }

    fn unix(path: &str, export: &str) -> NbdUri {
        NbdUri { endpoint: Endpoint::Unix(PathBuf::from(path)), export: export.to_owned() }
    }

    #[test]
    fn the_examples_of_the_specification_are_parsed() {
        for (uri, expected) in [
            ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
            ("nbd+unix:///disk?socket=sock", unix("sock", "disk")),
            ("nbd://example.com/", tcp("example.com", 10809, "")),
            ("nbd://example.com", tcp("example.com", 10809, "")),
            ("nbd://example.com//disk", tcp("example.com", 10809, "/disk")),
            ("nbd://example.com/hello%20world", tcp("example.com", 10809, "hello world")),
            ("nbd://[::1]:10810/x", tcp("::1", 10810, "x")),
            ("nbd+unix:///?socket=%00/abstract", unix("\0/abstract", "")),
        ] {
            assert_eq!(NbdUri::parse(uri), Ok(expected), "{uri}");
        }
    }

    #[test]
    fn a_printed_uri_parses_to_the_same_value() {
        for uri in [
            tcp("h", 1, "a b%c"),
            tcp("::1", 10809, ""),
            unix("/run/a b?.sock", "ünicode/x"),
            unix("/x", ""),
        ] {
            assert_eq!(NbdUri::parse(&uri.to_string()), Ok(uri));
        }
    }

    #[test]
    fn invalid_uris_are_refused_with_the_reason() {
        for (uri, error) in [
            ("http://x/", UriError::Scheme("http".to_owned())),
            ("disk.img", UriError::Scheme("disk.img".to_owned())),
            ("nbds://x/", UriError::Tls("nbds".to_owned())),
            ("nbd+unix:///x", UriError::NoSocket),
            ("nbd+unix:///x?socket=", UriError::NoSocket),
            ("nbd:///x", UriError::Host),
            ("nbd://[[x]/", UriError::Host),
            ("nbd://a b/", UriError::Host),
            ("nbd://h:99999/x", UriError::Port("99999".to_owned())),
            ("nbd://h/%4", UriError::Escape),
            ("nbd://h/%zz", UriError::Escape),
            ("nbd://h/%00", UriError::Export),
            ("nbd://h/?tls-type=anon", UriError::Parameter("tls-type".to_owned())),
        ] {
            assert_eq!(NbdUri::parse(uri), Err(error), "{uri}");
        }
    }
}

//! File names: schemes, protocols, `json:`, and names relative to the image that contains them.

use serde_json::Map;

use super::Graph;
use crate::driver::DriverFactory;
use crate::{Error, Options, Result};

/// The scheme of a file name: the part before the first colon, if that part is not empty and contains no slash.
pub(crate) fn scheme(filename: &str) -> Option<&str> {
    let (scheme, _) = filename.split_once(':')?;
    if scheme.is_empty() || scheme.contains('/') { None } else { Some(scheme) }
}

/// Protocols and filters of QEMU that this library does not support yet.
const ABSENT: &[&str] = &[
    "ftp", "ftps", "gluster", "http", "https", "iscsi", "nbd", "nfs", "nvme", "rbd", "ssh", "vvfat",
];

/// The error for a protocol that is unknown or not supported yet.
pub(super) fn no_protocol(name: &str) -> Error {
    if ABSENT.contains(&name.split('+').next().unwrap_or(name)) {
        return Error::unsupported(format!("The protocol '{name}' is not supported yet"));
    }
    Error::invalid(format!("Unknown protocol '{name}'"))
}

/// The error for a driver that is unknown or not supported yet.
pub(super) fn no_driver(name: &str) -> Error {
    if ABSENT.contains(&name) {
        return Error::unsupported(format!("The driver '{name}' is not supported yet"));
    }
    Error::invalid(format!("Unknown driver '{name}'"))
}

impl Graph {
    /// The protocol driver for a file name, and the options to which the driver converts the name.
    ///
    /// # Errors
    /// When the scheme is unknown or the name is malformed.
    pub fn protocol_for(&self, filename: &str) -> Result<(&'static dyn DriverFactory, Options)> {
        let protocols = || self.drivers().iter().filter(|d| d.is_protocol());
        if let Some(scheme) = scheme(filename) {
            let bare = scheme.split('+').next().unwrap_or(scheme);
            let found =
                protocols().find(|d| d.schemes().contains(&scheme) || d.schemes().contains(&bare));
            let driver = found.ok_or_else(|| no_protocol(scheme))?;
            return Ok((*driver, driver.parse_filename(filename)?));
        }
        let driver = self.protocol_for_path(filename)?;
        Ok((driver, driver.parse_filename(filename)?))
    }

    /// The protocol driver for a path. A scheme has no meaning in a path.
    pub(super) fn protocol_for_path(&self, path: &str) -> Result<&'static dyn DriverFactory> {
        let protocols = self.drivers().iter().filter(|driver| driver.is_protocol());
        let scored = protocols.map(|driver| (driver.probe_path(path), *driver));
        let best = scored.filter(|(score, _)| *score > 0).max_by_key(|(score, _)| *score);
        match best {
            Some((_, driver)) => Ok(driver),
            None => self.driver("file"),
        }
    }

    /// The options that describe the image with this file name and format. A parent can use these options for its
    /// child.
    ///
    /// # Errors
    /// The errors of [`Self::protocol_for`], and when a `json:` name or the format is not valid.
    pub fn described(&self, filename: &str, format: Option<&str>) -> Result<Options> {
        let mut options = match filename.strip_prefix("json:") {
            Some(json) => Options::from_json(json)?,
            None => {
                let (protocol, mut file) = self.protocol_for(filename)?;
                file.insert("driver", protocol.name());
                let is_format = match format {
                    Some(format) => !self.driver(format)?.is_protocol(),
                    None => true,
                };
                if is_format {
                    Options::from_map(Map::from_iter([("file".to_owned(), file.to_json())]))?
                } else {
                    file
                }
            }
        };
        if let Some(format) = format {
            options.insert("driver", format);
        }
        Ok(options)
    }
}

/// Resolves `name` relative to the directory of the image `base` that contains the name. An absolute name, and a name
/// with a scheme, stay unchanged. The same applies to all names if `base` has another scheme than `file:`.
pub fn relative_to(base: &str, name: &str) -> String {
    if name.starts_with('/') || scheme(name).is_some() {
        return name.to_owned();
    }
    let (prefix, path) = match scheme(base) {
        Some("file") => base.split_at(5),
        Some(_) => return name.to_owned(),
        None => ("", base),
    };
    match path.rfind('/') {
        Some(slash) => {
            let dir = path.get(..=slash).unwrap_or_default();
            format!("{prefix}{dir}{name}")
        }
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn a_name_in_an_image_is_relative_to_the_image() {
        assert_eq!(relative_to("/a/b.qcow2", "c.raw"), "/a/c.raw");
        assert_eq!(relative_to("b.qcow2", "c.raw"), "c.raw");
        assert_eq!(relative_to("x/b.qcow2", "/c.raw"), "/c.raw");
    }

    #[test]
    fn an_unsupported_protocol_is_distinguished_from_an_unknown_one() {
        assert_eq!(no_protocol("nbd+unix").kind(), ErrorKind::Unsupported);
        assert_eq!(no_protocol("x").to_string(), "Unknown protocol 'x'");
        assert_eq!(no_driver("ssh").kind(), ErrorKind::Unsupported);
    }
}

//! File names: schemes, protocols, `json:`, and names relative to the image that mentions them.

use super::Graph;
use crate::driver::{DriverFactory, DriverKind};
use crate::{Error, Options, Result};

/// What an image may name as its backing or data file. A name inside an image comes from whoever made
/// the image; by default only plain paths are followed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackingPolicy {
    /// Schemes that are followed besides plain paths and `file:`.
    pub schemes: Vec<String>,
}

/// The scheme of a file name: what stands before the first colon, if no slash comes earlier.
pub(crate) fn scheme(filename: &str) -> Option<&str> {
    let (scheme, _) = filename.split_once(':')?;
    if scheme.is_empty() || scheme.contains('/') { None } else { Some(scheme) }
}

impl BackingPolicy {
    /// Refuses a name found inside an image unless it is a path or of a scheme allowed.
    ///
    /// # Errors
    /// Names the name and what allows it.
    pub fn check(&self, filename: &str) -> Result<()> {
        match scheme(filename) {
            None | Some("file") => Ok(()),
            Some(scheme) if self.schemes.iter().any(|allowed| allowed == scheme) => Ok(()),
            Some(scheme) => Err(Error::invalid(format!(
                "The image names '{filename}', which is not a plain path; the scheme '{scheme}' is not allowed here"
            ))
            .with_hint("Name the file yourself with backing.driver=..., or backing=null to open without it.")),
        }
    }
}

impl Graph {
    /// The protocol driver for a file name, and the options that the name stands for.
    ///
    /// # Errors
    /// When the scheme is unknown or the name malformed.
    pub fn protocol_for(&self, filename: &str) -> Result<(&'static dyn DriverFactory, Options)> {
        let protocols = || self.drivers().iter().filter(|d| d.kind() == DriverKind::Protocol);
        if let Some(scheme) = scheme(filename) {
            let bare = scheme.split('+').next().unwrap_or(scheme);
            let found =
                protocols().find(|d| d.schemes().contains(&scheme) || d.schemes().contains(&bare));
            let driver =
                found.ok_or_else(|| Error::invalid(format!("Unknown protocol '{scheme}'")))?;
            return Ok((*driver, driver.parse_filename(filename)?));
        }
        let scored = protocols().map(|driver| (driver.probe_path(filename), *driver));
        let best = scored.filter(|(score, _)| *score > 0).max_by_key(|(score, _)| *score);
        let driver = match best {
            Some((_, driver)) => driver,
            None => self.driver("file")?,
        };
        Ok((driver, driver.parse_filename(filename)?))
    }
}

/// `name`, taken relative to the directory of the image `base` that mentions it.
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

    #[test]
    fn a_name_in_an_image_is_relative_to_the_image() {
        assert_eq!(relative_to("/a/b.qcow2", "c.raw"), "/a/c.raw");
        assert_eq!(relative_to("b.qcow2", "c.raw"), "c.raw");
        assert_eq!(relative_to("x/b.qcow2", "/c.raw"), "/c.raw");
    }

    #[test]
    fn an_image_may_not_choose_a_protocol() {
        let policy = BackingPolicy::default();
        assert!(policy.check("plain/path").is_ok());
        assert!(policy.check("./odd:name").is_ok());
        for name in ["nbd://localhost", "json:{}", "nfs:x", "http://x"] {
            assert!(policy.check(name).is_err(), "{name}");
        }
    }
}

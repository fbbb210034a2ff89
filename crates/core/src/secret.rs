//! Secrets: passwords and keys. Images and other secrets refer to a secret by an identifier.
//!
//! The user defines secrets (`--object secret,…`) before images are opened. The block layer looks secrets up when it
//! opens or creates an image. The bytes of a secret are wiped when the secret is dropped, and this module never prints
//! the bytes.

use std::collections::HashMap;
use std::fmt;
use std::io::Read as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_crypto::secret::{Form, Secret, Wrapping, decode};

use crate::{Error, Objects, Options, Result, names, strerror};

/// Maximum size, in bytes, of a file that contains a secret.
const MAX_FILE: u64 = 1 << 20;

/// All secrets of one program. Clones refer to the same set.
#[derive(Clone, Default)]
pub struct Secrets(Arc<Mutex<HashMap<String, Secret>>>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

impl Secrets {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Secret>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a secret with this identifier.
    pub fn contains(&self, id: &str) -> bool {
        self.lock().contains_key(id)
    }

    /// Adds a secret.
    ///
    /// # Errors
    /// When the identifier is already in use. The message has the wording of QEMU's tools.
    pub fn add(&self, id: &str, secret: Secret) -> Result<()> {
        let mut secrets = self.lock();
        if secrets.contains_key(id) {
            return Err(Objects::duplicate(id));
        }
        secrets.insert(id.to_owned(), secret);
        Ok(())
    }

    /// Adds a secret from its description in QAPI's `SecretProperties`: `data` or `file`, `format`, and, if the secret
    /// is encrypted with another secret, `keyid` and `iv`. A file is read immediately.
    ///
    /// # Errors
    /// When the description is wrong, the identifier is in use, there is no secret `keyid`, the file cannot be read or
    /// is too long, or the bytes cannot be decoded. If QEMU has the same error, the message has the wording of QEMU's
    /// tools.
    pub fn define(&self, id: &str, mut options: Options) -> Result<()> {
        let (data, file) = (options.take_str("data")?, options.take_str("file")?);
        let form = match options.take_str("format")?.as_deref() {
            None | Some("raw") => Form::Raw,
            Some("base64") => Form::Base64,
            Some(other) => {
                let text = format!("Parameter 'format' does not accept value '{other}'");
                return Err(Error::invalid(text));
            }
        };
        let (keyid, iv) = (options.take_str("keyid")?, options.take_str("iv")?);
        if let Some(key) = options.keys().next() {
            return Err(Error::invalid(format!("Parameter '{key}' is unexpected")));
        }
        let given = match (data, file) {
            (Some(data), None) => Secret::new(names::to_bytes(&data).into_owned()),
            (None, Some(file)) => read_file(&file)?,
            (None, None) => {
                return Err(Error::invalid("Either 'file' or 'data' must be provided"));
            }
            (Some(_), Some(_)) => {
                return Err(Error::invalid("'file' and 'data' are mutually exclusive"));
            }
        };
        let secret = match keyid {
            None => decode(given, form, None)?,
            Some(keyid) => {
                let key = self.get(&keyid)?;
                let iv = iv.ok_or_else(|| Error::invalid("IV is required to decrypt secret"))?;
                decode(given, form, Some(&Wrapping { key: &key, iv: &iv }))?
            }
        };
        self.add(id, secret)
    }

    /// The secret with this identifier.
    ///
    /// # Errors
    /// When there is no such secret.
    pub fn get(&self, id: &str) -> Result<Secret> {
        let found = self.lock().get(id).cloned();
        found.ok_or_else(|| Error::invalid(format!("No secret with id '{id}'")))
    }

    /// The secret with this identifier. The secret must be UTF-8 text.
    ///
    /// # Errors
    /// When there is no such secret, or the secret is not UTF-8.
    pub fn password(&self, id: &str) -> Result<Secret> {
        let secret = self.get(id)?;
        if std::str::from_utf8(&secret).is_err() {
            return Err(Error::invalid(format!("Data from secret {id} is not valid UTF-8")));
        }
        Ok(secret)
    }
}

fn read_file(name: &str) -> Result<Secret> {
    let unreadable = |what: &str, error: &std::io::Error| {
        let reason = strerror(error.raw_os_error().unwrap_or(0));
        let text = format!(
            "Unable to read {name}: Failed to {what} file \u{201c}{name}\u{201d}: {reason}"
        );
        Error::invalid(text)
    };
    let file =
        std::fs::File::open(names::to_path(name)).map_err(|error| unreadable("open", &error))?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_FILE.saturating_add(1)).read_to_end(&mut bytes);
    let secret = Secret::new(bytes);
    read.map_err(|error| unreadable("read from", &error))?;
    if u64::try_from(secret.len()).is_ok_and(|len| len > MAX_FILE) {
        return Err(Error::invalid(format!("Unable to read {name}: it is too long for a secret")));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn define(secrets: &Secrets, text: &str) -> std::result::Result<(), String> {
        let mut options = Options::from_dotted(text, None).unwrap();
        let id = options.take_str("id").unwrap().unwrap();
        secrets.define(&id, options).map_err(|error| error.to_string())
    }

    #[test]
    fn a_secret_needs_exactly_one_source() {
        let secrets = Secrets::default();
        define(&secrets, "id=s,data=abc").unwrap();
        assert_eq!(&*secrets.get("s").unwrap(), b"abc");
        let wrong = |text| define(&secrets, text).unwrap_err();
        assert_eq!(wrong("id=t"), "Either 'file' or 'data' must be provided");
        assert_eq!(wrong("id=t,data=x,file=y"), "'file' and 'data' are mutually exclusive");
        assert_eq!(wrong("id=t,data=x,bogus=1"), "Parameter 'bogus' is unexpected");
        assert_eq!(
            wrong("id=s,data=x"),
            "attempt to add duplicate property 's' to object (type 'container')"
        );
        assert_eq!(wrong("id=t,data=x,format=y"), "Parameter 'format' does not accept value 'y'");
        assert_eq!(secrets.get("t").unwrap_err().to_string(), "No secret with id 't'");
    }

    #[test]
    fn an_encrypted_secret_is_decrypted_with_the_secret_of_its_keyid() {
        let secrets = Secrets::default();
        // AES-256-CBC of "abc" under 32 bytes of 1 and an IV of 2.
        define(&secrets, "id=k,format=base64,data=AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=")
            .unwrap();
        define(
            &secrets,
            "id=s,format=base64,keyid=k,iv=AgICAgICAgICAgICAgICAg==,data=MwrSmU5PR5fx5IvS/6JXVg==",
        )
        .unwrap();
        assert_eq!(&*secrets.password("s").unwrap(), b"abc");
        let wrong = |text| define(&secrets, text).unwrap_err();
        assert_eq!(wrong("id=t,data=x,keyid=k"), "IV is required to decrypt secret");
        assert_eq!(wrong("id=t,data=x,keyid=q"), "No secret with id 'q'");
        assert_eq!(wrong("id=t,data=x,keyid=k,iv=YWJj"), "IV should be 16 bytes in length not 3");
        assert_eq!(
            wrong("id=t,data=x,keyid=s,iv=AgICAgICAgICAgICAgICAg=="),
            "Key should be 32 bytes in length"
        );
    }

    #[test]
    fn a_password_is_text_and_no_secret_is_printed() {
        let secrets = Secrets::default();
        define(&secrets, "id=b,format=base64,data=//4=").unwrap();
        assert_eq!(
            secrets.password("b").unwrap_err().to_string(),
            "Data from secret b is not valid UTF-8"
        );
        assert_eq!(format!("{secrets:?}"), r#"{"b"}"#);
    }
}

//! Definitions of objects to which images may refer, in the syntax of the option `--object` of QEMU's tools.
//!
//! Only secrets and throttle groups have an effect. For objects of other types, only the type and the identifier are checked.

use oxblk_core::{Error, Objects, Options, Result};
use oxblk_filters::throttle::{Group, GroupLimits};

/// The object types of QEMU's tools.
const TYPES: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "main-loop",
    "secret",
    "secret_keyring",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// The hint in an error about an identifier.
const IDENTIFIER_HINT: &str =
    "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";

/// Processes an object definition: an option string such as `secret,id=NAME,file=PATH`, or JSON. A secret or a throttle
/// group is added to `objects`.
///
/// # Errors
/// If the definition is invalid, or if the secret cannot be read.
pub fn define_object(objects: &Objects, definition: &str) -> Result<()> {
    let mut options = if definition.starts_with('{') {
        Options::from_json(definition)?
    } else {
        Options::from_keyval(definition, "qom-type")?
    };
    let text = |key: &str, options: &mut Options| options.take_str(key).ok().flatten();
    let Some(kind) = text("qom-type", &mut options) else {
        return Err(Error::invalid("Parameter 'qom-type' is missing"));
    };
    if !TYPES.contains(&kind.as_str()) {
        let message = format!("Parameter 'qom-type' does not accept value '{kind}'");
        return Err(Error::invalid(message));
    }
    let Some(id) = text("id", &mut options) else {
        return Err(Error::invalid("Parameter 'id' is missing"));
    };
    check_identifier(&id)?;
    match kind.as_str() {
        "secret" if objects.contains(&id) => Err(Objects::duplicate(&id)),
        "secret" => objects.secrets().define(&id, options),
        "throttle-group" => {
            let limits = GroupLimits::take(&mut options)?;
            if let Some(key) = options.first_key() {
                return Err(Error::invalid(format!("Parameter '{key}' is unexpected")));
            }
            objects.add(&id, Group::new(&id, limits))
        }
        _ => Ok(()),
    }
}

/// Checks whether a text is a valid identifier of an object.
///
/// # Errors
/// If the identifier is not valid. The hint of the error contains the rules.
pub fn check_identifier(text: &str) -> Result<()> {
    let is_valid = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if is_valid {
        return Ok(());
    }
    Err(Error::invalid("Parameter 'id' expects an identifier").with_hint(IDENTIFIER_HINT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn define(definition: &str) -> Result<(), String> {
        define_object(&Objects::default(), definition).map_err(|error| error.to_string())
    }

    #[test]
    fn only_known_types_are_accepted() {
        assert_eq!(define("secret,id=s0,data=abc"), Ok(()));
        assert_eq!(define(r#"{"qom-type":"secret","id":"s0","data":"x"}"#), Ok(()));
        assert_eq!(
            define("bogus,id=s0").unwrap_err(),
            "Parameter 'qom-type' does not accept value 'bogus'"
        );
        assert_eq!(define("secret,data=abc").unwrap_err(), "Parameter 'id' is missing");
    }

    #[test]
    fn an_identifier_starts_with_a_letter() {
        assert_eq!(define("main-loop,id=a-b.c_0"), Ok(()));
        for id in ["0a", "-a", "a b", "ä"] {
            let error = check_identifier(id).unwrap_err();
            assert_eq!(error.to_string(), "Parameter 'id' expects an identifier", "{id}");
            assert_eq!(error.hint(), Some(IDENTIFIER_HINT));
        }
    }

    #[test]
    fn a_secret_is_kept_under_its_identifier() {
        let objects = Objects::default();
        let secrets = objects.secrets();
        define_object(&objects, "secret,id=s0,data=a,,b").unwrap();
        assert_eq!(&*secrets.get("s0").unwrap(), b"a,b");
        assert!(define_object(&objects, "secret,id=s1,data=x,bogus=1").is_err());
    }
}

//! `--object`: objects that images may refer to. The process has one set of secrets for all images that it opens. For
//! objects of other types, only the type and the identifier are checked.

use std::sync::OnceLock;

use oxblk_core::{Options, Secrets};

use crate::text::option_list::{IDENTIFIER_HINT, is_identifier};

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

/// The secrets defined on the command line.
pub(crate) fn secrets() -> &'static Secrets {
    static SECRETS: OnceLock<Secrets> = OnceLock::new();
    SECRETS.get_or_init(Secrets::default)
}

/// Processes one object definition.
///
/// # Errors
/// The message to print.
pub(crate) fn define(definition: &str) -> Result<(), String> {
    define_in(secrets(), definition)
}

fn define_in(secrets: &Secrets, definition: &str) -> Result<(), String> {
    let options = if definition.starts_with('{') {
        Options::from_json(definition)
    } else {
        Options::from_keyval(definition, "qom-type")
    };
    let mut options = options.map_err(|error| error.to_string())?;
    let text = |key: &str, options: &mut Options| options.take_str(key).ok().flatten();
    let Some(kind) = text("qom-type", &mut options) else {
        return Err("Parameter 'qom-type' is missing".to_owned());
    };
    if !TYPES.contains(&kind.as_str()) {
        return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
    }
    let Some(id) = text("id", &mut options) else {
        return Err("Parameter 'id' is missing".to_owned());
    };
    if !is_identifier(&id) {
        return Err(format!("Parameter 'id' expects an identifier\n{IDENTIFIER_HINT}"));
    }
    if kind != "secret" {
        return Ok(());
    }
    secrets.define(&id, options).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn define(definition: &str) -> Result<(), String> {
        define_in(&Secrets::default(), definition)
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
    fn a_secret_is_kept_under_its_identifier() {
        let secrets = Secrets::default();
        define_in(&secrets, "secret,id=s0,data=a,,b").unwrap();
        assert_eq!(&*secrets.get("s0").unwrap(), b"a,b");
        assert!(define_in(&secrets, "secret,id=s1,data=x,bogus=1").is_err());
    }
}

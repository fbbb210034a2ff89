//! `--object`: objects that images may refer to (secrets). They are checked and accepted; nothing of
//! this version uses them.

use oxblk_core::Options;

/// Types that exist in QEMU's tools.
const TYPES: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "iothread",
    "main-loop",
    "secret",
    "secret_keyring",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// Checks one object definition.
///
/// # Errors
/// The message to print.
pub(crate) fn check(definition: &str) -> Result<(), String> {
    let options = if definition.trim_start().starts_with('{') {
        Options::from_json(definition)
    } else {
        Options::from_dotted(definition, Some("qom-type"))
    };
    let options = options.map_err(|error| error.to_string())?;
    let Some(kind) = options.get_str("qom-type") else {
        return Err("Parameter 'qom-type' is missing".to_owned());
    };
    if !TYPES.contains(&kind) {
        return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
    }
    if options.get_str("id").is_none() {
        return Err("Parameter 'id' is missing".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn only_known_types_are_accepted() {
        assert_eq!(check("secret,id=s0,data=abc"), Ok(()));
        assert_eq!(check(r#"{"qom-type":"secret","id":"s0"}"#), Ok(()));
        assert_eq!(
            check("bogus,id=s0").unwrap_err(),
            "Parameter 'qom-type' does not accept value 'bogus'"
        );
        assert_eq!(check("secret,data=abc").unwrap_err(), "Parameter 'id' is missing");
    }
}

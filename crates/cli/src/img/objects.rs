//! `--object`: objects that images may refer to (secrets). They are checked as far as the tools check them
//! at once, and accepted; nothing of this version uses them.

use oxblk_core::{Options, strerror};

/// Types that exist in QEMU's tools.
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

/// What a secret may have.
const SECRET: &[&str] = &["qom-type", "id", "data", "file", "format", "iv", "keyid"];

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
    let mut options = options.map_err(|error| error.to_string())?;
    let Some(kind) = options.get_str("qom-type").map(str::to_owned) else {
        return Err("Parameter 'qom-type' is missing".to_owned());
    };
    if !TYPES.contains(&kind.as_str()) {
        return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
    }
    let Some(id) = options.get_str("id") else {
        return Err("Parameter 'id' is missing".to_owned());
    };
    if !is_identifier(id) {
        return Err(
            "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, \
                    '-', '.', '_', starting with a letter."
                .to_owned(),
        );
    }
    if kind == "secret" { check_secret(&mut options) } else { Ok(()) }
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// A secret has data or a file that can be read.
fn check_secret(options: &mut Options) -> Result<(), String> {
    if let Some(key) = options.keys().find(|key| !SECRET.contains(key)) {
        return Err(format!("Parameter '{key}' is unexpected"));
    }
    match (options.get_str("data"), options.get_str("file")) {
        (None, None) => Err("Either 'file' or 'data' must be provided".to_owned()),
        (Some(_), Some(_)) => Err("'file' and 'data' are mutually exclusive".to_owned()),
        (Some(_), None) => Ok(()),
        (None, Some(file)) => std::fs::File::open(file).map(drop).map_err(|error| {
            let reason = strerror(error.raw_os_error().unwrap_or(0));
            format!("Unable to read {file}: Failed to open file \u{201c}{file}\u{201d}: {reason}")
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn only_known_types_are_accepted() {
        assert_eq!(check("secret,id=s0,data=abc"), Ok(()));
        assert_eq!(check(r#"{"qom-type":"secret","id":"s0","data":"x"}"#), Ok(()));
        assert_eq!(
            check("bogus,id=s0").unwrap_err(),
            "Parameter 'qom-type' does not accept value 'bogus'"
        );
        assert_eq!(check("secret,data=abc").unwrap_err(), "Parameter 'id' is missing");
    }

    #[test]
    fn a_secret_says_where_it_comes_from() {
        assert_eq!(check("secret,id=s0").unwrap_err(), "Either 'file' or 'data' must be provided");
        assert_eq!(
            check("secret,id=s0,data=x,bogus=1").unwrap_err(),
            "Parameter 'bogus' is unexpected"
        );
    }
}

//! Definitions of objects to which images may refer, in the syntax of the option `--object` of QEMU's tools.
//!
//! Only secrets and throttle groups have an effect. For objects of other types, only the type and the identifier are checked.

use oxblk_core::{Error, Objects, Options, Result, parse_json};
use oxblk_filters::throttle::{Group, GroupLimits, KINDS, Notation};
use serde_json::Value;

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

/// The option that contains the type of an object.
const TYPE: &str = "qom-type";

const SECRET_PROPERTIES: &[&str] = &[
    "data=<string>",
    "file=<string>",
    "format=<QCryptoSecretFormat>",
    "iv=<string>",
    "keyid=<string>",
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
    let mut dotted = None;
    let (mut options, notation) = if is_json(definition) {
        dotted = dotted_key(&parse_json(definition)?);
        (Options::from_json(definition)?, Notation::Json)
    } else {
        (Options::from_keyval(definition, TYPE)?, Notation::KeyValue)
    };
    let text = |key: &str, options: &mut Options| options.take_str(key).ok().flatten();
    let Some(kind) = text(TYPE, &mut options) else {
        return Err(Error::invalid("Parameter 'qom-type' is missing"));
    };
    if !TYPES.contains(&kind.as_str()) {
        let message = format!("Parameter 'qom-type' does not accept value '{kind}'");
        return Err(Error::invalid(message));
    }
    let Some(id) = text("id", &mut options) else {
        return Err(Error::invalid("Parameter 'id' is missing"));
    };
    if let Some(key) = dotted {
        return Err(Error::invalid(format!("Parameter '{key}' is unexpected")));
    }
    check_identifier(&id)?;
    match kind.as_str() {
        "secret" if objects.contains(&id) => Err(Objects::duplicate(&id)),
        "secret" => objects.secrets().define(&id, options),
        "throttle-group" => {
            let limits = GroupLimits::take(&mut options, notation)?;
            if let Some(key) = options.first_key() {
                return Err(Error::invalid(format!("Parameter '{key}' is unexpected")));
            }
            objects.add(&id, Group::new(&id, limits))
        }
        _ => Ok(()),
    }
}

/// The list that a definition requests with the word `help`, for example `help` or `secret,help`: the properties of the type, or
/// the types that have an effect. `None`: the definition requests no list.
///
/// # Errors
/// If the definition is malformed.
pub fn object_help(definition: &str) -> Result<Option<String>> {
    if is_json(definition) {
        return Ok(None);
    }
    let (options, true) = Options::from_keyval_or_help(definition, TYPE)? else {
        return Ok(None);
    };
    let list = |title: &str, lines: &[String]| {
        let lines: String = lines.iter().map(|line| format!("  {line}\n")).collect();
        Ok(Some(format!("{title}:\n{lines}")))
    };
    let properties: Vec<String> = match options.get_str(TYPE) {
        Some("secret") => SECRET_PROPERTIES.iter().map(ToString::to_string).collect(),
        Some("throttle-group") => throttle_group_properties(),
        _ => {
            let types = ["secret", "throttle-group"].map(str::to_owned);
            return list("List of user creatable objects", &types);
        }
    };
    let kind = options.get_str(TYPE).unwrap_or_default();
    list(&format!("{kind} options"), &properties)
}

fn throttle_group_properties() -> Vec<String> {
    let ends = ["", "-max", "-max-length"];
    let limits = KINDS.iter().flat_map(|kind| ends.map(|end| format!("x-{kind}{end}=<int>")));
    let mut properties: Vec<String> = limits.chain(["x-iops-size=<int>".to_owned()]).collect();
    properties.sort();
    properties.insert(0, "limits=<ThrottleLimits>".to_owned());
    properties
}

/// The path of the first member whose name contains a dot. In JSON, such a member is no nested object.
fn dotted_key(value: &Value) -> Option<String> {
    let members = value.as_object()?.iter();
    members.into_iter().find_map(|(key, value)| match key.contains('.') {
        true => Some(key.clone()),
        false => dotted_key(value).map(|below| format!("{key}.{below}")),
    })
}

fn is_json(definition: &str) -> bool {
    definition.starts_with('{')
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
    fn help_lists_the_types_or_the_properties_of_a_type() {
        let help = |definition| object_help(definition).unwrap();
        let types = "List of user creatable objects:\n  secret\n  throttle-group\n";
        for definition in ["help", "?", "bogus,help", "main-loop,help"] {
            assert_eq!(help(definition).as_deref(), Some(types));
        }
        let secret = help("secret,id=s,help").unwrap();
        assert!(secret.starts_with("secret options:\n  data=<string>\n"), "{secret}");
        assert_eq!(help("throttle-group,?").unwrap().lines().count(), 21);
        assert!(object_help("secret,help,x").is_err());
        for definition in ["secret,id=help,data=x", r#"{"qom-type":"help"}"#] {
            assert_eq!(help(definition), None, "{definition}");
        }
    }

    #[test]
    fn dotted_names_in_json_are_refused() {
        let define = |json: &str| define_object(&Objects::default(), json);
        for (json, key) in [
            (
                r#"{"qom-type":"throttle-group","id":"g","limits.iops-total":5}"#,
                "limits.iops-total",
            ),
            (r#"{"qom-type":"throttle-group","id":"g","limits":{"a.b":5}}"#, "limits.a.b"),
            (r#"{"qom-type":"secret","id":"s","data":"x","a.b":1}"#, "a.b"),
        ] {
            let text = format!("Parameter '{key}' is unexpected");
            assert_eq!(define(json).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn numbers_in_json_are_not_text() {
        let json = |limits: &str| {
            format!(r#"{{"qom-type":"throttle-group","id":"g","limits":{{{limits}}}}}"#)
        };
        assert_eq!(define(&json(r#""iops-total":10"#)), Ok(()));
        for value in ["\"10\"", "10.0", "true", "null", "18446744073709551615"] {
            assert_eq!(
                define(&json(&format!("\"iops-total\":{value}"))).unwrap_err(),
                "Invalid parameter type for 'limits.iops-total', expected: integer"
            );
        }
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

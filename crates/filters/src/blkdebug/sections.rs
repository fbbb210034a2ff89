//! Rules as sections. A section is a part of the configuration file (`[inject-error]`), or a group of options
//! (`inject-error.0.event=…`).
//!
//! The configuration file has QEMU's `-readconfig` syntax: `[group]` or `[group "id"]` begins a section, `key = "value"` sets a
//! value, and lines that begin with `#` are comments.

use std::io::Read;
use std::time::Duration;

use oxblk_core::{DebugEvent, Error, Options, Perm, Result, names};
use serde_json::{Map, Value};

use super::rules::{ANY_STATE, Action, Fault, Inject, IoType, Rule};

/// Maximum length of a configuration file in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// The types of sections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    InjectError,
    SetState,
}

impl Kind {
    /// The types, in the order in which their rules are added.
    pub(super) const ALL: [Self; 2] = [Self::InjectError, Self::SetState];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::InjectError => "inject-error",
            Self::SetState => "set-state",
        }
    }

    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::InjectError => {
                &["event", "state", "iotype", "errno", "delay-ns", "sector", "once", "immediately"]
            }
            Self::SetState => &["event", "state", "new_state"],
        }
    }
}

/// A section whose values have the right types. The names of events and requests are not checked yet.
#[derive(Debug)]
pub(super) struct Section {
    kind: Kind,
    event: Option<String>,
    state: i64,
    iotype: Option<String>,
    errno: i64,
    delay: u64,
    sector: Option<i64>,
    once: bool,
    immediately: bool,
    new_state: i64,
}

impl Section {
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Takes the values of a section out of `options`.
    ///
    /// # Errors
    /// When a value has the wrong type.
    fn take(kind: Kind, options: &mut Options) -> Result<Self> {
        let mut number =
            |key: &str| Ok::<_, Error>(options.take_number(key)?.map(u64::cast_signed));
        let state = number("state")?.unwrap_or(ANY_STATE);
        let mut section = Self {
            kind,
            event: None,
            state,
            iotype: None,
            errno: i64::from(oxblk_core::Errno::IO),
            delay: 0,
            sector: None,
            once: false,
            immediately: false,
            new_state: 0,
        };
        match kind {
            Kind::InjectError => {
                section.errno = number("errno")?.unwrap_or(section.errno);
                section.sector = number("sector")?;
                section.delay = options.take_number("delay-ns")?.unwrap_or(0);
                section.iotype = options.take_str("iotype")?;
                section.once = options.take_bool("once")?.unwrap_or(false);
                section.immediately = options.take_bool("immediately")?.unwrap_or(false);
            }
            Kind::SetState => section.new_state = number("new_state")?.unwrap_or(0),
        }
        section.event = options.take_str("event")?;
        Ok(section)
    }

    /// The rule of the section.
    ///
    /// # Errors
    /// When the name of the event is missing, or a name is unknown.
    pub(super) fn rule(&self) -> Result<Rule> {
        let unknown = |name: &str| Error::invalid(format!("invalid parameter value: {name}"));
        let event = self.event.as_deref();
        let event = event.ok_or_else(|| Error::invalid("Missing event name for rule"))?;
        let event = DebugEvent::parse(event).ok_or_else(|| unknown(event))?;
        let action = match self.kind {
            Kind::SetState => Action::SetState(self.new_state),
            Kind::InjectError => {
                let io = match self.iotype.as_deref() {
                    None => IoType::DEFAULT,
                    Some(name) => IoType::parse(name).ok_or_else(|| unknown(name))?,
                };
                let fault = Fault {
                    delay: Duration::from_nanos(self.delay),
                    // A number that is no errno value makes no error.
                    errno: i32::try_from(self.errno.max(0)).unwrap_or(0),
                    is_immediate: self.immediately,
                };
                let sector = self.sector.and_then(|sector| u64::try_from(sector).ok());
                Action::Inject(Inject { io, sector, once: self.once, fault })
            }
        };
        Ok(Rule { event, state: self.state, action })
    }
}

/// Reads the sections of a configuration file.
///
/// # Errors
/// When the file cannot be read, or is not valid.
pub(super) fn of_file(name: &str) -> Result<Vec<Section>> {
    let unreadable =
        |error: std::io::Error| Error::from(error).prefix("Could not read blkdebug config file");
    let file = std::fs::File::open(names::to_path(name)).map_err(unreadable)?;
    let mut text = Vec::new();
    file.take(MAX_CONFIG.saturating_add(1)).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(Error::invalid("The blkdebug config file is too long"));
    }
    parse(&names::to_text(&text))
}

fn parse(text: &str) -> Result<Vec<Section>> {
    let mut parsed = Vec::new();
    let mut current: Option<(Kind, Options)> = None;
    for line in text.split_inclusive('\n').filter(|line| *line != "\n" && !line.starts_with('#')) {
        if let Some(group) = group(line) {
            finish(&mut parsed, current.take())?;
            let kind = Kind::ALL.into_iter().find(|kind| kind.name() == group);
            let missing = || Error::invalid(format!("There is no option group '{group}'"));
            current = Some((kind.ok_or_else(missing)?, Options::new()));
            continue;
        }
        let (key, value) = assignment(line).ok_or_else(|| Error::invalid("parse error"))?;
        let Some((kind, values)) = &mut current else {
            return Err(Error::invalid("no group defined"));
        };
        if !kind.keys().contains(&key) {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        values.insert(key, value);
    }
    finish(&mut parsed, current)?;
    Ok(parsed)
}

fn finish(parsed: &mut Vec<Section>, section: Option<(Kind, Options)>) -> Result<()> {
    if let Some((kind, mut values)) = section {
        parsed.push(Section::take(kind, &mut values)?);
    }
    Ok(())
}

/// The name of the group that a line begins: a word before an identifier in quotes, or the text up to the bracket. As in QEMU, a
/// line without the closing bracket begins a group whose name contains the rest of the line.
fn group(line: &str) -> Option<&str> {
    let rest = line.strip_prefix('[')?;
    let (word, id) = rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len()));
    if !word.is_empty() && id.trim_start().starts_with('"') {
        return Some(word);
    }
    rest.split(']').next().filter(|name| !name.is_empty())
}

/// The key and the value of a line. A value without quotes counts as empty.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start();
    let end = line.find(char::is_whitespace).unwrap_or(line.len());
    let (key, rest) = line.split_at_checked(end).filter(|(key, _)| !key.is_empty())?;
    let value = rest.trim_start().strip_prefix('=').map(str::trim_start);
    let quoted = value.and_then(|value| value.strip_prefix('"')).unwrap_or_default();
    Some((key, quoted.split('"').next().unwrap_or_default()))
}

/// Takes the sections of one type out of the options: `KIND.0.KEY`, `KIND.1.KEY`, …, or `KIND.KEY` for a single section.
///
/// # Errors
/// When a section is not valid.
pub(super) fn of_options(kind: Kind, options: &mut Options) -> Result<Vec<Section>> {
    let name = kind.name();
    if options.get(name).and_then(Value::as_object).is_some_and(Map::is_empty) {
        // The option stays, so it is refused as unknown.
        return Ok(Vec::new());
    }
    let Some(mut all) = options.take_options(name) else { return Ok(Vec::new()) };
    let mut sections = Vec::new();
    while let Some(values) = all.take(&sections.len().to_string()) {
        let Value::Object(values) = values else {
            let index = sections.len();
            let text = format!("[{name}] section (index {index}) does not consist of keys");
            return Err(Error::invalid(text));
        };
        sections.push(of_values(kind, &mut Options::from_map(values)?)?);
    }
    if sections.is_empty() && all.keys().any(|key| kind.keys().contains(&key)) {
        sections.push(of_values(kind, &mut all)?);
    }
    match all.first_key() {
        Some(key) => Err(Error::invalid(format!("Unused option '{key}' for [{name}]"))),
        None => Ok(sections),
    }
}

fn of_values(kind: Kind, values: &mut Options) -> Result<Section> {
    let section = Section::take(kind, values)?;
    match values.first_key() {
        Some(key) => {
            let name = kind.name();
            let text = format!("[{name}] section doesn't support the option '{key}'");
            Err(Error::invalid(text))
        }
        None => Ok(section),
    }
}

/// Takes a list of permissions out of the options.
///
/// # Errors
/// When the list is not valid.
pub(super) fn permissions(options: &mut Options, key: &str) -> Result<Perm> {
    let mut permissions = Perm::empty();
    let Some(mut list) = options.take_options(key) else { return Ok(permissions) };
    let count = list.keys().count();
    for at in 0..count {
        let Some(value) = list.take_str(&at.to_string())? else {
            return Err(not_a_list(&list, count));
        };
        permissions |= match value.as_str() {
            "consistent-read" => Perm::CONSISTENT_READ,
            "write" => Perm::WRITE,
            "write-unchanged" => Perm::WRITE_UNCHANGED,
            "resize" => Perm::RESIZE,
            _ => {
                let text = format!("Parameter 'null' does not accept value '{value}'");
                return Err(Error::invalid(text));
            }
        };
    }
    Ok(permissions)
}

fn not_a_list(list: &Options, count: usize) -> Error {
    let indices: Option<Vec<u64>> = list.keys().map(|key| key.parse().ok()).collect();
    match indices.and_then(|indices| indices.into_iter().max()) {
        Some(largest) => Error::invalid(format!(
            "List indices are not contiguous, saw {count} elements but {largest} largest index"
        )),
        None => Error::invalid("Invalid parameter type for '<anonymous>', expected: array"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<Vec<Rule>> {
        parse(text)?.iter().map(Section::rule).collect()
    }

    #[test]
    fn a_file_has_sections_comments_and_quoted_values() {
        let text = "# a comment\n\n[inject-error \"id\"]\n  event = \"read_aio\"\n errno = \"28\" x\n\
                    [set-state]\nevent = \"pwritev\"\nstate = \"1\"\nnew_state = \"0x2\"\n";
        let rules = rules(text).unwrap();
        let [error, state] = rules.as_slice() else { panic!("{rules:?}") };
        assert_eq!((error.event, error.state), (DebugEvent::ReadAio, ANY_STATE));
        assert!(matches!(&error.action, Action::Inject(inject) if inject.fault.errno == 28));
        assert_eq!((state.event, state.state), (DebugEvent::Pwritev, 1));
        assert!(matches!(&state.action, Action::SetState(2)));
    }

    #[test]
    fn a_faulty_file_gets_the_messages_of_qemu() {
        for (text, message) in [
            ("[foo]\n", "There is no option group 'foo'"),
            ("event = \"read_aio\"\n", "no group defined"),
            ("[inject-error]\nfoo = \"1\"\n", "Invalid parameter 'foo'"),
            ("[inject-error]\nevent=\"read_aio\"\n", "Invalid parameter 'event=\"read_aio\"'"),
            ("[inject-error]\nevent = read_aio\n", "invalid parameter value: "),
            ("[inject-error]\nevent = \"read_aio\n", "invalid parameter value: read_aio\n"),
            ("[inject-error\nevent = \"read_aio\"\n", "There is no option group 'inject-error\n'"),
            ("[inject-error ]\n", "There is no option group 'inject-error '"),
            ("[]\n", "no group defined"),
            (" \n", "parse error"),
            ("[inject-error]\nerrno = \"5\"\n", "Missing event name for rule"),
            ("[inject-error]\nerrno = \"x\"\n", "Parameter 'errno' expects a number"),
        ] {
            assert_eq!(rules(text).unwrap_err().to_string(), message, "{text}");
        }
    }
}

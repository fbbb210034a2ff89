//! The options of a new image (`-o key=value,…`): parsing, checking and listing them.
//!
//! The format and the protocol below the format each have a table of options. A new image accepts the options of both
//! tables. The types of the values are checked here, before any file is created. The messages are QEMU's.

use oxblk_core::create::{CreateOption, OptionType};
use oxblk_core::{
    DriverFactory, DriverKind, Error, Options, Result, number_fault, parse_bool, parse_number,
    parse_size, size_fault, split_list,
};

/// The value of an option.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Setting {
    /// The value, and its spelling on the command line (`on`, `yes`).
    Flag(bool, String),
    /// The value with its sign. If the driver reads an unsigned integer, a negative value means the unsigned 64-bit
    /// integer with the same bits.
    Number(i128),
    Text(String),
}

/// The options of one new image.
pub(super) struct CreateOptions {
    table: Vec<CreateOption>,
    settings: Vec<(&'static str, Setting)>,
}

/// Appends the value of one `-o` to the values of the earlier `-o` options.
///
/// # Errors
/// The message to print if the list is empty, begins with a comma, or ends with a comma that is not doubled.
pub(super) fn append(list: &mut Option<String>, more: &str) -> std::result::Result<(), String> {
    // A doubled comma means a comma in a value. A list begins with a key, so a doubled comma at the start is invalid.
    let commas = |text: &str| text.bytes().take_while(|byte| *byte == b',').count();
    let reversed: String = more.chars().rev().collect();
    if more.is_empty() || more.starts_with(',') || commas(&reversed) % 2 == 1 {
        return Err(format!("Invalid option list: {more}"));
    }
    match list {
        Some(list) => {
            list.push(',');
            list.push_str(more);
        }
        None => *list = Some(more.to_owned()),
    }
    Ok(())
}

/// Whether a list requests help.
pub(super) fn asks_for_help(list: &str) -> bool {
    let items = split_list(list, None);
    items.iter().any(|item| matches!(item.short_form.as_deref(), Some("help" | "?")))
}

impl CreateOptions {
    /// The options of `format` and of the `protocol` below it, set to their default values.
    ///
    /// # Errors
    /// If the format or the protocol cannot create images, or is not supported yet.
    pub(super) fn new(
        format: &dyn DriverFactory,
        protocol: Option<&dyn DriverFactory>,
    ) -> Result<Self> {
        let mut table = options_of(format, "Format")?.to_vec();
        if let Some(protocol) = protocol {
            for option in options_of(protocol, "Protocol")? {
                if !table.iter().any(|own| own.name == option.name) {
                    table.push(*option);
                }
            }
        }
        let mut settings = Vec::new();
        for option in &table {
            if let Some(text) = option.default {
                settings.push((option.name, read(option, text)?));
            }
        }
        Ok(Self { table, settings })
    }

    /// The options of `format` that can be amended, all unset.
    ///
    /// # Errors
    /// If the format has no such options, or is not supported yet.
    pub(super) fn to_amend(format: &dyn DriverFactory) -> Result<Self> {
        let table = format.amend_options().to_vec();
        if table.is_empty() {
            let name = format.name();
            if let Some(error) = oxblk::absent_error(name) {
                return Err(error);
            }
            let text = format!("Format driver '{name}' does not support option amendment");
            return Err(Error::unsupported(text));
        }
        Ok(Self { table, settings: Vec::new() })
    }

    /// All options of `format`, for creating and for amending, all unset.
    pub(super) fn to_create_or_amend(format: &dyn DriverFactory) -> Self {
        let mut table = format.amend_options().to_vec();
        for option in format.create_options() {
            if !table.iter().any(|own| own.name == option.name) {
                table.push(*option);
            }
        }
        Self { table, settings: Vec::new() }
    }

    /// The output of `-o help` below its title.
    pub(super) fn help(&self) -> String {
        let mut sorted: Vec<_> = self.table.iter().collect();
        sorted.sort_by_key(|option| option.name);
        let line = |option: &CreateOption| {
            let kind = match option.kind {
                OptionType::Bool => "<bool (on/off)>",
                OptionType::Size => "<size>",
                OptionType::Number => "<num>",
                OptionType::String => "<str>",
            };
            format!("  {:<22} - {}\n", format!("{}={kind}", option.name), option.help)
        };
        sorted.into_iter().map(line).collect()
    }

    /// Parses a list of options.
    ///
    /// # Errors
    /// If an option is unknown, or if its value is invalid for its type.
    pub(super) fn parse(&mut self, list: &str) -> Result<()> {
        // `id` is accepted and has no effect.
        for item in split_list(list, None).iter().filter(|item| item.key != "id") {
            let option = self.table.iter().find(|option| option.name == item.key);
            let option = option.ok_or_else(|| unknown(&item.key))?;
            let setting = read(option, &item.value)?;
            self.put(option.name, setting);
        }
        Ok(())
    }

    fn put(&mut self, name: &'static str, setting: Setting) {
        match self.settings.iter_mut().find(|(key, _)| *key == name) {
            Some((_, value)) => *value = setting,
            None => self.settings.push((name, setting)),
        }
    }

    /// Whether the table has an option with this name.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.table.iter().any(|option| option.name == name)
    }

    /// Sets a text option.
    pub(super) fn set(&mut self, name: &'static str, text: &str) {
        self.put(name, Setting::Text(text.to_owned()));
    }

    /// Sets the virtual size in bytes.
    pub(super) fn set_size(&mut self, bytes: u64) {
        self.put("size", Setting::Number(bytes.into()));
    }

    fn get(&self, name: &str) -> Option<&Setting> {
        self.settings.iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// The value of a text option, if it is set.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Setting::Text(text) => Some(text),
            Setting::Flag(..) | Setting::Number(_) => None,
        }
    }

    /// The value of a number or size option, if it is set.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            Setting::Number(number) => Some(to_bits(*number)),
            Setting::Flag(..) | Setting::Text(_) => None,
        }
    }

    /// Whether the new image will be encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        let flag = matches!(self.get("encryption"), Some(Setting::Flag(true, _)));
        flag || self.text("encrypt.format").is_some()
    }

    /// The options that refer to secrets. Opening the image needs these options too.
    pub(super) fn key_secrets(&self) -> Options {
        let mut options = Options::new();
        for (name, setting) in &self.settings {
            if name.ends_with("key-secret")
                && let Setting::Text(id) = setting
            {
                // The call cannot fail: the names of the table are not nested deeply.
                let _ = options.set(name, id.as_str());
            }
        }
        options
    }

    /// The options that are set, in the order of the table: ` key=value key=value`.
    pub(super) fn shown(&self) -> String {
        let show = |option: &CreateOption| {
            let value = match self.get(option.name)? {
                Setting::Flag(_, word) => word.clone(),
                // QEMU's tools print numbers as signed 64-bit integers.
                Setting::Number(number) => to_bits(*number).cast_signed().to_string(),
                Setting::Text(text) => text.replace(',', ",,"),
            };
            Some(format!(" {}={value}", option.name))
        };
        self.table.iter().filter_map(show).collect()
    }

    /// The options that are set, for the drivers.
    pub(super) fn to_options(&self) -> Options {
        let mut options = Options::new();
        for (name, setting) in &self.settings {
            match setting {
                Setting::Flag(on, _) => options.insert(name, *on),
                // A negative number is passed as text, because the text keeps the sign.
                Setting::Number(number) if *number < 0 => options.insert(name, number.to_string()),
                Setting::Number(number) => options.insert(name, to_bits(*number)),
                Setting::Text(text) => options.insert(name, text.as_str()),
            }
        }
        options
    }
}

fn options_of(driver: &dyn DriverFactory, what: &str) -> Result<&'static [CreateOption]> {
    let options = driver.create_options();
    if let Some(error) = oxblk::absent_error(driver.name()) {
        return Err(error);
    }
    let wrong_layer = what == "Protocol" && driver.kind() != DriverKind::Protocol;
    if options.is_empty() || wrong_layer {
        return Err(Error::unsupported(format!(
            "{what} driver '{}' does not support image creation",
            driver.name()
        )));
    }
    Ok(options)
}

fn unknown(key: &str) -> Error {
    Error::invalid(format!("Invalid parameter '{key}'"))
}

/// Parses a value of the option's type.
fn read(option: &CreateOption, text: &str) -> Result<Setting> {
    let name = option.name;
    match option.kind {
        OptionType::String => Ok(Setting::Text(text.to_owned())),
        OptionType::Bool => match parse_bool(text) {
            Some(on) => Ok(Setting::Flag(on, text.to_owned())),
            None => Err(Error::invalid(format!("Parameter '{name}' expects 'on' or 'off'"))),
        },
        OptionType::Number => {
            let number = parse_number(text).map_err(|e| number_fault(e, name, text))?;
            let is_negative = text.trim_start().starts_with('-');
            let size = if is_negative { number.wrapping_neg() } else { number };
            Ok(Setting::Number(if is_negative { -i128::from(size) } else { size.into() }))
        }
        OptionType::Size => {
            let size = parse_size(text).map_err(|e| size_fault(e, name, text))?;
            Ok(Setting::Number(size.into()))
        }
    }
}

/// The unsigned 64-bit integer with the bits of `number`.
fn to_bits(number: i128) -> u64 {
    u64::try_from(number & i128::from(u64::MAX)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn option(
        name: &'static str,
        kind: OptionType,
        default: Option<&'static str>,
    ) -> CreateOption {
        CreateOption { name, kind, help: "Help", default }
    }

    fn options() -> CreateOptions {
        let table = vec![
            option("size", OptionType::Size, None),
            option("lazy_refcounts", OptionType::Bool, None),
            option("backing_file", OptionType::String, None),
            option("refcount_bits", OptionType::Number, None),
        ];
        CreateOptions { table, settings: Vec::new() }
    }

    #[test]
    fn values_are_checked_against_their_types() {
        let wrong = |list: &str| options().parse(list).unwrap_err().to_string();
        assert_eq!(
            wrong("lazy_refcounts=maybe"),
            "Parameter 'lazy_refcounts' expects 'on' or 'off'"
        );
        assert_eq!(wrong("refcount_bits=x"), "Parameter 'refcount_bits' expects a number");
        assert_eq!(wrong("size=20E"), "Value '20E' is out of range for parameter 'size'");
        assert_eq!(wrong("=x"), "Invalid parameter ''");
        assert_eq!(wrong("bogus=1"), "Invalid parameter 'bogus'");
        assert!(options().parse("size").is_err());
    }

    #[test]
    fn options_are_shown_in_the_order_of_the_table_with_commas_doubled() {
        let mut options = options();
        options.parse("backing_file=x,,y,nolazy_refcounts,size=64k").unwrap();
        assert_eq!(options.shown(), " size=65536 lazy_refcounts=off backing_file=x,,y");
        assert_eq!(options.text("backing_file"), Some("x,y"));
        options.parse("lazy_refcounts=yes").unwrap();
        assert_eq!(options.shown(), " size=65536 lazy_refcounts=yes backing_file=x,,y");
        assert_eq!(options.number("size"), Some(65536));
    }

    #[test]
    fn a_negative_number_keeps_its_sign_for_the_driver_and_is_shown_with_64_bits() {
        let read = |text: &str| {
            let mut options = options();
            options.parse(&format!("refcount_bits={text}")).unwrap();
            let given = options.to_options().take_signed("refcount_bits", "x");
            (options.shown(), given.ok().flatten(), options.number("refcount_bits"))
        };
        assert_eq!(read("-1"), (" refcount_bits=-1".to_owned(), Some(-1), Some(u64::MAX)));
        let beyond = (" refcount_bits=-1".to_owned(), None, Some(u64::MAX));
        assert_eq!(read("18446744073709551615"), beyond);
        let wrapped = (" refcount_bits=1".to_owned(), None, Some(1));
        assert_eq!(read("-18446744073709551615"), wrapped);
    }

    #[test]
    fn lists_are_concatenated_and_stray_commas_are_refused() {
        let mut list = None;
        append(&mut list, "a=1").unwrap();
        append(&mut list, "b=2").unwrap();
        assert_eq!(list.as_deref(), Some("a=1,b=2"));
        for wrong in ["", ",", ",,", ",a=1", ",,a=1", "a=1,", "a=1,,,"] {
            assert_eq!(
                append(&mut list, wrong).unwrap_err(),
                format!("Invalid option list: {wrong}")
            );
        }
    }

    #[test]
    fn help_is_requested_by_a_word_and_not_by_a_part_of_a_value() {
        assert!(asks_for_help("help") && asks_for_help("size=1,?") && asks_for_help("a=b,help,c"));
        assert!(!asks_for_help("backing_file=a,,help") && !asks_for_help("a=help"));
    }

    #[test]
    fn help_is_sorted_by_name_and_aligned() {
        let help = options().help();
        let mut lines = help.lines();
        assert_eq!(lines.next(), Some("  backing_file=<str>     - Help"));
        assert_eq!(lines.next(), Some("  lazy_refcounts=<bool (on/off)> - Help"));
    }
}

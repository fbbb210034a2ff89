//! Functions and texts that are used by the help, the manual pages and the completions.

use oxblk_core::{DriverFactory, DriverKind};

/// The suffixes of sizes.
pub(super) const SIZES: &str = "Sizes may have a suffix: k, M, G, T, P or E (powers of 1024).";

/// The names of the formats that can be opened.
pub(super) fn formats() -> Vec<&'static str> {
    formats_that(|name| !oxblk::is_absent(name))
}

/// Returns the sentences about formats: which can be opened, and which are only recognised.
pub(super) fn about_formats() -> String {
    let known = formats().join(", ");
    let absent = formats_that(oxblk::is_absent).join(", ");
    format!("Formats: {known}. Not supported yet: {absent}.")
}

/// The list of formats and protocols at the end of the help of `qemu-img`. Scripts read this list.
pub(super) fn supported_formats() -> String {
    let names = oxblk::drivers().iter().map(|driver| driver.name());
    let mut names: Vec<_> = names.filter(|name| !oxblk::is_absent(name)).collect();
    names.sort_unstable();
    format!("\nSupported formats:\n{}", super::help::indented(&names.join(" "), 2))
}

fn formats_that(wanted: impl Fn(&str) -> bool) -> Vec<&'static str> {
    // A driver of several images (quorum) is no format of image files.
    let is_format = |driver: &dyn DriverFactory| {
        driver.kind() == DriverKind::Format && !driver.opens_children()
    };
    let drivers = oxblk::drivers().iter().filter(|driver| is_format(**driver));
    let mut names: Vec<_> =
        drivers.map(|driver| driver.name()).filter(|name| wanted(name)).collect();
    names.sort_unstable();
    names
}

/// The words as `a, b or c`.
pub(super) fn alternatives(words: &[&str]) -> String {
    match words.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

/// Breaks a text at spaces into lines of at most `width` bytes. A word with more than `width` bytes gets a line of its own.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len().saturating_add(word.len()) < width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_long_as_possible() {
        assert_eq!(wrap("a bb ccc dddddddd e", 6), ["a bb", "ccc", "dddddddd", "e"]);
        assert_eq!(wrap("aa bbb", 6), ["aa bbb"]);
        assert!(wrap(" ", 6).is_empty());
    }

    #[test]
    fn words_are_listed_as_in_a_sentence() {
        assert_eq!(alternatives(&["a"]), "a");
        assert_eq!(alternatives(&["a", "b", "c"]), "a, b or c");
    }

    #[test]
    fn each_format_is_either_supported_or_not() {
        assert!(formats().contains(&"qcow2") && !formats().contains(&"vmdk"));
        assert!(about_formats().contains("vmdk") && !about_formats().contains("host_device"));
    }
}

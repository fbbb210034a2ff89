//! Splits the option lists of the tools: `key=value,key=value`. A comma inside a value is written twice.

/// One element of an option list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListItem {
    /// The key. For a word without `=`, this is the word without a leading `no`.
    pub key: String,
    /// The value: `on` or `off` for a word without `=`.
    pub value: String,
    /// The word, if the element has no `=`. QEMU deprecates this form.
    pub short_form: Option<String>,
}

/// Splits an option list. A first element without `=` is the value of `implied`. Any other word without `=` is the name
/// of an option with the value `on`. If the word begins with `no`, the rest of the word is the name of an option with
/// the value `off`.
pub fn split_list(text: &str, implied: Option<&str>) -> Vec<ListItem> {
    let mut items = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let implied = implied.filter(|_| items.is_empty());
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let (item, after) = match (after.strip_prefix('='), implied) {
            (Some(after), _) => {
                let (value, after) = take_value(after);
                (ListItem { key: word.to_owned(), value, short_form: None }, after)
            }
            (None, Some(key)) => {
                let (value, after) = take_value(rest);
                (ListItem { key: key.to_owned(), value, short_form: None }, after)
            }
            (None, None) => (short_form(word), after),
        };
        items.push(item);
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    items
}

fn short_form(word: &str) -> ListItem {
    let (key, value) = match word.strip_prefix("no") {
        Some(key) => (key, "off"),
        None => (word, "on"),
    };
    ListItem { key: key.to_owned(), value: value.to_owned(), short_form: Some(word.to_owned()) }
}

/// Returns the value at the start of `text`, up to a single comma, and the rest of `text` from this comma on.
pub(super) fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let end = rest.find(',').unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        value.push_str(part);
        match after.strip_prefix(",,") {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, after),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
        split_list(text, implied).into_iter().map(|item| (item.key, item.value)).collect()
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn doubled_commas_belong_to_values_only() {
        assert_eq!(pairs("a=x,,y,b=,c=", None), owned(&[("a", "x,y"), ("b", ""), ("c", "")]));
        assert_eq!(pairs("a,,b=1", None), owned(&[("a", "on"), ("", "on"), ("b", "1")]));
        assert_eq!(pairs("x,,y,a=1,", Some("file")), owned(&[("file", "x,y"), ("a", "1")]));
        assert_eq!(pairs("", Some("file")), owned(&[]));
    }

    #[test]
    fn words_without_a_value_are_switches() {
        assert_eq!(pairs("a,nob", None), owned(&[("a", "on"), ("b", "off")]));
        let short = split_list("nob", None).pop().and_then(|item| item.short_form);
        assert_eq!(short.as_deref(), Some("nob"));
    }
}

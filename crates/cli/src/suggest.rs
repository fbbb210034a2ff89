//! Suggestions for misspelt words.
//!
//! Under QEMU's names the tools print what QEMU's tools print and nothing more, so there are no suggestions.

use strsim::damerau_levenshtein;

use crate::program::{Program, err};

/// The word of `known` that `word` was probably meant to be: at most every third character differs.
fn closest<'w>(word: &str, known: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    let most = (word.chars().count() / 3).max(1);
    let distances = known.map(|one| (damerau_levenshtein(word, one), one));
    distances.filter(|(distance, _)| *distance <= most).min().map(|(_, one)| one)
}

/// Prints a suggestion if one of `known` is close to `word`. `shown` puts it the way the user types it.
pub(crate) fn print<'w>(
    program: &Program,
    word: &str,
    known: impl Iterator<Item = &'w str>,
    shown: impl Fn(&str) -> String,
) {
    if program.name().starts_with("qemu-") {
        return;
    }
    if let Some(meant) = closest(word, known) {
        err(format_args!("Did you mean '{}'?\n", shown(meant)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_few_faults_is_recognised_and_another_word_is_not() {
        let known = || ["convert", "compare", "commit", "check"].into_iter();
        assert_eq!(closest("convret", known()), Some("convert"));
        assert_eq!(closest("chek", known()), Some("check"));
        assert_eq!(closest("dance", known()), None);
        assert_eq!(closest("x", known()), None);
    }
}

//! Suggestions for misspelt words.
//!
//! A tool that is started under QEMU's name prints no suggestions, because its output must equal the output of QEMU's
//! tool.

use strsim::damerau_levenshtein;

use crate::program::{Program, err};

/// The word of `known` with the smallest edit distance from `word`. The distance must be at most a third of the characters of
/// `word`, or 1.
fn closest<'w>(word: &str, known: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    let most = (word.chars().count() / 3).max(1);
    let distances = known.map(|one| (damerau_levenshtein(word, one), one));
    distances.filter(|(distance, _)| *distance <= most).min().map(|(_, one)| one)
}

/// Prints a suggestion if one of `known` is close to `word`. `shown` formats the suggestion as the user would type it.
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
    fn a_misspelt_word_gets_a_suggestion_and_an_unrelated_word_gets_none() {
        let known = || ["convert", "compare", "commit", "check"].into_iter();
        assert_eq!(closest("convret", known()), Some("convert"));
        assert_eq!(closest("chek", known()), Some("check"));
        assert_eq!(closest("dance", known()), None);
        assert_eq!(closest("x", known()), None);
    }
}

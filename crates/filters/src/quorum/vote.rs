//! Counts votes.

/// The voters that agree on one value.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Version<T> {
    pub(super) value: T,
    /// The positions of the voters.
    pub(super) voters: Vec<usize>,
}

/// Groups the votes by value. The versions are in the order of their first votes.
pub(super) fn count<T>(
    votes: impl IntoIterator<Item = (usize, T)>,
    is_same: impl Fn(&T, &T) -> bool,
) -> Vec<Version<T>> {
    let mut versions: Vec<Version<T>> = Vec::new();
    for (voter, value) in votes {
        match versions.iter_mut().find(|version| is_same(&version.value, &value)) {
            Some(version) => version.voters.push(voter),
            None => versions.push(Version { value, voters: vec![voter] }),
        }
    }
    versions
}

/// The position of the version with the most votes. Of versions with equally many votes, the last one wins, as in QEMU.
pub(super) fn winner<T>(versions: &[Version<T>]) -> Option<usize> {
    let votes = versions.iter().enumerate();
    votes.max_by_key(|(_, version)| version.voters.len()).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn most_common_error(votes: &[u8]) -> Option<u8> {
        let versions = count(votes.iter().copied().enumerate(), u8::eq);
        winner(&versions).map(|at| versions[at].value)
    }

    #[test]
    fn the_majority_wins_and_in_a_tie_the_version_that_appeared_last() {
        assert_eq!(most_common_error(&[]), None);
        assert_eq!(most_common_error(&[1]), Some(1));
        assert_eq!(most_common_error(&[1, 2, 1]), Some(1));
        assert_eq!(most_common_error(&[1, 2, 2]), Some(2));
        assert_eq!(most_common_error(&[1, 2, 3]), Some(3));
        assert_eq!(most_common_error(&[1, 2, 1, 2]), Some(2));
        assert_eq!(most_common_error(&[2, 1, 1, 2, 3]), Some(1));
    }
}

//! `-l` of `convert` and `measure`: reads a snapshot of the source instead of the active disk state.

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Error};

use crate::flags::refusal::Refusal;
use crate::flags::spec::Value;
use crate::text::option_list::list;

use super::{Context, Step};

/// An argument with this prefix is a list of fields, not a name.
const FIELDS: &str = "snapshot.";

/// The snapshot that `-l` selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The snapshot with this id or, if no snapshot has this id, with this name.
    Either(String),
    /// The snapshot that matches all given fields.
    Both {
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

impl Wanted {
    /// The value of `-l` in the help and in usage lines.
    pub(super) const VALUE: Value = Value::text("SNAPSHOT");
    /// The help of `-l`.
    pub(super) const ABOUT: &str =
        "read the snapshot with this id or name, or with snapshot.id=ID,snapshot.name=NAME";

    /// Reads the argument of `-l`.
    ///
    /// # Errors
    /// If the argument has an unknown field.
    pub(super) fn parse(text: &str) -> Result<Self, Refusal> {
        if !text.starts_with(FIELDS) {
            return Ok(Self::Either(text.to_owned()));
        }
        let (mut id, mut name) = (None, None);
        for item in list(text, None) {
            match item.key.as_str() {
                "snapshot.id" => id = Some(item.value),
                "snapshot.name" => name = Some(item.value),
                other => {
                    let refusal = Refusal::failed(format!("Invalid parameter '{other}'"));
                    let text = format!("Failed in parsing snapshot param '{text}'");
                    return Err(refusal.then(text));
                }
            }
        }
        Ok(Self::Both { id, name })
    }

    fn find<'l>(&self, list: &'l [SnapshotInfo]) -> Option<&'l SnapshotInfo> {
        match self {
            Self::Either(text) => {
                let by_id = list.iter().find(|one| one.id == *text);
                by_id.or_else(|| list.iter().find(|one| one.name == *text))
            }
            Self::Both { id, name } => list.iter().find(|one| {
                id.as_ref().is_none_or(|id| one.id == *id)
                    && name.as_ref().is_none_or(|name| one.name == *name)
            }),
        }
    }

    /// Makes reads of the source return the snapshot's data.
    pub(super) async fn load(&self, context: &Context, source: &Backend) -> Step {
        let node = source.node().map_err(|error| context.error(&error))?;
        if node.driver().snapshots().is_none() {
            return Err(context.failed(format_args!(
                "Failed to load snapshot: Block format '{}' used by device '' does not support \
                 temporarily loading internal snapshots",
                node.factory().name()
            )));
        }
        let failed = |error| context.failed(format_args!("Failed to load snapshot: {error}"));
        let wanted = self.clone();
        let choose = move |list: &[SnapshotInfo]| {
            let found = wanted.find(list).map(|snapshot| snapshot.id.clone());
            found.ok_or_else(|| Error::invalid("Can't find snapshot"))
        };
        source.load_snapshot_by(choose).await.map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_precedence_over_a_name_and_all_given_fields_must_match() {
        let one = |id: &str, name: &str| SnapshotInfo {
            id: id.to_owned(),
            name: name.to_owned(),
            ..SnapshotInfo::default()
        };
        let list = [one("1", "2"), one("2", "x")];
        let found = |wanted: Wanted| wanted.find(&list).map(|one| one.id.clone());
        assert_eq!(found(Wanted::Either("2".to_owned())).as_deref(), Some("2"));
        assert_eq!(found(Wanted::Either("x".to_owned())).as_deref(), Some("2"));
        let both = |id: Option<&str>, name: Option<&str>| Wanted::Both {
            id: id.map(str::to_owned),
            name: name.map(str::to_owned),
        };
        assert_eq!(found(both(None, Some("2"))).as_deref(), Some("1"));
        assert_eq!(found(both(Some("1"), Some("x"))), None);
    }
}

//! Objects: things outside the graph to which options refer by an identifier (`--object`), such as secrets and throttle groups.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Error, Result, Secrets};

/// An object of any type.
type AnyObject = Arc<dyn Any + Send + Sync>;

/// All objects of one program. Clones refer to the same set.
#[derive(Clone, Default)]
pub struct Objects {
    secrets: Secrets,
    others: Arc<Mutex<HashMap<String, AnyObject>>>,
}

impl Objects {
    /// The secrets.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// Adds an object that is not a secret.
    ///
    /// # Errors
    /// When the identifier is already in use. The message has the wording of QEMU's tools.
    pub fn add<T: Any + Send + Sync>(&self, id: &str, object: Arc<T>) -> Result<()> {
        let mut others = self.lock();
        if others.contains_key(id) || self.secrets.contains(id) {
            return Err(Self::duplicate(id));
        }
        others.insert(id.to_owned(), object);
        Ok(())
    }

    /// The error for an identifier that is in use.
    pub fn duplicate(id: &str) -> Error {
        let text = format!("attempt to add duplicate property '{id}' to object (type 'container')");
        Error::invalid(text)
    }

    /// The object with this identifier, if it has the type `T`.
    pub fn get<T: Any + Send + Sync>(&self, id: &str) -> Option<Arc<T>> {
        let object = self.lock().get(id).cloned();
        object.and_then(|object| object.downcast().ok())
    }

    /// Whether an object that is not a secret has this identifier.
    pub fn contains(&self, id: &str) -> bool {
        self.lock().contains_key(id)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, AnyObject>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Secrets> for Objects {
    fn from(secrets: Secrets) -> Self {
        Self { secrets, ..Self::default() }
    }
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_found_by_identifier_and_type() {
        let objects = Objects::default();
        objects.add("a", Arc::new(5_u32)).unwrap();
        let clone = objects.clone();
        assert_eq!(clone.get::<u32>("a").as_deref(), Some(&5));
        assert_eq!(clone.get::<u64>("a"), None);
        assert_eq!(clone.get::<u32>("b"), None);
        let refused = clone.add("a", Arc::new(6_u32)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "attempt to add duplicate property 'a' to object (type 'container')"
        );
        assert_eq!(objects.get::<u32>("a").as_deref(), Some(&5));
    }
}

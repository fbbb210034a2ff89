//! The types of requests that accounting counts separately.

/// The type of a request in [`Statistics`](super::Statistics).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoType {
    /// A read.
    Read,
    /// A write or a zero write.
    Write,
    /// An append to a zone.
    ZoneAppend,
    /// A flush.
    Flush,
    /// A discard.
    Unmap,
}

/// One value for each [`IoType`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PerIoType<T> {
    /// Of reads.
    pub read: T,
    /// Of writes and zero writes.
    pub write: T,
    /// Of appends to zones.
    pub zone_append: T,
    /// Of flushes.
    pub flush: T,
    /// Of discards.
    pub unmap: T,
}

impl<T> PerIoType<T> {
    /// The value of one type.
    pub fn of(&self, io: IoType) -> &T {
        match io {
            IoType::Read => &self.read,
            IoType::Write => &self.write,
            IoType::ZoneAppend => &self.zone_append,
            IoType::Flush => &self.flush,
            IoType::Unmap => &self.unmap,
        }
    }

    /// The value of one type, to be changed.
    pub fn of_mut(&mut self, io: IoType) -> &mut T {
        match io {
            IoType::Read => &mut self.read,
            IoType::Write => &mut self.write,
            IoType::ZoneAppend => &mut self.zone_append,
            IoType::Flush => &mut self.flush,
            IoType::Unmap => &mut self.unmap,
        }
    }

    /// Applies `change` to each value and the other value of the same type.
    pub(super) fn merge<U>(&mut self, other: &PerIoType<U>, mut change: impl FnMut(&mut T, &U)) {
        change(&mut self.read, &other.read);
        change(&mut self.write, &other.write);
        change(&mut self.zone_append, &other.zone_append);
        change(&mut self.flush, &other.flush);
        change(&mut self.unmap, &other.unmap);
    }

    /// Makes a value from each value.
    pub(super) fn map<U>(&self, make: impl Fn(&T) -> U) -> PerIoType<U> {
        PerIoType {
            read: make(&self.read),
            write: make(&self.write),
            zone_append: make(&self.zone_append),
            flush: make(&self.flush),
            unmap: make(&self.unmap),
        }
    }
}

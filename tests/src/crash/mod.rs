//! Power cuts on a simulated disk.

pub mod oracle;

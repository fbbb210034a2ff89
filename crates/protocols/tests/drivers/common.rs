//! Helpers: a graph that has only the drivers of this crate, and functions that open, read and write nodes.

use std::path::Path;

use oxblk_core::{
    Backend, DriverTable, Graph, OpenFlags, Options, Perm, Permissions, Result, WriteFlags,
};
use oxblk_protocols::{file, null};
use oxblk_ring::{IoBuf, IoBufMut};

static DRIVERS: DriverTable = &[&file::FILE, &file::HOST_DEVICE, &null::NULL_CO, &null::NULL_AIO];

pub fn graph() -> Graph {
    Graph::new(DRIVERS, oxblk_core::Gate::Anything)
}

pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Opens the node described by `options` (dotted keys), with a backend that reads. If the node is writable, the
/// backend also writes and resizes.
pub async fn open_with(graph: &Graph, options: &str, flags: OpenFlags) -> Result<Backend> {
    let node = graph.open(Options::from_dotted(options, None)?, flags).await?;
    let mut taken = Perm::CONSISTENT_READ;
    if !node.is_read_only() {
        taken |= Perm::WRITE | Perm::RESIZE;
    }
    Backend::new(graph, "", node, Permissions::sharing_all(taken))
}

pub async fn open(options: &str) -> Result<Backend> {
    open_with(&graph(), options, OpenFlags { unmap: true, ..OpenFlags::default() }).await
}

/// Opens the existing file at `path`. `options` (`,key=value`) are added to its name.
pub async fn open_file(path: &Path, options: &str) -> Result<Backend> {
    let name = text(path).replace(',', ",,");
    open(&format!("driver=file,filename={name}{options}")).await
}

pub async fn read(backend: &Backend, offset: u64, len: usize) -> Vec<u8> {
    backend.read(offset, IoBufMut::new(len)).await.unwrap().to_vec()
}

pub async fn write(backend: &Backend, offset: u64, data: &[u8]) {
    backend.write(offset, IoBuf::from(data.to_vec()), WriteFlags::empty()).await.unwrap();
}

pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap().wrapping_add(seed)).collect()
}

pub fn error<T>(outcome: Result<T>) -> String {
    outcome.err().expect("an error").to_string()
}

//! Reading many tables of one cluster each, and processing them on worker threads.

use futures_util::future::join_all;
use futures_util::stream::{self, Stream, StreamExt as _};
use oxblk_core::{Edge, Result};
use oxblk_ring::IoBufMut;

/// Intended total size in bytes of the batches that are read or processed concurrently. There are at least two batches.
const READ_AHEAD: u64 = 1 << 20;
/// Size of a batch in bytes. A table that is larger is a batch of its own. A worker thread processes one batch per job. The
/// work for a batch takes much longer than passing the batch to the thread.
const BATCH: u64 = 256 << 10;

/// Contiguous tables in the file: the offset of the first table, and for each table the value `T` that the caller passed with
/// its offset.
type Group<T> = (u64, Vec<T>);

/// Reads the tables at `places` concurrently. `places` has a value of the caller and the byte offset for each table. For each
/// table that can be read, calls `parse` on a worker thread. The results have the order of `places`.
pub(in super::super) fn read_tables<T, P, L>(
    file: &Edge,
    cluster_size: u64,
    places: Vec<(T, u64)>,
    parse: L,
) -> impl Stream<Item = (T, Result<P>)> + use<'_, T, P, L>
where
    T: Send + 'static,
    P: Send + 'static,
    L: Fn(&T, IoBufMut) -> P + Clone + Send + 'static,
{
    let per_batch = (BATCH / cluster_size).max(1);
    let batch_bytes = per_batch.saturating_mul(cluster_size);
    let at_once = usize::try_from(READ_AHEAD / batch_bytes).unwrap_or(1).clamp(2, 8);
    stream::iter(Batches { places: places.into_iter(), per_batch })
        .map(move |batch| {
            let parse = parse.clone();
            async move {
                let read = read_batch(file, cluster_size, batch).await;
                let work = move || {
                    let parsed = |(tag, table): (T, Result<IoBufMut>)| {
                        let parsed = table.map(|table| parse(&tag, table));
                        (tag, parsed)
                    };
                    read.into_iter().map(parsed).collect::<Vec<_>>()
                };
                oxblk_ring::offload(work).await
            }
        })
        .buffered(at_once)
        .flat_map(stream::iter)
}

/// Splits the places into batches, one for each job of a worker thread.
struct Batches<T> {
    places: std::vec::IntoIter<(T, u64)>,
    per_batch: u64,
}

impl<T> Iterator for Batches<T> {
    type Item = Vec<(T, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        let count = usize::try_from(self.per_batch).unwrap_or(1);
        let batch: Vec<_> = self.places.by_ref().take(count).collect();
        (!batch.is_empty()).then_some(batch)
    }
}

fn group_contiguous<T>(batch: Vec<(T, u64)>, cluster_size: u64) -> Vec<Group<T>> {
    let mut groups: Vec<Group<T>> = Vec::new();
    let mut next = None;
    for (tag, offset) in batch {
        match groups.last_mut() {
            Some((_, tags)) if next == Some(offset) => tags.push(tag),
            _ => groups.push((offset, vec![tag])),
        }
        next = offset.checked_add(cluster_size);
    }
    groups
}

/// Reads the tables of a batch into one allocation, because many small allocations would fragment the heap.
async fn read_batch<T>(
    file: &Edge,
    cluster_size: u64,
    batch: Vec<(T, u64)>,
) -> Vec<(T, Result<IoBufMut>)> {
    let size = usize::try_from(cluster_size).unwrap_or(usize::MAX);
    let mut memory = IoBufMut::new(size.saturating_mul(batch.len()));
    let reads = group_contiguous(batch, cluster_size).into_iter().map(|(offset, tags)| {
        let buf = memory.split_to(size.saturating_mul(tags.len()));
        read_group(file, cluster_size, offset, tags, buf)
    });
    let reads: Vec<_> = reads.collect();
    join_all(reads).await.into_iter().flatten().collect()
}

/// Reads contiguous clusters with one read. If this read fails, reads the clusters one by one, so that each cluster has its
/// own result.
async fn read_group<T>(
    file: &Edge,
    cluster_size: u64,
    offset: u64,
    tags: Vec<T>,
    buf: IoBufMut,
) -> Vec<(T, Result<IoBufMut>)> {
    let size = usize::try_from(cluster_size).unwrap_or(usize::MAX);
    let count = tags.len();
    let mut read = Vec::with_capacity(count);
    match file.read(offset, buf).await {
        Ok(mut whole) => {
            read.extend(tags.into_iter().map(|tag| (tag, Ok(whole.split_to(size)))));
        }
        Err(error) if count == 1 => {
            read.extend(tags.into_iter().zip([Err(error)]));
        }
        Err(_) => {
            for (tag, index) in tags.into_iter().zip(0_u64..) {
                let at = offset.saturating_add(index.saturating_mul(cluster_size));
                read.push((tag, file.read(at, IoBufMut::new(size)).await));
            }
        }
    }
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_tables_are_read_with_one_request() {
        let groups = group_contiguous(vec![('a', 512), ('b', 1024), ('c', 4096), ('d', 1024)], 512);
        let expected = vec![(512, vec!['a', 'b']), (4096, vec!['c']), (1024, vec!['d'])];
        assert_eq!(groups, expected);
    }
}

//! Creating images: writes the layout that `plan` computes for the checked options (see `create_options`).
//!
//! The sizes of all structures are known before the first write, so the refcounts are written once with their final values. The
//! header is written after all tables are written and flushed. In an empty file that can grow, a large or preallocated image
//! without a LUKS header is first created with size 0 and then resized. The resize writes the full size to the header last.
//! So, if a creation in an empty file fails or is killed, the file contains no valid header, an image of size 0, or the
//! complete image.

use std::sync::Arc;

use futures_util::stream::{self, TryStreamExt};
use oxblk_core::{Edge, Error, Options, Preallocation, Result, Secrets, WriteFlags, ZeroFlags};
use oxblk_ring::IoBufMut;

pub use super::create_options::{CREATE_OPTIONS, Wanted};
use super::image_state::header::read_header;
use super::layout::L1Entry;
use super::open::open_new;
use super::plan::{Plan, put_entries, too_large};

/// Maximum number of table clusters that are written concurrently.
const IN_FLIGHT: usize = 8;

/// Checks the options of a new image.
///
/// # Errors
/// The same errors as [`create`] for wrong options.
pub(super) fn check(options: Options, secrets: &Secrets) -> Result<()> {
    let wanted = Wanted::from_options(options, false)?;
    wanted.encryption.password(secrets)?;
    let plan = wanted.plan()?;
    encode_header(&wanted, &plan).map(drop)
}

/// Writes a new image into `file`. The old contents of `file` are lost. `data` is the data file, if the image has one.
///
/// # Errors
/// When the options are wrong, with the message of QEMU's tools; the errors of requests to the image file and the data file.
pub async fn create(
    file: &Arc<Edge>,
    data: Option<&Arc<Edge>>,
    options: Options,
    secrets: &Secrets,
) -> Result<()> {
    let wanted = Wanted::from_options(options, data.is_some())?;
    wanted.encryption.password(secrets)?;
    if grows_to_its_size(data.unwrap_or(file), &wanted)? {
        return create_and_grow(file, data, wanted, secrets).await;
    }
    write_new(file, data.map(|data| &**data), &wanted, secrets).await
}

/// Whether the image is created with size 0 and then resized to its full size, with preallocation. This is so if the image has
/// no LUKS header and is preallocated or needs more than one refcount block. In addition, `file`, which contains the guest
/// data, must be empty, must be able to grow, and must read as zeroes where it is not written.
fn grows_to_its_size(file: &Edge, wanted: &Wanted) -> Result<bool> {
    let limits = file.node().limits();
    let is_empty = limits.has_zero_init && limits.grows && file.size() == 0;
    let is_large = wanted.preallocation != Preallocation::Off || wanted.plan()?.blocks > 1;
    Ok(is_large && is_empty && wanted.encryption.header_len() == 0)
}

async fn create_and_grow(
    file: &Arc<Edge>,
    data: Option<&Arc<Edge>>,
    wanted: Wanted,
    secrets: &Secrets,
) -> Result<()> {
    let Wanted { size, preallocation, .. } = wanted;
    let wanted = Wanted { size: 0, preallocation: Preallocation::Off, ..wanted };
    write_new(file, data.map(|data| &**data), &wanted, secrets).await?;
    let image = open_new(file, data, read_header(file).await?).await?;
    let grown = image.resize_image(size, preallocation).await;
    grown.map_err(|error| error.prefix("Could not resize image"))?;
    image.metadata.close_image().await?;
    if let Some(data) = data {
        data.flush().await?;
    }
    file.flush().await
}

/// Writes an image with the size in `wanted` and the layout of its plan.
async fn write_new(
    file: &Edge,
    data: Option<&Edge>,
    wanted: &Wanted,
    secrets: &Secrets,
) -> Result<()> {
    let plan = wanted.plan()?;
    let header = encode_header(wanted, &plan)?;
    let mut first_cluster = plan.cluster()?;
    for (to, from) in first_cluster.iter_mut().zip(&header) {
        *to = *from;
    }
    let contents = preallocate(data.unwrap_or(file), wanted, &plan).await?;
    write_tables(file, &plan, contents == Contents::ZeroByEntry).await?;
    if let Some(crypto) = plan.crypto {
        let area = plan.geometry.clusters_for(crypto.length) * plan.geometry.cluster_size();
        wanted.encryption.write_header(file, crypto.offset, area, secrets).await?;
    }
    // Flush the tables before a header refers to them. Otherwise, after a power cut, the header could refer to old data instead
    // of tables.
    if let Some(data) = data {
        data.flush().await?;
    }
    file.flush().await?;
    file.write(0, first_cluster.freeze(), WriteFlags::empty()).await?;
    file.flush().await
}

/// Encodes the header of the new image.
///
/// # Errors
/// When the header does not fit in a cluster, because a name is too long. The error says which name.
fn encode_header(wanted: &Wanted, plan: &Plan) -> Result<Vec<u8>> {
    let mut header = wanted.header(plan);
    let encoded = header.encode();
    encoded.map_err(|error| {
        header.backing_file = None;
        header.extensions.backing_format = None;
        match header.encode() {
            Ok(_) => backing_fault(wanted, &error),
            Err(error) => header_fault(wanted, &error),
        }
    })
}

/// The error if the header cannot be encoded even without a backing file.
fn header_fault(wanted: &Wanted, error: &Error) -> Error {
    let with = match &wanted.data_file {
        Some(name) => format!(" with data file '{name}'"),
        None => String::new(),
    };
    fault(format_args!("Could not update qcow2 header{with}"), error)
}

/// The error if the header cannot be encoded with the name and the format of the backing file.
fn backing_fault(wanted: &Wanted, error: &Error) -> Error {
    let name = wanted.backing_file.as_deref().unwrap_or_default();
    let format = match &wanted.backing_format {
        Some(format) => format!(" with format '{format}'"),
        None => String::new(),
    };
    fault(format_args!("Could not assign backing file '{name}'{format}"), error)
}

/// An error with the errno of `error`. Its text is `what` and the text of the errno.
fn fault(what: std::fmt::Arguments<'_>, error: &Error) -> Error {
    let reason = oxblk_core::strerror(error.raw_errno());
    Error::new(error.kind(), format!("{what}: {reason}")).errno(error.raw_errno())
}

/// Whether the L2 entries of preallocated clusters need the zero flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    /// The L2 entries need no zero flag. The file reads as zeroes at these clusters, or the guest must read the present
    /// contents of the file, or the subclusters are unallocated, or no clusters are preallocated.
    OfFile,
    /// The file may contain any bytes, so the L2 entries have the zero flag.
    ZeroByEntry,
}

/// Sets the size of `file` as the preallocation mode requires. `file` contains the guest data. A file may contain any bytes,
/// for example if it is a device. Such a file is not overwritten if zero entries in the L2 tables can hide its contents.
async fn preallocate(file: &Edge, wanted: &Wanted, plan: &Plan) -> Result<Contents> {
    let size = match plan.geometry.data_file {
        true => wanted.size,
        false => plan.clusters * plan.geometry.cluster_size(),
    };
    let limits = file.node().limits();
    let is_zero = limits.has_zero_init && limits.grows && file.size() == 0;
    match wanted.preallocation {
        Preallocation::Off if !plan.geometry.data_file => {}
        // The data clusters become holes.
        Preallocation::Off | Preallocation::Metadata => {
            file.resize(size, Preallocation::Off).await?;
        }
        mode => file.resize(size, mode).await.map_err(|error| {
            error.prefix("Could not resize image: Failed to resize underlying file")
        })?,
    }
    // With a raw data file, the guest reads the present contents of that file. With extended L2 entries, the subclusters stay
    // unallocated.
    let shows_file = wanted.data_file_raw || plan.geometry.extended_l2;
    if is_zero || shows_file || plan.data_clusters == 0 {
        return Ok(Contents::OfFile);
    }
    if wanted.version >= 3 {
        return Ok(Contents::ZeroByEntry);
    }
    // Version 2 has neither zero entries nor a data file, so the data clusters in the image file are zeroed.
    file.write_zeroes(plan.l2_offset, size.saturating_sub(plan.l2_offset), ZeroFlags::MAY_UNMAP)
        .await?;
    Ok(Contents::OfFile)
}

async fn write_tables(file: &Edge, plan: &Plan, zero: bool) -> Result<()> {
    let write = async |offset: u64, table: Result<IoBufMut>| {
        file.write(offset, table?.freeze(), WriteFlags::empty()).await
    };
    write(plan.geometry.cluster_size(), plan.refcount_table()).await?;
    stream::iter((0..plan.blocks).map(Ok))
        .try_for_each_concurrent(IN_FLIGHT, |index| {
            write(plan.block_offset(index), plan.refcount_block(index))
        })
        .await?;
    stream::iter((0..plan.l2_tables()).map(Ok))
        .try_for_each_concurrent(IN_FLIGHT, |index| {
            write(plan.table_offset(index), plan.l2_table(index, zero))
        })
        .await?;
    let l1_bytes = u64::from(plan.l1_entries) * 8;
    if plan.data_clusters == 0 {
        if l1_bytes == 0 {
            return Ok(());
        }
        return file.write_zeroes(plan.l1_offset, l1_bytes, ZeroFlags::empty()).await;
    }
    let mut l1 = IoBufMut::zeroed(usize::try_from(l1_bytes).map_err(|_| too_large())?);
    let tables = (0..plan.l2_tables()).map(|index| L1Entry::new(plan.table_offset(index)).0);
    put_entries(&mut l1, tables);
    write(plan.l1_offset, Ok(l1)).await
}

#[cfg(test)]
mod tests {
    use oxblk_core::Errno;

    use super::*;

    fn plan(changes: &[(&str, &str)]) -> Result<Plan> {
        let mut options = Options::new();
        options.insert("size", 1 << 30);
        for (key, value) in changes {
            options.insert(key, *value);
        }
        Wanted::from_options(options, false)?.plan()
    }

    #[test]
    fn an_image_without_preallocation_has_four_clusters() {
        let plan = plan(&[]).unwrap();
        assert_eq!((plan.table_clusters, plan.blocks, plan.clusters), (1, 1, 4));
        assert_eq!((plan.l1_offset, plan.l1_entries), (0x3_0000, 2));
    }

    #[test]
    fn refcounts_cover_every_cluster_and_themselves() {
        for (cluster_size, bits) in [("512", "64"), ("512", "1"), ("4k", "16"), ("2M", "64")] {
            let options = [
                ("cluster_size", cluster_size),
                ("refcount_bits", bits),
                ("preallocation", "metadata"),
            ];
            let plan = plan(&options).unwrap();
            let geometry = plan.geometry;
            assert!(plan.blocks * geometry.refcounts_per_block() >= plan.clusters);
            assert!((plan.blocks - 1) * geometry.refcounts_per_block() < plan.clusters);
            let table_bytes = u64::from(plan.table_clusters) * geometry.cluster_size();
            assert!(table_bytes >= plan.blocks * 8);
            let last_table = plan.l2_tables() - 1;
            let in_last = plan.data_clusters - last_table * geometry.l2_entries();
            let end = plan.table_offset(last_table) + (1 + in_last) * geometry.cluster_size();
            assert_eq!(end, plan.clusters * geometry.cluster_size());
        }
    }

    #[test]
    fn a_size_that_needs_too_large_an_l1_table_is_refused() {
        let error = plan(&[("size", "7E")]).unwrap_err();
        assert_eq!(error.raw_errno(), Errno::FBIG);
        assert!(plan(&[("size", "200G"), ("cluster_size", "512")]).is_err());
    }
}

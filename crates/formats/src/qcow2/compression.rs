//! Compressing and decompressing one cluster in memory, without I/O.
//!
//! An L2 entry stores the length of compressed data in whole sectors only. So the input of a decoder can have trailing bytes
//! that are not part of the stream. The output must fill the cluster, and a decoder never writes more than one cluster, even if
//! the stream is damaged.
//!
//! The compression type zlib is raw deflate with a window of 4 KiB, because QEMU's decoder has no larger window. libdeflate
//! cannot limit its window, so this module uses libdeflate only for decompression. libdeflate rejects a stream that has no end
//! mark, or that continues behind the end of the cluster, even if the output fills the cluster. QEMU accepts such a stream if
//! its decoder finds no error before it needs more space, so this module decompresses it with the streaming decoder of zlib-rs.
//!
//! The contexts of the codecs are large, so each thread keeps one set.

use std::cell::RefCell;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use oxblk_core::{Errno, Error, ErrorKind, Result};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::layout::Compression;

/// Binary logarithm of the size of the deflate window of QEMU's decoder.
const WINDOW_BITS: u8 = 12;
/// Binary logarithm of the largest deflate window. A decoder with this window can decompress every valid stream.
const MAX_WINDOW_BITS: u8 = 15;
/// Default compression level of zlib.
const ZLIB_LEVEL: u32 = 6;
/// Default compression level of Zstandard.
const ZSTD_LEVEL: i32 = 3;

#[derive(Default)]
struct Contexts {
    deflate: Option<Compress>,
    inflate: Option<libdeflater::Decompressor>,
    inflate_stream: Option<Decompress>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    unzstd: Option<Decoder<'static>>,
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> = RefCell::default();
}

/// Compresses a cluster. `None` if the result would not be smaller than the cluster.
///
/// # Errors
/// For Zstandard, when memory runs out.
pub fn compress(method: Compression, cluster: &[u8]) -> Result<Option<Vec<u8>>> {
    let room = cluster.len().saturating_sub(1);
    CONTEXTS.with_borrow_mut(|contexts| match method {
        Compression::Zlib => Ok(contexts.deflate(cluster, room)),
        Compression::Zstd => contexts.zstd(cluster, room),
    })
}

/// Decompresses `data` into `cluster`. `data` may have trailing bytes. The output fills `cluster`.
///
/// # Errors
/// `EIO` if the data cannot be decompressed to a whole cluster. A Zstandard stream that decompresses to more than a cluster is
/// also an error.
pub fn decompress(method: Compression, data: &[u8], cluster: &mut [u8]) -> Result<()> {
    let done = CONTEXTS.with_borrow_mut(|contexts| match method {
        Compression::Zlib => contexts.inflate(data, cluster),
        Compression::Zstd => contexts.unzstd(data, cluster),
    });
    done.ok_or_else(|| {
        Error::corrupt(format!("compressed cluster is no valid {} stream", method.name()))
            .reword("Input/output error")
    })
}

impl Contexts {
    fn deflate(&mut self, cluster: &[u8], room: usize) -> Option<Vec<u8>> {
        let context = self.deflate.get_or_insert_with(|| {
            Compress::new_with_window_bits(flate2::Compression::new(ZLIB_LEVEL), false, WINDOW_BITS)
        });
        context.reset();
        let mut out = vec![0; deflate_bound(cluster.len())];
        match context.compress(cluster, &mut out, FlushCompress::Finish) {
            Ok(Status::StreamEnd) => {
                let len = usize::try_from(context.total_out()).ok()?;
                out.truncate(len);
                (len <= room).then_some(out)
            }
            _ => {
                // If a stream was not finished, a reset of the context does not reset the position of zlib-rs in the output
                // buffer. The next use of the context then panics when this position passes the end of the buffer. So the
                // context is dropped.
                self.deflate = None;
                None
            }
        }
    }

    fn inflate(&mut self, data: &[u8], cluster: &mut [u8]) -> Option<()> {
        let fast = self.inflate.get_or_insert_default();
        if fast.deflate_decompress(data, cluster) == Ok(cluster.len()) {
            return Some(());
        }
        let slow = self
            .inflate_stream
            .get_or_insert_with(|| Decompress::new_with_window_bits(false, MAX_WINDOW_BITS));
        slow.reset(false);
        // Without an end mark, the decoder continues behind the last byte of the cluster, and may find invalid data there.
        // Bytes behind an end mark are not read.
        let status = slow.decompress(data, cluster, FlushDecompress::Finish);
        (status.is_ok() && slow.total_out() == cluster.len() as u64).then_some(())
    }

    fn zstd(&mut self, cluster: &[u8], room: usize) -> Result<Option<Vec<u8>>> {
        if self.zstd.is_none() {
            self.zstd = Some(zstd::bulk::Compressor::new(ZSTD_LEVEL)?);
        }
        let Some(context) = &mut self.zstd else { return Ok(None) };
        let mut out = vec![0; room];
        // The context exists, so an error means that the output buffer is too small, unless memory runs out.
        match context.compress_to_buffer(cluster, out.as_mut_slice()) {
            Ok(len) => {
                out.truncate(len);
                Ok(Some(out))
            }
            Err(error) if error.kind() == std::io::ErrorKind::OutOfMemory => {
                Err(Error::new(ErrorKind::Io, "Cannot allocate memory").errno(Errno::NOMEM))
            }
            Err(_) => Ok(None),
        }
    }

    fn unzstd(&mut self, data: &[u8], cluster: &mut [u8]) -> Option<()> {
        if self.unzstd.is_none() {
            self.unzstd = Some(Decoder::new().ok()?);
        }
        let context = self.unzstd.as_mut()?;
        context.reinit().ok()?;
        let len = cluster.len();
        let mut input = InBuffer::around(data);
        let mut output = OutBuffer::around(cluster);
        // The data may contain several frames. The last frame must end exactly where the cluster ends.
        loop {
            let before = (input.pos(), output.pos());
            let expects_more = context.run(&mut input, &mut output).ok()?;
            if output.pos() == len {
                return (expects_more == 0).then_some(());
            }
            if (input.pos(), output.pos()) == before {
                return None;
            }
        }
    }
}

/// Upper bound of the compressed size of `len` bytes (zlib's bound for any window). A buffer of this size lets deflate finish
/// in one call.
fn deflate_bound(len: usize) -> usize {
    len.saturating_add(len / 8).saturating_add(len / 64).saturating_add(64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const METHODS: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    /// Compressible bytes whose repetitions are further apart than QEMU's window.
    fn compressible(len: usize) -> Vec<u8> {
        let mut state = 7u32;
        let noise: Vec<u8> = (0..6000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0] & 0x1f
            })
            .collect();
        noise.iter().copied().cycle().take(len).collect()
    }

    #[test]
    fn clusters_of_every_size_decompress_despite_trailing_bytes() {
        for method in METHODS {
            for bits in 9..=21 {
                let cluster = compressible(1 << bits);
                let mut data = compress(method, &cluster).unwrap().unwrap();
                assert!(data.len() < cluster.len());
                data.extend([0xa5; 600]);
                let mut back = vec![0; cluster.len()];
                decompress(method, &data, &mut back).unwrap();
                assert!(back == cluster, "{method:?} {bits}");
            }
        }
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        let byte = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        };
        (0..len).map(byte).collect()
    }

    #[test]
    fn random_bytes_are_not_compressed() {
        for method in METHODS {
            assert_eq!(compress(method, &noise(65_536)).unwrap(), None);
        }
    }

    #[test]
    fn a_cluster_compresses_after_an_incompressible_cluster() {
        for method in METHODS {
            for bits in [9, 12, 16, 21] {
                for _ in 0..20 {
                    assert_eq!(compress(method, &noise(1 << bits)).unwrap(), None);
                    let cluster = compressible(1 << bits);
                    let data = compress(method, &cluster).unwrap().unwrap();
                    let mut back = vec![0; cluster.len()];
                    decompress(method, &data, &mut back).unwrap();
                    assert!(back == cluster, "{method:?} {bits}");
                }
            }
        }
    }

    #[test]
    fn deflate_streams_use_only_the_window_of_qemus_decoder() {
        let cluster = compressible(65_536);
        let data = compress(Compression::Zlib, &cluster).unwrap().unwrap();
        let mut narrow = Decompress::new_with_window_bits(false, WINDOW_BITS);
        let mut back = vec![0; cluster.len()];
        // The output is produced in small steps, because the decoder would use one large output buffer as its window.
        while narrow.total_out() < cluster.len() as u64 {
            let from = usize::try_from(narrow.total_in()).unwrap();
            let at = usize::try_from(narrow.total_out()).unwrap();
            let mut piece = [0; 1024];
            narrow.decompress(&data[from..], &mut piece, FlushDecompress::None).unwrap();
            let len = usize::try_from(narrow.total_out()).unwrap() - at;
            back[at..at + len].copy_from_slice(&piece[..len]);
        }
        assert!(back == cluster);
    }

    #[test]
    fn a_stream_with_less_than_a_cluster_is_an_error() {
        for method in METHODS {
            let data = compress(method, &[0; 4096]).unwrap().unwrap();
            let mut cluster = [0; 8192];
            let error = decompress(method, &data, &mut cluster).unwrap_err();
            assert_eq!((error.raw_errno(), error.to_string().as_str()), (5, "Input/output error"));
        }
    }

    #[test]
    fn a_deflate_stream_with_more_than_a_cluster_fills_the_cluster() {
        let long = compressible(8192);
        let data = compress(Compression::Zlib, &long).unwrap().unwrap();
        let mut cluster = [0; 4096];
        decompress(Compression::Zlib, &data, &mut cluster).unwrap();
        assert!(cluster[..] == long[..4096]);
    }

    #[test]
    fn a_deflate_stream_needs_no_trailing_bytes_but_must_not_be_truncated() {
        let cluster = compressible(4096);
        let data = compress(Compression::Zlib, &cluster).unwrap().unwrap();
        let mut back = [0; 4096];
        assert!(decompress(Compression::Zlib, &data[..data.len() / 2], &mut back).is_err());
        decompress(Compression::Zlib, &data, &mut back).unwrap();
        assert!(back[..] == cluster[..]);
    }

    #[test]
    fn a_deflate_stream_without_an_end_mark_must_not_continue_with_invalid_data() {
        let cluster = compressible(4096);
        let mut context =
            Compress::new_with_window_bits(flate2::Compression::new(6), false, WINDOW_BITS);
        let mut data = vec![0; deflate_bound(cluster.len())];
        context.compress(&cluster, &mut data, FlushCompress::Sync).unwrap();
        data.truncate(usize::try_from(context.total_out()).unwrap());
        // The three lowest bits of a byte are the type of the next block. A byte of 0x02 or 0x03 begins a valid block.
        for (byte, is_valid) in [(0, false), (2, true), (3, true), (4, false), (6, false)] {
            let continued = [&data[..], &[byte; 600]].concat();
            let mut back = [0; 4096];
            let outcome = decompress(Compression::Zlib, &continued, &mut back);
            assert_eq!(outcome.is_ok(), is_valid, "{byte:#x}: {outcome:?}");
            assert!(!is_valid || back[..] == cluster[..], "{byte:#x}");
        }
    }

    proptest! {
        #[test]
        fn decompressing_any_bytes_does_not_panic(
            data in prop::collection::vec(any::<u8>(), 0..2000)
        ) {
            for method in METHODS {
                let mut cluster = [0; 4096];
                let _ = decompress(method, &data, &mut cluster);
            }
        }
    }
}

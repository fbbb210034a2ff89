//! Fuzzes the server's handshake with arbitrary bytes. The handshake never panics, gives the same answer for every split of the
//! input, and writes less than 4096 bytes per step. Requests that are accepted after the handshake lie inside the export.

use oxblk_nbd::info::BlockSizes;
use oxblk_nbd::proto::TransmissionFlags;
use oxblk_nbd::{Catalog, Command, ExportInfo, Limits, Negotiation, Progress, RawRequest};
use std::sync::Arc;

fn catalog() -> Arc<Catalog> {
    let export = |name: &str| ExportInfo {
        name: name.to_owned(),
        description: Some("text".to_owned()),
        size: 1 << 30,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
        sizes: BlockSizes::default(),
    };
    Arc::new(Catalog::new(vec![export("disk"), export("")]))
}

/// Feeds `input` in pieces. Returns the output, the state at the end, and the number of bytes that were consumed.
fn feed(input: &[u8], piece: usize) -> (Vec<u8>, Progress, usize) {
    let mut machine = Negotiation::new(catalog());
    let (mut out, mut pending, mut taken) = (Vec::new(), Vec::new(), 0);
    for bytes in input.chunks(piece) {
        pending.extend_from_slice(bytes);
        loop {
            let before = out.len();
            let (used, progress) = machine.advance(&pending, &mut out);
            assert!(out.len() - before < 4096);
            pending.drain(..used);
            taken += used;
            match progress {
                Progress::Again => {}
                Progress::More => break,
                end => return (out, end, taken),
            }
        }
    }
    (out, Progress::More, taken)
}

/// Runs one input.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let Some((&piece, input)) = data.split_first() else { return };
    let whole = feed(input, usize::MAX);
    let (out, end, taken) = feed(input, usize::from(piece).max(1));
    assert_eq!((&whole.0, whole.1), (&out, end));
    if let Progress::Ready(session) = end {
        let limits = Limits {
            size: session.size,
            flags: session.flags,
            maximum: 32 << 20,
            contexts: session.base_allocation.is_some(),
        };
        let rest = input.get(taken..).unwrap_or(&[]);
        for header in rest.chunks_exact(28) {
            let Ok(request) = RawRequest::parse(header.try_into().unwrap()) else { return };
            let Ok(request) = request.check(&limits) else { continue };
            // `Disconnect` and `Flush` have no range.
            if !matches!(request.command, Command::Disconnect | Command::Flush) {
                let end = request.offset.checked_add(u64::from(request.length));
                assert!(end.is_some_and(|end| end <= limits.size));
            }
            if matches!(request.command, Command::Read { .. } | Command::Write { .. }) {
                assert!(request.length <= limits.maximum);
            }
        }
    }
}

//! The size of the file that a new image would need. The driver of the format computes it.

use oxblk_core::create::{Measure, MeasureRequest};
use oxblk_core::{Backend, Error, Graph, Options};

use crate::Result;

/// Computes, on the calling I/O thread, how many bytes a new image of the format with this name would need. The image has
/// the contents of `source`, or it is empty and has the size that the options name.
///
/// # Errors
/// If the format is unknown or cannot compute it, or if an option is invalid; the errors of the source.
pub async fn measure(
    graph: &Graph,
    format: &str,
    options: Options,
    source: Option<&Backend>,
) -> Result<Measure> {
    let request = MeasureRequest { options, source, secrets: graph.secrets() };
    match graph.driver(format)?.measure(request) {
        Some(measured) => measured.await,
        None => {
            let text = format!("Block driver '{format}' does not support size measurement");
            Err(Error::unsupported(text))
        }
    }
}

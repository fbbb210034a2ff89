//! The size that the file of a new image would have. The driver of the format computes the size.

use oxblk_core::create::{Measure, MeasureRequest};
use oxblk_core::{Backend, Error, Graph, Options};

use crate::Result;

/// Computes, on the calling I/O thread, the file size of a new image of the format `format`. The image has the contents of
/// `source`. Without a source, the image is empty and has the size in the option `size`.
///
/// # Errors
/// If the format is unknown or has no measurement, or if an option is invalid; otherwise the errors of requests to the source.
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

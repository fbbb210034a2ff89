//! Chains of images on simulated disks: functions that create, open, close and check images.

use std::sync::Arc;

use oxblk_core::check::{CheckReport, Finding, Fix};
use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::{
    Attachment, Backend, ChildIdx, Graph, Node, OpenFlags, Options, Perm, Permissions,
};
use oxblk_ring::sim::Disk;

use crate::filters::disks::Disks;
use crate::filters::{self, Side};
use crate::formats::{self, Variant};
use crate::sim_disk::{self, Pace, Part};

/// The part of the disk for the image. The image and its data file are on one disk, so that a power cut affects both at the
/// same moment.
pub(crate) const MAIN: Part = Part::First(SPLIT);
/// The part of the disk for the data file.
pub(crate) const DATA: Part = Part::Behind(SPLIT);
/// The byte offset on the disk where the part for the data file begins.
pub(crate) const SPLIT: u64 = 8 << 20;

/// One image of a chain: its variant and its disk.
#[derive(Clone, Debug)]
pub struct Image {
    /// The variant of the image.
    pub variant: &'static Variant,
    /// The simulated disk that contains the image.
    pub disk: Disk,
}

/// The images of a chain, base first, active image last.
pub type Chain = Vec<Image>;

fn text(error: &oxblk_core::Error) -> String {
    error.to_string()
}

/// Makes a graph with all drivers of the product and the secrets of encrypted images.
pub fn graph() -> Graph {
    Graph::with_secrets(oxblk::drivers(), oxblk_core::Gate::Anything, formats::secrets())
}

/// Creates an empty image on a disk. If the variant has bitmaps, adds the bitmaps of [`super::bitmaps`].
///
/// # Errors
/// The error that the driver reports.
pub async fn create(image: &Image, size: u64) -> Result<(), String> {
    create_plain(image, size).await?;
    if image.variant.bitmaps {
        let disk = open(std::slice::from_ref(image)).await?;
        super::bitmaps::add(&disk).await?;
        close(disk).await?;
    }
    Ok(())
}

async fn create_plain(image: &Image, size: u64) -> Result<(), String> {
    let graph = graph();
    let mut options =
        Options::from_dotted(&image.variant.exact_options(), None).map_err(|e| text(&e))?;
    options.insert("size", size);
    let node = add(&graph, image, "disk", MAIN, false, Pace::AtOnce)?;
    let attach = |node: &Arc<Node>, child: ChildIdx| {
        let permissions =
            Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
        Attachment::new(node, "the test".to_owned(), child.name(), permissions)
            .map_err(|e| text(&e))
    };
    let edge = attach(&node, ChildIdx::FILE)?;
    let mut data = None;
    if image.variant.data_file {
        let node = add(&graph, image, "data", DATA, false, Pace::AtOnce)?;
        data = Some(attach(&node, ChildIdx::DATA)?);
    }
    let target = match &data {
        Some(data) => {
            CreateTarget::Files { file: Arc::clone(edge.edge()), data: Arc::clone(data.edge()) }
        }
        None => CreateTarget::File(Arc::clone(edge.edge())),
    };
    let request = CreateRequest { target, options };
    let driver = graph.driver(image.variant.driver()).map_err(|e| text(&e))?;
    let created = match driver.create(&graph, request) {
        Some(creation) => match creation.await {
            // The creation of an image does not flush, so flush here.
            Ok(()) => edge.flush().await.map_err(|e| text(&e)),
            Err(error) => Err(text(&error)),
        },
        None => Err(format!("{} cannot create", image.variant.driver())),
    };
    for edge in [Some(edge), data].into_iter().flatten() {
        let node = edge.node().clone();
        drop(edge);
        graph.release(node).await.map_err(|e| text(&e))?;
    }
    created
}

/// Adds the node of one file of an image.
fn add(
    graph: &Graph,
    image: &Image,
    name: &str,
    part: Part,
    read_only: bool,
    pace: Pace,
) -> Result<Arc<Node>, String> {
    let part = if image.variant.data_file { part } else { Part::Whole };
    sim_disk::add_part(graph, name, (&image.disk, part), read_only, pace).map_err(|e| text(&e))
}

/// Opens a chain: the last image for reading and writing, the images before it as its backing files.
///
/// # Errors
/// The errors that the drivers report.
pub async fn open(chain: &[Image]) -> Result<Backend, String> {
    open_at(chain, None, Pace::AtOnce).await
}

/// Opens a chain with filters above and below the active image, on the disks of the filters.
///
/// # Errors
/// The errors that the drivers report.
pub(crate) async fn open_filtered(chain: &[Image], disks: &Disks) -> Result<Backend, String> {
    open_at(chain, Some(disks), Pace::AtOnce).await
}

/// Opens a chain whose disks often yield to other tasks and whose metadata caches are small. Use this function outside the
/// simulated executor.
///
/// # Errors
/// The errors that the drivers report.
pub async fn open_slow(chain: &[Image]) -> Result<Backend, String> {
    open_at(chain, None, Pace::GivesWay).await
}

async fn open_at(chain: &[Image], disks: Option<&Disks>, pace: Pace) -> Result<Backend, String> {
    let graph = if disks.is_some() { filters::graph() } else { graph() };
    let mut below = None;
    for (index, image) in chain.iter().enumerate() {
        let top = index + 1 == chain.len();
        let disks = disks.filter(|_| top);
        let disk = format!("disk{index}");
        let on = disks.map_or(&image.disk, Disks::image_disk);
        let image = &Image { disk: on.clone(), ..image.clone() };
        graph.keep_open(add(&graph, image, &disk, MAIN, !top, pace)?).map_err(|e| text(&e))?;
        let mut options = Options::new();
        options.insert("driver", image.variant.driver());
        options.insert("node-name", format!("image{index}"));
        match disks {
            Some(disks) => {
                add_copies(&graph, disks)?;
                options.insert("file", disks.wrap(Side::Below, disk.into()));
            }
            None => options.insert("file", disk),
        }
        image.variant.add_open_options(&mut options);
        if pace == Pace::GivesWay {
            image.variant.format.limit_caches(image.variant, &mut options);
        }
        if image.variant.data_file {
            let data = format!("data{index}");
            graph.keep_open(add(&graph, image, &data, DATA, !top, pace)?).map_err(|e| text(&e))?;
            options.insert("data-file", data);
        }
        if let Some(name) = below {
            options.insert("backing", name);
        }
        // Chains of three images use copy-on-read.
        let copy_on_read = top && chain.len() == 3;
        let flags =
            OpenFlags { read_only: !top, unmap: true, copy_on_read, ..OpenFlags::default() };
        if top {
            let options = match disks {
                Some(disks) => filters::options(&disks.wrap(Side::Above, options.to_json())),
                None => options,
            };
            return graph.open_backend(None, options, flags).await.map_err(|e| text(&e));
        }
        let node = graph.open(options, flags).await.map_err(|e| text(&e))?;
        graph.keep_open(node).map_err(|e| text(&e))?;
        below = Some(format!("image{index}"));
    }
    Err("an empty chain".to_owned())
}

/// Adds the nodes of the copies that filters use.
fn add_copies(graph: &Graph, disks: &Disks) -> Result<(), String> {
    for (name, disk) in [Side::Below, Side::Above].into_iter().flat_map(|side| disks.copies(side)) {
        let node = sim_disk::add(graph, &name, disk, false, Pace::AtOnce).map_err(|e| text(&e))?;
        graph.keep_open(node).map_err(|e| text(&e))?;
    }
    Ok(())
}

/// Closes a chain.
///
/// # Errors
/// The errors that the drivers report.
pub async fn close(backend: Backend) -> Result<(), String> {
    let graph = backend.graph().clone();
    backend.close().await.map_err(|e| text(&e))?;
    drop(backend);
    let mut nodes = graph.nodes();
    nodes.sort_by_key(|node| std::cmp::Reverse(node.name().to_owned()));
    for node in nodes {
        graph.allow_close(node).await.map_err(|e| text(&e))?;
    }
    Ok(())
}

/// The faults that the driver's check may find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// No fault: the image was closed.
    Clean,
    /// Leaked clusters: the image was not closed before the power cut.
    Leaks,
}

/// Runs the driver's check on an image that is not open or, if the driver has no check, `qemu-img check`.
///
/// # Errors
/// Describes the faults that the check found.
pub async fn check(image: &Image, tolerance: Tolerance) -> Result<(), String> {
    let Some((report, findings)) = examine(image, Fix::Nothing).await? else {
        return crate::crash::qemu::check(image.variant, &image.disk, tolerance);
    };
    let bad = report.corruptions + report.check_errors > 0
        || (tolerance == Tolerance::Clean && report.leaks > 0);
    if bad {
        return Err(format!("check: {report:?}\n{findings}"));
    }
    Ok(())
}

/// Runs the driver's check on an image that is not open, and repairs faults. Returns the report and the findings. `None`: the
/// driver has no check.
///
/// # Errors
/// The errors that the driver reports.
pub(crate) async fn examine(
    image: &Image,
    fix: Fix,
) -> Result<Option<(CheckReport, String)>, String> {
    let graph = graph();
    let read_only = fix == Fix::Nothing;
    let own = |node| graph.keep_open(node).map_err(|e| text(&e));
    own(add(&graph, image, "disk", MAIN, read_only, Pace::AtOnce)?)?;
    let mut options = Options::new();
    options.insert("driver", image.variant.driver());
    options.insert("file", "disk");
    image.variant.add_open_options(&mut options);
    if image.variant.data_file {
        own(add(&graph, image, "data", DATA, read_only, Pace::AtOnce)?)?;
        options.insert("data-file", "data");
    }
    let flags = OpenFlags { read_only, no_backing: true, check: true, ..OpenFlags::default() };
    let backend = graph.open_backend(None, options, flags).await.map_err(|e| text(&e))?;
    let node = backend.node().map_err(|e| text(&e))?;
    let findings = std::cell::RefCell::new(String::new());
    let report_finding = |finding: Finding| {
        findings.borrow_mut().push_str(&finding.text);
        findings.borrow_mut().push('\n');
    };
    let report = match node.driver().check() {
        Some(check) => Some(check.check(fix, &report_finding).await.map_err(|e| text(&e))),
        None => None,
    };
    drop(node);
    let closed = close(backend).await;
    let report = report.transpose()?;
    closed?;
    Ok(report.map(|report| (report, findings.into_inner())))
}

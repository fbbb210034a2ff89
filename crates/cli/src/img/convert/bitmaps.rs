//! Copying persistent bitmaps for `convert --bitmaps`.

use std::sync::Arc;

use oxblk_core::bitmap::DirtyBitmap;
use oxblk_core::{Backend, Error};

use super::super::{Context, Exit, Step};
use super::arguments::Arguments;

fn supports_bitmaps(image: &Backend) -> Result<bool, Error> {
    let node = image.node()?;
    Ok(node.driver().persistent_bitmaps().is_some_and(|bitmaps| bitmaps.are_supported()))
}

fn persistent(image: &Backend) -> Result<Vec<Arc<DirtyBitmap>>, Error> {
    let all = image.node()?.bitmaps().snapshot();
    // The newest bitmap first, as in QEMU.
    Ok(all.iter().rev().filter(|bitmap| bitmap.is_persistent()).cloned().collect())
}

/// With `--bitmaps`, checks whether the bitmaps of the source can be copied. Called before the target is created.
pub(super) fn check_sources(context: &Context, arguments: &Arguments, sources: &[Backend]) -> Step {
    match (arguments.bitmaps, sources) {
        (None, _) => Ok(()),
        (Some(skip_broken), [source]) => check_source(context, source, skip_broken),
        (Some(_), _) => Err(context.failed("Copying bitmaps only possible with single source")),
    }
}

fn check_source(context: &Context, source: &Backend, skip_broken: bool) -> Step {
    if !supports_bitmaps(source).map_err(|error| context.error(&error))? {
        return Err(context.failed("Source lacks bitmap support"));
    }
    let bitmaps = persistent(source).map_err(|error| context.error(&error))?;
    match bitmaps.iter().find(|bitmap| bitmap.is_inconsistent()) {
        Some(broken) if !skip_broken => {
            let text = format!("Cannot copy inconsistent bitmap '{}'", broken.name());
            let hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it";
            Err(context.error(&Error::invalid(text).with_hint(hint)))
        }
        _ => Ok(()),
    }
}

/// Checks whether the target can have bitmaps.
pub(super) fn check_target(context: &Context, target: &Backend) -> Step {
    if supports_bitmaps(target).map_err(|error| context.error(&error))? {
        return Ok(());
    }
    let node = target.node().map_err(|error| context.error(&error))?;
    let format = node.factory().name();
    Err(context.failed(format_args!("Format driver '{format}' does not support bitmaps")))
}

/// Copies the bitmaps. Called after the data was copied, so that the new bitmaps do not record the writes of the copy.
pub(super) async fn copy(
    context: &Context,
    source: &Backend,
    target: &Backend,
    skip_broken: bool,
) -> Step {
    let bitmaps = persistent(source).map_err(|error| context.error(&error))?;
    for bitmap in bitmaps {
        if bitmap.is_inconsistent() && skip_broken {
            let name = bitmap.name();
            context.program.warn(format_args!("Skipping inconsistent bitmap '{name}'"));
            continue;
        }
        copy_one(context, &bitmap, target).await?;
    }
    Ok(())
}

/// Adds the copy of a bitmap to the target and merges the contents of `bitmap` into the copy. Each change is a control
/// operation of the graph, as for `img bitmap`.
async fn copy_one(context: &Context, bitmap: &DirtyBitmap, target: &Backend) -> Step {
    let name = bitmap.name();
    let failed = |what: &str, error: &Error| {
        context.program.report_in(format_args!("Failed to {what} bitmap {name}: "), error);
        Exit(1)
    };
    let node = target.node().map_err(|error| context.error(&error))?;
    let graph = target.graph();
    let granularity = Some(bitmap.map().granularity());
    let made = graph.add_persistent_bitmap(&node, name, granularity).await;
    let copy = made.map_err(|error| failed("create", &error))?;
    let filled = async {
        graph.enable_bitmap(&node, name, bitmap.is_recording()).await?;
        graph.merge_bitmap(&node, name, bitmap.everything()?).await
    };
    if let Err(error) = filled.await {
        // Delete the new bitmap. This bitmap has not been written to the image yet.
        let deleted = graph.delete_bitmap(&node, &copy).await;
        let exit = failed("populate", &error);
        deleted.map_err(|error| failed("delete the incomplete", &error))?;
        return Err(exit);
    }
    Ok(())
}

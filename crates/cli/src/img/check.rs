//! `img check`: checks the metadata of an image, and repairs the image if requested. The driver of the format does the
//! work.

use std::sync::{Arc, Mutex};

use oxblk::check::{CheckObserver, CheckReport, Finding, FindingKind, Fix};
use oxblk::{Cache, qapi, qemu_json};
use oxblk_core::Backend;

use super::{Context, Exit, Step, graph};
use crate::flags::page::{Example, Page};
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Value, both};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, writing};
use crate::program::{Program, err, note, out};

// Exit codes, the same as those of `qemu-img check`.
const FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NO_CHECK: u8 = 63;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::format(|a| &mut a.format),
    shared::cache('T', |a| &mut a.cache_name),
    Flag::value(
        both('r', "repair"),
        Value::choice("leaks|all", &["leaks", "all"]),
        "repair leaks, or all faults",
        |a, text| {
            a.fix = fix(&text)?;
            Ok(())
        },
    ),
    shared::output(|a, text| shared::set_json(&mut a.json, &text)),
    shared::object(),
    shared::image_opts(|a| &mut a.image_options),
    shared::force_share(|a| &mut a.share),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img check",
    about: "check the consistency of an image, and repair it",
    usage: "[OPTIONS] FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[],
    exit_codes: &[
        (0, "the image is consistent, or was repaired"),
        (FAILED, "the check failed"),
        (CORRUPT, "the image is corrupt"),
        (LEAKS, "the image has leaked clusters, and no corruption"),
        (NO_CHECK, "the format has no check"),
    ],
    examples: &[
        Example { about: "check an image", arguments: "disk.qcow2" },
        Example { about: "free leaked clusters", arguments: "-r leaks disk.qcow2" },
    ],
};

#[derive(Default)]
struct Arguments {
    quiet: bool,
    format: Option<String>,
    image_options: bool,
    cache_name: Option<String>,
    cache: Cache,
    share: bool,
    json: bool,
    fix: Fix,
    filename: String,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let image = ImageName::file(&arguments.filename, arguments.format.as_deref())
            .options_if(arguments.image_options);
        let options = writing()
            .read_only(arguments.fix == Fix::Nothing)
            .for_check(true)
            .cache(arguments.cache)
            .force_share(arguments.share);
        let backend = image.open_or_report(&context.program, &graph(), options).await?;
        let outcome = check(context, &arguments, &backend).await;
        let closed = backend.close().await;
        let code = outcome?;
        closed.map_err(|error| context.error(&error))?;
        if code == 0 { Ok(()) } else { Err(Exit(code)) }
    })
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments::default();
    let operands = context.parse(FLAGS, words, &mut read)?;
    let [filename] = operands.as_slice() else {
        return Err(context.misused("Expecting one image file name"));
    };
    read.cache = context.cache("source cache", read.cache_name.as_deref())?;
    read.filename.clone_from(filename);
    Ok(read)
}

fn fix(text: &str) -> Result<Fix, Refusal> {
    match text {
        "leaks" => Ok(Fix::Leaks),
        "all" => Ok(Fix::All),
        other => {
            let message = format!("--repair (-r) expects 'leaks' or 'all' not '{other}'");
            Err(Refusal::misused(message))
        }
    }
}

/// Checks the image, repairs the image if requested, prints the report, and returns the exit code.
async fn check(context: &Context, arguments: &Arguments, backend: &Backend) -> Step<u8> {
    let node = backend.node().map_err(|error| context.error(&error))?;
    if node.driver().check().is_none() {
        context.program.error("This image format does not support checks");
        return Err(Exit(NO_CHECK));
    }
    let printer = Printer {
        program: context.program.clone(),
        quiet: arguments.quiet || arguments.json,
        one_at_a_time: Mutex::new(()),
    };
    let checked = oxblk::check::run(backend, arguments.fix, Arc::new(printer)).await;
    let report = checked.map_err(|error| context.failed(format_args!("Check failed: {error}")))?;
    match (arguments.quiet, arguments.json) {
        (true, _) => {}
        (false, true) => {
            let value = qapi::image_check(&report, &arguments.filename, node.factory().name());
            out(format_args!("{}\n", qemu_json::pretty(&value)));
        }
        (false, false) => out(format_args!("{}", human(&report))),
    }
    Ok(match report {
        CheckReport { check_errors: 1.., .. } => FAILED,
        CheckReport { corruptions: 1.., .. } => CORRUPT,
        CheckReport { leaks: 1.., .. } => LEAKS,
        _ => 0,
    })
}

/// Prints the findings.
struct Printer {
    program: Program,
    quiet: bool,
    one_at_a_time: Mutex<()>,
}

impl CheckObserver for Printer {
    fn finding(&self, finding: &Finding) {
        let _turn = self.one_at_a_time.lock();
        match finding.kind {
            // As in QEMU's tools, only these findings begin with the name of the program.
            FindingKind::SnapshotTable => self.program.error(finding),
            _ => err(format_args!("{finding}\n")),
        }
    }

    fn repaired(&self, report: &CheckReport) {
        if !self.quiet {
            note(format_args!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble checking the fixed image now...\n",
                report.leaks_fixed, report.corruptions_fixed
            ));
        }
    }
}

fn human(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    if report.corruptions != 0 {
        text.push_str(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        ));
    }
    if report.leaks != 0 {
        text.push_str(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        ));
    }
    if report.check_errors != 0 {
        text.push_str(&format!(
            "\n{} internal errors have occurred during the check.\n",
            report.check_errors
        ));
    }
    if report.total_clusters != 0 && report.allocated_clusters != 0 {
        text.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        ));
    }
    if report.image_end_offset != 0 {
        text.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "two decimals are printed")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_lists_corruptions_leaks_and_allocated_clusters() {
        let report = CheckReport {
            leaks: 1,
            image_end_offset: 393_216,
            total_clusters: 16,
            allocated_clusters: 1,
            ..CheckReport::default()
        };
        let expected = "\n1 leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n1/16 = 6.25% allocated, 0.00% fragmented, 0.00% compressed clusters\nImage end offset: 393216\n";
        assert_eq!(human(&report), expected);
    }
}

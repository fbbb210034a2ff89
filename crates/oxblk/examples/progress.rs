//! Copies a disk, prints the progress, and stops when Enter is pressed: `progress SOURCE TARGET`.

use std::path::Path;

use oxblk::{Convert, Disk, ErrorKind, Format, Result};

fn main() -> Result<()> {
    let mut names = std::env::args_os().skip(1);
    let (Some(source), Some(target)) = (names.next(), names.next()) else {
        panic!("usage: progress SOURCE TARGET");
    };
    run(source.as_ref(), target.as_ref(), |stop| {
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_line(&mut String::new());
            stop.stop();
        });
    })
}

/// Copies a disk. `stop_later` is called with the handle that stops the copy.
pub fn run(source: &Path, target: &Path, stop_later: impl FnOnce(oxblk::Stop)) -> Result<()> {
    let source = Disk::open_read_only(source).wait()?;
    let convert = Convert::new(&source, target, Format::Qcow2)
        .progress(|done, total| eprint!("\r{done} of {total} bytes"));
    stop_later(convert.stopper());
    match convert.run().wait() {
        Err(error) if error.kind() == ErrorKind::Cancelled => eprintln!("\nstopped"),
        outcome => outcome?,
    }
    source.close().wait()
}

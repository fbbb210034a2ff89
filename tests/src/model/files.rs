//! Chains of image files that four I/O threads use.

use std::fs;
use std::path::PathBuf;

use oxblk_core::{Backend, OpenFlags, Options};
use oxblk_ring::{Config, IoThread};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::filters::{self, START, Side, Stack};
use crate::formats::{self, Variant};
use crate::program::{self, Program, Reply};
use crate::random::Random;
use crate::scratch;

/// The number of I/O threads.
const THREADS: usize = 4;
/// The number of tasks on each thread. Each task has one operation in flight.
const TASKS: usize = 4;

/// How oxblk accesses host files.
#[derive(Clone, Debug)]
pub(super) struct Access {
    /// The I/O engine (the option `aio`).
    pub(super) aio: &'static str,
    /// Whether I/O bypasses the host's page cache.
    pub(super) direct: bool,
    /// Whether copy-on-read is on.
    pub(super) copy_on_read: bool,
    /// The filters above the image and below it.
    pub(super) stack: Stack,
}

/// The files that the filters of an open image use instead of the image's file, and in addition to it.
#[derive(Default)]
struct FilterFiles {
    /// The file with the image, which begins behind [`START`] bytes.
    behind_start: Option<PathBuf>,
    /// Copies of the image's file.
    below: Vec<PathBuf>,
    /// Copies of the disk that the guest sees.
    above: Vec<PathBuf>,
}

/// The image files, base first, and the I/O threads that use the active image.
pub(super) struct Files {
    pub(super) directory: TempDir,
    pub(super) threads: Vec<IoThread>,
    images: Vec<(PathBuf, &'static Variant)>,
    random: Random,
    filter_files: FilterFiles,
}

fn said(reply: &Reply) -> String {
    format!("{}{}", reply.out(), reply.err())
}

impl Files {
    /// An empty chain in this directory.
    pub(super) fn new(directory: TempDir, random: Random) -> Self {
        let start = |n| IoThread::start(&format!("model-{n}"), Config::default());
        let threads = (0..THREADS).map(|n| start(n).expect("a thread")).collect();
        Self {
            directory,
            threads,
            images: Vec::new(),
            random,
            filter_files: FilterFiles::default(),
        }
    }

    pub(super) fn on_thread<T: Send + 'static, F: Future<Output = Result<T, String>> + 'static>(
        &self,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Result<T, String> {
        // No process may inherit the descriptors: other programs open the files right after the close.
        let _held = program::none_starting();
        self.threads[0].spawn(work).wait().map_err(|gone| format!("{gone:?}"))?
    }

    /// Returns the I/O thread of each task. The tasks are distributed evenly.
    pub(super) fn thread_of_each_task(&self) -> impl Iterator<Item = &IoThread> {
        self.threads.iter().cycle().take(THREADS * TASKS)
    }

    /// Returns the options that open the active image, including those that its backing files need.
    fn options(&self, file: Value) -> Result<Options, String> {
        let mut below: Option<Options> = None;
        for (_, variant) in &self.images {
            let mut options = Options::new();
            variant.add_open_options(&mut options);
            if let Some(below) = below.filter(|below| !below.is_empty()) {
                options.insert("backing", below.to_json());
            }
            below = Some(options);
        }
        let mut options = below.ok_or("no image")?;
        options.insert("driver", self.driver().ok_or("no image")?);
        options.insert("file", file);
        Ok(options)
    }

    /// Returns the name by which a QEMU tool opens the active image.
    fn name_for_qemu(&self) -> Result<String, String> {
        let file = json!({ "driver": "file", "filename": self.active() });
        Ok(format!("json:{}", self.options(file)?.to_json()))
    }

    fn active(&self) -> &PathBuf {
        &self.images.last().expect("an active image").0
    }

    /// Creates the next image of the chain, with oxblk or with `qemu-img create`: an overlay of the active image or, in an
    /// empty chain, the base.
    pub(super) fn create(&mut self, variant: &'static Variant, size: u64) -> Result<(), String> {
        let path = self.directory.path().join(format!("image{}", self.images.len()));
        let backing = self.images.last().map(|(path, _)| path.clone()).zip(self.driver());
        if self.random.one_in(2) {
            create_by_qemu(variant, size, &path, backing)?;
        } else {
            self.create_by_us(variant, size, &path, backing)?;
        }
        if variant.bitmaps {
            let add = ["bitmap", "--add", "-g", "4k", "-f", variant.driver()];
            Program::new("qemu-img").args(add).arg(&path).arg("b").succeed();
        }
        self.images.push((path, variant));
        Ok(())
    }

    /// Returns the driver of the active image.
    fn driver(&self) -> Option<&'static str> {
        self.images.last().map(|(_, variant)| variant.driver())
    }

    fn create_by_us(
        &self,
        variant: &'static Variant,
        size: u64,
        path: &std::path::Path,
        backing: Option<(PathBuf, &'static str)>,
    ) -> Result<(), String> {
        let name = path.display().to_string();
        self.on_thread(move || async move {
            let graph = super::chain::graph();
            let mut options =
                Options::from_dotted(&variant.exact_options(), None).map_err(|e| e.to_string())?;
            options.insert("size", size);
            if variant.data_file {
                options.insert("data_file", format!("{name}.data"));
            }
            if let Some((name, format)) = backing {
                options.insert("backing_file", name.display().to_string());
                options.insert("backing_fmt", format);
            }
            let created = graph.create_image(&name, variant.driver(), &options).await;
            created.map(drop).map_err(|e| e.to_string())
        })
    }

    /// Opens the active image, a disk of `size` bytes.
    pub(super) fn open(&mut self, access: Access, size: u64) -> Result<Backend, String> {
        let Access { aio, direct, copy_on_read, stack } = access;
        self.filter_files = self.make_filter_files(&stack)?;
        let FilterFiles { behind_start, below, above } = &self.filter_files;
        let cache = json!({ "direct": direct });
        let node = |path: &PathBuf| json!({ "driver": "file", "filename": path, "aio": aio, "cache": cache });
        let nodes = |paths: &[PathBuf]| paths.iter().map(node).collect::<Vec<_>>();
        let file = node(behind_start.as_ref().unwrap_or(self.active()));
        let file = stack.wrap(Side::Below, file, &nodes(below), size);
        let image = self.options(file)?.to_json();
        let options = filters::options(&stack.wrap(Side::Above, image, &nodes(above), size));
        self.on_thread(move || async move {
            let flags = OpenFlags { unmap: true, copy_on_read, ..OpenFlags::default() };
            let opened = filters::graph().open_backend(None, options, flags).await;
            opened.map_err(|e| e.to_string())
        })
    }

    /// Closes the active image. All copies of its file must then be equal to the file.
    pub(super) fn close(&mut self, disk: Backend) -> Result<(), String> {
        self.on_thread(move || async move { disk.close().await.map_err(|e| e.to_string()) })?;
        let text = |error: std::io::Error| error.to_string();
        if let Some(path) = self.filter_files.behind_start.take() {
            let start = usize::try_from(START).expect("a small number");
            let bytes = fs::read(path).map_err(text)?;
            scratch::write_sparse(self.active(), bytes.get(start..).unwrap_or_default())
                .map_err(text)?;
        }
        let below = std::mem::take(&mut self.filter_files.below);
        if !below.is_empty() {
            check_copies(&below, &fs::read(self.active()).map_err(text)?)?;
        }
        Ok(())
    }

    /// Makes the files that the filters need. The image is not open.
    fn make_filter_files(&self, stack: &Stack) -> Result<FilterFiles, String> {
        let text = |error: std::io::Error| error.to_string();
        let mut files = FilterFiles::default();
        let path = |name: String| self.directory.path().join(name);
        for number in 0..stack.copies(Side::Below) {
            let path = path(format!("copy{number}"));
            fs::copy(self.active(), &path).map_err(text)?;
            files.below.push(path);
        }
        for number in 0..stack.copies(Side::Above) {
            let path = path(format!("guest{number}"));
            let convert = Program::new("qemu-img").args(["convert", "-O", "raw"]);
            let reply = formats::with_secrets(convert).arg(self.name_for_qemu()?).arg(&path).run();
            if reply.code() != 0 {
                return Err(format!("qemu-img convert: {}", said(&reply)));
            }
            files.above.push(path);
        }
        if stack.has_start() {
            let path = path("behind_start".to_owned());
            let start = usize::try_from(START).expect("a small number");
            let image = fs::read(self.active()).map_err(text)?;
            scratch::write_sparse(&path, &[vec![0xa5; start], image].concat()).map_err(text)?;
            files.behind_start = Some(path);
        }
        Ok(files)
    }

    /// Checks that `qemu-img check` finds no fault in the active image. Returns how often `qemu-img check` ran.
    pub(super) fn check_by_qemu(&self, variant: &Variant) -> Result<u64, String> {
        if !variant.check || !variant.checked_by_qemu {
            return Ok(0);
        }
        let check = formats::with_secrets(Program::new("qemu-img").arg("check"));
        let reply = check.arg(self.name_for_qemu()?).run();
        if reply.code() == 0 { Ok(1) } else { Err(format!("qemu-img check: {}", said(&reply))) }
    }

    /// Checks that `qemu-img compare` finds this content in the active image, and that a raw data file and the copies of filters
    /// have the same content.
    pub(super) fn compare_by_qemu(&self, content: &[u8]) -> Result<(), String> {
        check_copies(&self.filter_files.above, content)?;
        let model = self.directory.path().join("model.raw");
        fs::write(&model, content).map_err(|e| e.to_string())?;
        let compare = Program::new("qemu-img").args(["compare", "-F", "raw"]);
        let reply = formats::with_secrets(compare).arg(self.name_for_qemu()?).arg(&model).run();
        if let Some((image, _)) = self.images.last().filter(|(_, image)| image.raw_data) {
            let data = PathBuf::from(format!("{}.data", image.display()));
            let bytes = fs::read(&data).map_err(|e| e.to_string())?;
            // QEMU rounds the length of the data file up to whole clusters.
            let behind = bytes.get(content.len()..).unwrap_or(&[1]);
            if !bytes.starts_with(content) || behind.iter().any(|byte| *byte != 0) {
                return Err(format!("{} is not what a guest reads", data.display()));
            }
        }
        if reply.code() == 0 { Ok(()) } else { Err(format!("qemu-img compare: {}", said(&reply))) }
    }

    /// Keeps the files for the analysis of a failure. Returns a text with the path of the directory. The threads are not
    /// joined, because a thread may wait forever.
    pub(super) fn keep(self) -> String {
        let Self { directory, threads, .. } = self;
        std::mem::forget(threads);
        format!("the files are in {}", directory.keep().display())
    }
}

/// Checks that files have this content.
fn check_copies(copies: &[PathBuf], content: &[u8]) -> Result<(), String> {
    for path in copies {
        let bytes = fs::read(path).map_err(|e| e.to_string())?;
        if bytes != content {
            let at = bytes.iter().zip(content).position(|(one, other)| one != other);
            let (len, other) = (bytes.len(), content.len());
            return Err(format!("{} ({len} of {other} bytes) differs at {at:?}", path.display()));
        }
    }
    Ok(())
}

fn create_by_qemu(
    variant: &Variant,
    size: u64,
    path: &std::path::Path,
    backing: Option<(PathBuf, &str)>,
) -> Result<(), String> {
    let mut program = Program::new("qemu-img").args(["create", "-q", "-f", variant.driver()]);
    program = formats::with_secrets(program);
    let options = variant.exact_options();
    if !options.is_empty() {
        program = program.args(["-o", &options]);
    }
    if variant.data_file {
        program = program.arg("-o").arg(format!("data_file={}.data", path.display()));
    }
    if let Some((name, format)) = backing {
        program = program.arg("-b").arg(name).args(["-F", format]);
    }
    let reply = program.arg(path).arg(size.to_string()).run();
    if reply.code() == 0 { Ok(()) } else { Err(reply.err()) }
}

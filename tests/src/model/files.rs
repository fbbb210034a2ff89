//! Chains of image files that four I/O threads use.

use std::fs;
use std::path::PathBuf;

use oxblk_core::{Backend, Graph, OpenFlags, Options};
use oxblk_ring::{Config, IoThread};
use tempfile::TempDir;

use super::filters::Filters;
use crate::formats::{self, Variant};
use crate::program::{self, Program, Reply};
use crate::random::Random;

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
    pub(super) filters: Filters,
}

/// The image files, base first, and the I/O threads that use the active image.
pub(super) struct Files {
    pub(super) directory: TempDir,
    pub(super) threads: Vec<IoThread>,
    images: Vec<(PathBuf, &'static Variant)>,
    random: Random,
}

fn said(reply: &Reply) -> String {
    format!("{}{}", reply.out(), reply.err())
}

impl Files {
    /// An empty chain in this directory.
    pub(super) fn new(directory: TempDir, random: Random) -> Self {
        let start = |n| IoThread::start(&format!("model-{n}"), Config::default());
        let threads = (0..THREADS).map(|n| start(n).expect("a thread")).collect();
        Self { directory, threads, images: Vec::new(), random }
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
    fn options(&self, file: &Options) -> Result<Options, String> {
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
        options.insert("file", file.to_json());
        Ok(options)
    }

    /// Returns the name by which a QEMU tool opens the active image.
    fn name_for_qemu(&self) -> Result<String, String> {
        let mut file = Options::new();
        file.insert("driver", "file");
        file.insert("filename", self.active().display().to_string());
        Ok(format!("json:{}", self.options(&file)?.to_json()))
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

    /// Opens the active image.
    pub(super) fn open(&self, access: Access) -> Result<Backend, String> {
        let path = self.active().display().to_string();
        let Access { aio, direct, copy_on_read, filters } = access;
        let graph: Graph = filters.graph();
        let text = format!(
            r#"{{"driver":"file","filename":"{path}","aio":"{aio}","cache":{{"direct":{direct}}}}}"#
        );
        let file = Options::from_json(&text).map_err(|e| e.to_string())?;
        let options = filters.on_image(self.options(&filters.on_file(file))?);
        self.on_thread(move || async move {
            let flags = OpenFlags { unmap: true, copy_on_read, ..OpenFlags::default() };
            graph.open_backend(None, options, flags).await.map_err(|e| e.to_string())
        })
    }

    /// Closes the active image.
    pub(super) fn close(&self, disk: Backend) -> Result<(), String> {
        self.on_thread(move || async move { disk.close().await.map_err(|e| e.to_string()) })
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

    /// Checks that `qemu-img compare` finds this content in the active image, and that a raw data file has the same content.
    pub(super) fn compare_by_qemu(&self, content: &[u8]) -> Result<(), String> {
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

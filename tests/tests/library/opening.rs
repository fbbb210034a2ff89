//! The options for opening a disk.

use std::path::{Path, PathBuf};

use oxblk::core::{Errno, Graph};
use oxblk::{Cache, Create, Disk, ErrorKind, Format, Gate, IoThreads, Options, Sharing, drivers};
use oxblk_tests::scratch::in_memory;

fn image(folder: &Path, format: Format) -> PathBuf {
    let path = folder.join(format!("disk.{format}"));
    Create::new(&path, format, 4 << 20).run().wait().unwrap();
    path
}

#[test]
fn an_option_string_describes_an_image() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Qcow2);
    let text = format!("driver=qcow2,file.filename={}", path.display());
    let options = Options::from_dotted(&text, None).unwrap();
    let disk = Disk::options().options(&options).open_described().wait().unwrap();
    assert_eq!(disk.size(), 4 << 20);
    assert_eq!(disk.info().wait().unwrap().format, "qcow2");
    disk.close().wait().unwrap();
}

#[test]
fn writes_to_a_temporary_overlay_do_not_change_the_image() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Raw);
    let options = || Disk::options().format(Format::Raw);
    let disk = options().temporary(true).open(&path).wait().unwrap();
    assert!(!disk.is_read_only());
    disk.write(0, vec![5; 4096]).wait().unwrap();
    assert_eq!(disk.read(0, 4096).wait().unwrap()[..], [5; 4096]);
    disk.close().wait().unwrap();
    let disk = options().open(&path).wait().unwrap();
    assert_eq!(disk.read(0, 4096).wait().unwrap()[..], [0; 4096]);
    disk.close().wait().unwrap();
}

#[test]
fn a_disk_that_must_be_writable_is_not_opened_read_only() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Qcow2);
    let options = || Disk::options().option("read-only", true);
    let disk = options().open(&path).wait().unwrap();
    assert!(disk.is_read_only());
    disk.close().wait().unwrap();
    let refused = options().require_write(true).open(&path).wait().unwrap_err();
    assert_eq!((refused.kind(), refused.raw_errno()), (ErrorKind::Denied, Errno::ACCES));
    // The failed open has released its locks.
    let disk = Disk::options().require_write(true).open(&path).wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn sharing_decides_which_other_disks_may_write_to_a_node() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Raw);
    let graph = Graph::new(drivers(), Gate::AnyFile);
    let base = Disk::options().graph(graph.clone()).format(Format::Raw).option("node-name", "n");
    let first = base.sharing(Sharing::OneWriter).open(&path).wait().unwrap();
    let over = || {
        let named = Disk::options().graph(graph.clone()).option("driver", "raw");
        named.option("file", "n")
    };
    let refused = over().open_described().wait().unwrap_err();
    assert!(refused.to_string().contains("write"), "{refused}");
    let reader = over().read_only(true).open_described().wait().unwrap();
    reader.close().wait().unwrap();
    first.close().wait().unwrap();
}

#[test]
fn a_disk_that_is_not_resizable_keeps_its_size() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Qcow2);
    let disk = Disk::options().resizable(false).open(&path).wait().unwrap();
    assert!(disk.resize(8 << 20).wait().is_err());
    assert_eq!(disk.size(), 4 << 20);
    disk.write(0, vec![5; 512]).wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn a_backend_can_be_opened_on_an_io_thread() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Qcow2);
    let name = path.to_str().unwrap().to_owned();
    let threads = IoThreads::start(1).unwrap();
    let opened = threads.threads()[0].spawn(move || async move {
        let options = Disk::options().cache(Cache::Writethrough).read_only(true);
        let backend = options.open_backend(Some(&name)).await?;
        let size = backend.size();
        backend.close().await?;
        Ok::<u64, oxblk::Error>(size)
    });
    assert_eq!(opened.wait().unwrap().unwrap(), 4 << 20);
}

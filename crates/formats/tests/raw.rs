//! Tests of the `raw` driver, used through the graph.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Mutex;

use oxblk_core::create::MeasureRequest;
use oxblk_core::{
    Backend, BoxFuture, Driver, DriverFactory, DriverKind, DriverTable, Errno, Error, Graph,
    OpenContext, OpenFlags, Options, Perm, Permissions, Preallocation, Result, StatusFlags, Want,
    WriteFlags, ZeroFlags,
};
use oxblk_formats::raw::RAW;
use oxblk_protocols::file::{FILE, FileDriver};
use oxblk_ring::{File, IoBufMut, block_on, sim};

/// A format that probing recognises by its first bytes, and that cannot be opened.
struct Magic;
static MAGIC: Magic = Magic;

impl DriverFactory for Magic {
    fn name(&self) -> &'static str {
        "magic"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: Option<&str>) -> u32 {
        if head.starts_with(b"MAGIC") { 100 } else { 0 }
    }

    fn open<'a>(&'a self, _context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::unsupported("opened as another format")) })
    }
}

static DRIVERS: DriverTable = &[&RAW, &MAGIC, &FILE];

fn graph() -> Graph {
    Graph::new(DRIVERS, oxblk_core::Gate::Anything)
}

fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

async fn open(graph: &Graph, path: &Path, options: &str) -> Result<Backend> {
    let options = Options::from_dotted(options, None)?;
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    graph.open_backend(path.to_str(), options, flags).await
}

async fn read(backend: &Backend, offset: u64, len: usize) -> Vec<u8> {
    backend.read(offset, IoBufMut::new(len)).await.unwrap().to_vec()
}

async fn write(backend: &Backend, offset: u64, data: &[u8]) -> Result<()> {
    backend.write(offset, data.to_vec().into(), WriteFlags::empty()).await
}

fn message<T>(outcome: Result<T>) -> String {
    outcome.err().expect("an error").to_string()
}

#[test]
fn a_window_of_a_file_is_a_disk_of_its_own() {
    let file = file_of(&pattern(10_000));
    block_on(async {
        let graph = graph();
        let disk = open(&graph, file.path(), "driver=raw,offset=1000,size=4096").await.unwrap();
        assert_eq!(disk.size(), 4096);
        assert_eq!(read(&disk, 0, 4096).await, pattern(10_000)[1000..5096]);
        write(&disk, 4000, &[9; 96]).await.unwrap();
        disk.write_zeroes(0, 100, ZeroFlags::empty()).await.unwrap();
        assert!(write(&disk, 4096, &[1]).await.is_err());
        assert!(disk.read(4000, IoBufMut::new(97)).await.is_err());
        assert_eq!(
            message(disk.resize(8192, Preallocation::Off).await),
            "Cannot resize fixed-size raw disks"
        );
        let status = disk.block_status(200, 1000, Want::Precise).await.unwrap().status;
        assert!(status.flags.contains(StatusFlags::DATA));
        assert_eq!((status.len, status.host), (1000, Some(1200)));
        disk.close().await.unwrap();
    });
    let mut expected = pattern(10_000);
    expected[1000..1100].fill(0);
    expected[5000..5096].fill(9);
    assert!(std::fs::read(file.path()).unwrap() == expected);
}

#[test]
fn a_window_that_does_not_fit_is_refused() {
    let file = file_of(&[0; 8192]);
    let name = file.path().to_str().unwrap();
    let cases = [
        ("offset=8193", "Offset (8193) cannot be greater than size of the containing file (8192)"),
        (
            "offset=18446744073709551615,size=512",
            "Offset (18446744073709551615) cannot be greater than size of the containing file (8192)",
        ),
        (
            "offset=512,size=8192",
            "The sum of offset (512) and size (8192) has to be smaller or equal to the  actual size \
             of the containing file (8192)",
        ),
        (
            "offset=512,size=18446744073709551615",
            "The sum of offset (512) and size (18446744073709551615) has to be smaller or equal to the  \
             actual size of the containing file (8192)",
        ),
        ("size=1000", "Specified size is not multiple of 512"),
        ("wind=1", "Block format 'raw' does not support the option 'wind'"),
    ];
    block_on(async {
        for (options, expected) in cases {
            let refused = open(&graph(), file.path(), &format!("driver=raw,{options}")).await;
            let Err(refused) = refused else { panic!("{options} was accepted") };
            assert_eq!(refused.to_string(), expected);
            assert_eq!(refused.path(), Some(name));
        }
    });
}

#[test]
fn a_probed_raw_image_cannot_be_turned_into_another_format() {
    let file = file_of(&[0; 8192]);
    block_on(async {
        let graph = graph();
        let disk = open(&graph, file.path(), "").await.unwrap();
        let mut header = [0; 512];
        header[..5].copy_from_slice(b"MAGIC");
        let refused = write(&disk, 0, &header).await.unwrap_err();
        assert_eq!(refused.raw_errno(), Errno::PERM);
        // Writing the header in pieces is refused too, at the piece that would complete it.
        write(&disk, 2, b"GIC").await.unwrap();
        write(&disk, 0, b"M").await.unwrap();
        assert_eq!(write(&disk, 1, b"A").await.unwrap_err().raw_errno(), Errno::PERM);
        assert_eq!(write(&disk, 0, b"MA").await.unwrap_err().raw_errno(), Errno::PERM);
        let mut longer = vec![0; 8192];
        longer[..5].copy_from_slice(b"MAGIC");
        assert_eq!(write(&disk, 0, &longer).await.unwrap_err().raw_errno(), Errno::PERM);
        write(&disk, 512, &header).await.unwrap();
        disk.close().await.unwrap();
        let named = open(&graph, file.path(), "driver=raw").await.unwrap();
        write(&named, 0, &header).await.unwrap();
        named.close().await.unwrap();
    });
}

#[test]
fn probing_raw_for_writing_warns_once_and_for_reading_never() {
    static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let file = file_of(&[0; 8192]);
    let graph = Graph::with_warner(DRIVERS, oxblk_core::Gate::Anything, |text| {
        WARNINGS.lock().unwrap().push(text.to_owned());
    });
    block_on(async {
        open(&graph, file.path(), "read-only=on").await.unwrap().close().await.unwrap();
        open(&graph, file.path(), "driver=raw").await.unwrap().close().await.unwrap();
        assert!(WARNINGS.lock().unwrap().is_empty());
        open(&graph, file.path(), "").await.unwrap().close().await.unwrap();
    });
    let warnings = WARNINGS.lock().unwrap();
    let start = format!(
        "Image format was not specified for '{}' and probing guessed raw.\n         Automatically",
        file.path().display()
    );
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].starts_with(&start), "{}", warnings[0]);
}

#[test]
fn raw_images_are_created_resized_and_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.raw");
    block_on(async {
        let graph = graph();
        let create = async |options: &str| {
            let options = Options::from_dotted(options, None).unwrap();
            graph.create_image(path.to_str().unwrap(), "raw", &options).await
        };
        create("size=1000,nocow=on").await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
        create("size=1M,preallocation=full").await.unwrap();
        let disk = open(&graph, &path, "driver=raw").await.unwrap();
        disk.resize(2 << 20, Preallocation::Falloc).await.unwrap();
        assert_eq!(disk.size(), 2 << 20);
        let shrink = disk.resize(512, Preallocation::Full).await;
        assert_eq!(message(shrink), "Cannot use preallocation for shrinking files");
        disk.resize(512, Preallocation::Off).await.unwrap();
        assert_eq!(disk.size(), 512);
        let size = Options::from_dotted("size=1025", None).unwrap();
        let measured = RAW
            .measure(MeasureRequest { options: size, source: None, secrets: graph.secrets() })
            .unwrap()
            .await
            .unwrap();
        assert_eq!((measured.required, measured.fully_allocated), (1536, 1536));
        let request = MeasureRequest {
            options: Options::new(),
            source: Some(&disk),
            secrets: graph.secrets(),
        };
        assert_eq!(RAW.measure(request).unwrap().await.unwrap().required, 512);
        disk.close().await.unwrap();
        assert_eq!(message(create("size=8E").await), "Could not resize file: Invalid argument");
        assert_eq!(
            message(create("size=1M,preallocation=metadata").await),
            "Unsupported preallocation mode: metadata"
        );
        assert!(message(create("size=1M,cluster_size=64k").await).contains("cluster_size"));
    });
}

#[test]
fn a_partial_last_sector_is_padded_with_zeroes() {
    block_on(async {
        let graph = graph();
        let data = pattern(1000);
        let file = file_of(&data);
        let disk = open(&graph, file.path(), "driver=raw").await.unwrap();
        assert_eq!(disk.size(), 1024);
        assert_eq!(read(&disk, 900, 124).await, [&data[900..], &[0; 24]].concat());
        assert_eq!(read(&disk, 1000, 24).await, [0; 24]);
        disk.read(1000, IoBufMut::new(25)).await.unwrap_err();
        let status = disk.block_status(1000, 24, Want::Precise).await.unwrap().status;
        assert!(status.is_zero() && status.len == 24);
        disk.discard(512, 512).await.unwrap();
        disk.discard(1000, 24).await.unwrap();
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 1000);
        write(&disk, 1010, b"end").await.unwrap();
        assert_eq!(disk.size(), 1024);
        disk.close().await.unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!((bytes.len(), &bytes[1000..]), (1013, &b"\0\0\0\0\0\0\0\0\0\0end"[..]));
        let disk = open(&graph, file.path(), "driver=raw").await.unwrap();
        disk.write_zeroes(512, 512, ZeroFlags::empty()).await.unwrap();
        disk.close().await.unwrap();
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 1024);
    });
}

#[test]
fn a_huge_sparse_image_is_mapped_with_a_few_queries() {
    let file = file_of(b"");
    file.as_file().set_len(15 << 40).unwrap();
    block_on(async {
        let disk = open(&graph(), file.path(), "driver=raw").await.unwrap();
        write(&disk, 7 << 40, &[1; 4096]).await.unwrap();
        let (mut at, mut extents) = (0, Vec::new());
        while at < disk.size() {
            let found = disk.block_status(at, disk.size() - at, Want::Precise).await.unwrap();
            extents.push((found.status.len, found.status.is_zero()));
            at += found.status.len;
        }
        assert_eq!(extents, [(7 << 40, true), (4096, false), ((8 << 40) - 4096, true)]);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_window_on_a_disk_with_short_transfers_changes_only_its_own_bytes() {
    for seed in 0..20 {
        let media = sim::Disk::from_bytes(seed, &pattern(65536));
        media.set_faults(sim::Faults {
            short_reads: 0.3,
            short_writes: 0.3,
            ..sim::Faults::default()
        });
        sim::run(seed, async {
            let graph = graph();
            let driver = FileDriver::from_ring_file(File::sim(&media), 65536).with_alignment(512);
            let flags = OpenFlags::default();
            let file =
                graph.add_node(Some("disk"), &FILE, Box::new(driver), flags.clone()).unwrap();
            let options = Options::from_dotted("driver=raw,file=disk,offset=700,size=8192", None);
            let node = graph.open(options.unwrap(), flags).await.unwrap();
            let taken = Perm::CONSISTENT_READ | Perm::WRITE;
            let disk = Backend::new(&graph, "", node, Permissions::sharing_all(taken)).unwrap();
            write(&disk, 5, &[7; 5000]).await.unwrap();
            let mut expected = pattern(65536)[700..8892].to_vec();
            expected[5..5005].fill(7);
            assert!(read(&disk, 0, 8192).await == expected);
            disk.flush().await.unwrap();
            drop(file);
        });
        let mut expected = pattern(65536);
        expected[705..5705].fill(7);
        assert!(media.bytes() == expected, "seed {seed}");
    }
}

#[test]
fn two_users_of_a_raw_image_share_it_as_their_permissions_allow() {
    let file = file_of(&[0; 4096]);
    block_on(async {
        let graph = graph();
        let first = open(&graph, file.path(), "driver=raw").await.unwrap();
        let second = open(&graph, file.path(), "driver=raw").await.unwrap();
        write(&first, 0, b"x").await.unwrap();
        assert_eq!(read(&second, 0, 1).await, b"x");
        first.close().await.unwrap();
        second.close().await.unwrap();
        let options = Options::from_dotted("driver=raw", None).unwrap();
        let name = file.path().to_str().unwrap();
        let node = graph.open_image(name, options, OpenFlags::default()).await.unwrap();
        let jealous = Permissions { taken: Perm::WRITE, shared: Perm::CONSISTENT_READ };
        let owner = Backend::new(&graph, "", node, jealous).unwrap();
        let refused = open(&graph, file.path(), "driver=raw").await;
        assert_eq!(message(refused), "Failed to get \"write\" lock");
        owner.close().await.unwrap();
    });
}

#[test]
fn a_raw_image_is_recreated_beside_a_writer_but_not_beside_a_user_that_resizes() {
    let file = file_of(&[1; 4096]);
    let name = file.path().to_str().unwrap();
    block_on(async {
        let graph = graph();
        let options = Options::from_dotted("driver=raw", None).unwrap();
        let node = graph.open_image(name, options, OpenFlags::default()).await.unwrap();
        let users = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE);
        let writer = Backend::new(&graph, "", node, users).unwrap();
        let size = Options::from_dotted("size=8192", None).unwrap();
        graph.create_image(name, "raw", &size).await.unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 8192);
        let resizing = Permissions { taken: users.taken | Perm::RESIZE, ..users };
        writer.set_permissions(resizing).await.unwrap();
        let refused = graph.create_image(name, "raw", &size).await;
        assert_eq!(message(refused), "Failed to get shared \"resize\" lock");
        writer.close().await.unwrap();
    });
}

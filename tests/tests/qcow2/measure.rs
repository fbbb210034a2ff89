//! `img measure` computes the same size of a new qcow2 image as `qemu-img measure`.

use oxblk_core::create::MeasureRequest;
use oxblk_core::{DriverTable, Graph, OpenFlags, Options};
use oxblk_formats::qcow2::QCOW2;
use oxblk_formats::raw::RAW;
use oxblk_protocols::file::FILE;
use oxblk_ring::block_on;
use oxblk_tests::program::Program;

static DRIVERS: DriverTable = &[QCOW2, &RAW, &FILE];

fn option_list(program: Program, options: &str) -> Program {
    if options.is_empty() { program } else { program.args(["-o", options]) }
}

#[test]
fn measured_sizes_are_the_same_as_with_qemu() {
    let scratch = tempfile::tempdir().unwrap();
    let raw = scratch.path().join("source.raw");
    std::fs::write(&raw, vec![5; 300_000]).unwrap();
    std::fs::OpenOptions::new().write(true).open(&raw).unwrap().set_len(10 << 20).unwrap();
    let cases = [
        "size=0",
        "size=1",
        "size=1G",
        "size=10T",
        "size=2P",
        "size=3P",
        "size=1G,preallocation=full",
        "size=1G,preallocation=metadata",
        "size=1G,cluster_size=512",
        "size=1G,cluster_size=2M,refcount_bits=64",
        "size=7E",
        "size=1G,cluster_size=300",
        "size=1G,compat=0.9",
        "",
        "cluster_size=4k",
        "preallocation=falloc",
        "backing_file=x",
    ];
    for options in cases {
        let mut parsed = Options::from_dotted(options, None).unwrap();
        let from_source = !parsed.contains("size");
        let theirs = Program::new("qemu-img").args(["measure", "-O", "qcow2"]);
        let theirs = if from_source {
            option_list(theirs, options).args(["-f", "raw"]).arg(&raw)
        } else {
            let size = parsed.get_str("size").unwrap().to_owned();
            let rest = options.split_once(',').map_or("", |(_, rest)| rest);
            option_list(theirs, rest).args(["--size", &size])
        };
        let theirs = theirs.run();
        let ours = block_on(async {
            let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
            let source = if from_source {
                let format = Options::from_dotted("driver=raw", None)?;
                Some(graph.open_backend(raw.to_str(), format, OpenFlags::default()).await?)
            } else {
                None
            };
            if from_source {
                parsed.insert("size", 0);
            }
            let request = MeasureRequest {
                options: parsed,
                source: source.as_ref(),
                secrets: graph.secrets(),
            };
            let sizes = QCOW2.measure(request).expect("qcow2 can be measured").await;
            if let Some(source) = source {
                source.close().await?;
            }
            sizes
        });
        let ours = match ours {
            Ok(sizes) => format!(
                "required size: {}\nfully allocated size: {}\n",
                sizes.required, sizes.fully_allocated
            ),
            Err(error) => format!("qemu-img: {error}\n"),
        };
        assert_eq!(ours, theirs.out() + &theirs.err(), "{options}");
    }
}

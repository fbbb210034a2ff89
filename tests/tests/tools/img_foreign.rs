//! Images of unsupported formats are not read as raw disks, and not overwritten by mistake.

use std::path::Path;

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};
use oxblk_tests::program::{Program, Reply};

const FORMATS: [&str; 3] = ["vmdk", "vhdx", "qcow"];

fn oxblk(directory: &Path, line: &str) -> Reply {
    Program::oxblk().args(line.split(' ')).directory(directory).run()
}

#[test]
fn images_of_other_formats_are_named_and_refused_by_every_command() {
    let both = Differential::new();
    let [directory, _] = both.our_directories();
    for format in FORMATS {
        both.qemu(Img, &["create", "-q", "-f", format, "image", "2M"]);
        for line in [
            "img info image",
            "img convert image out.raw",
            "img convert -f FORMAT image out.raw",
            "img map image",
            "img check image",
            "img resize image 4M",
            "io -c length image",
        ] {
            let reply = oxblk(&directory, &line.replace("FORMAT", format));
            let expected = format!("Format '{format}' is not supported yet");
            assert_eq!(reply.code(), 1, "{line}: {}", reply.err());
            assert!(reply.err().contains(&expected), "{line}: {}", reply.err());
            assert_eq!(reply.err().lines().count(), 1, "{line}: {}", reply.err());
        }
        assert!(!directory.join("out.raw").exists());
        for (line, subject) in [
            ("img create -f FORMAT new 1M", "new: "),
            ("img create -f FORMAT -o help", ""),
            ("img convert -f raw -O FORMAT image new", ""),
            ("img dd -f raw -O FORMAT if=image of=new", ""),
            ("img measure -O FORMAT --size 1M", ""),
            ("img amend -f FORMAT -o help image", ""),
        ] {
            let made = oxblk(&directory, &line.replace("FORMAT", format));
            let expected = format!("oxblk img: {subject}Format '{format}' is not supported yet\n");
            assert_eq!((made.code(), made.err()), (1, expected), "{line}");
        }
        assert!(!directory.join("new").exists());
    }
}

#[test]
fn a_guest_cannot_turn_its_probed_raw_disk_into_another_format() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "raw", "disk", "1M"]);
    for (name, head) in
        [("vmdk", &b"KDMV"[..]), ("vhdx", b"vhdxfile"), ("luks", b"LUKS\xba\xbe\0\x01")]
    {
        both.file(name, head);
        both.same(Io, &["-c", &format!("write -s {name} 0 512"), "disk"]);
    }
    both.same_bytes("disk");
}

#[test]
fn a_wrong_option_does_not_destroy_an_existing_image() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "image.qcow2", "1M"]);
    let [directory, _] = both.our_directories();
    let before = std::fs::read(directory.join("image.qcow2")).expect("an image");
    for options in ["cluster_size=3", "compat=9", "refcount_bits=5", "preallocation=some"] {
        let line = format!("img create -q -f qcow2 -o {options} image.qcow2 1M");
        assert_eq!(oxblk(&directory, &line).code(), 1, "{line}");
        let raw = "img create -q -f raw -o preallocation=some image.qcow2 1M";
        assert_eq!(oxblk(&directory, raw).code(), 1);
    }
    assert!(std::fs::read(directory.join("image.qcow2")).expect("an image") == before);
}

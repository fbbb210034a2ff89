//! The filter `throttle` on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

const GROUP: &str = "throttle-group,id=g,x-iops-total=100000";
const RAW: &str = "driver=throttle,throttle-group=g,file.driver=raw,file.file.filename=b.raw";
const FILE: &str = "driver=throttle,throttle-group=g,file.filename=b.raw";
const TOP: &str = "driver=throttle,throttle-group=g,file.driver=qcow2,file.file.filename=top.qcow2";

fn images() -> Differential {
    let both = Differential::new();
    both.file("b.raw", &[7; 1 << 16]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    both.qemu(Io, &["-c", "write -P 1 0 300k", "a.qcow2"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2"]);
    both.qemu(Io, &["-c", "write -P 2 64k 64k", "top.qcow2"]);
    let data = ["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "data.qcow2", "1M"];
    both.qemu(Img, &data);
    both.qemu(Img, &["rebase", "-q", "-u", "-b", "a.qcow2", "-F", "qcow2", "data.qcow2"]);
    both
}

#[test]
fn objects_and_options_are_accepted_and_refused_as_in_qemu() {
    let both = images();
    for object in [
        GROUP,
        "throttle-group,id=g",
        "throttle-group,id=g,limits.iops-total=1000,limits.iops-total-max=2000",
        "throttle-group,id=g,limits.foo=1",
        "throttle-group,id=g,foo=1",
        "throttle-group,id=g,x-iops-total=1k",
        "throttle-group,id=g,x-iops-total=-1",
        "throttle-group,id=g,x-iops-total=5,x-iops-read=5",
        "throttle-group,id=g,x-iops-total=0x100",
        "throttle-group,id=g,x-iops-total=0100,x-iops-total-max=200",
        "throttle-group,id=g,limits.iops-total= +100",
        "throttle-group,id=g,limits.iops-total.x=5",
        "throttle-group,id=g,limits=5",
        "throttle-group,id=g,limits.iops-total-max-length=4294967296",
        "throttle-group,foo,help",
        "throttle-group,help,foo",
        "qom-type=help",
        r#"{"qom-type":"throttle-group","id":"g","limits":{"iops-total":10}}"#,
        r#"{"qom-type":"throttle-group","id":"g","limits":{"iops-total":"10"}}"#,
        r#"{"qom-type":"throttle-group","id":"g","limits":{"iops-total":10.5}}"#,
        r#"{"qom-type":"throttle-group","id":"g","limits":null}"#,
        r#"{"qom-type":"throttle-group","id":"g","x-iops-total":"10"}"#,
        r#"{"qom-type":"throttle-group","id":"g","x-iops-total":-1}"#,
        r#"{"qom-type":"help","id":"g"}"#,
        "throttle-group,id=other",
        "secret,id=g,data=x",
    ] {
        both.same(Io, &["--object", object, "--image-opts", FILE, "-c", "read -P 7 0 512"]);
    }
    for object in ["throttle-group,help", "throttle-group,id=1,x-iops-total=x,?", "secret,help"] {
        both.same(Io, &["--object", object, "--image-opts", FILE]);
        both.same(Img, &["compare", "--object", object]);
    }
    let twice = ["--object", GROUP, "--object", "throttle-group,id=g"];
    both.same(Io, &[&twice[..], &["--image-opts", FILE, "-c", "read 0 512"]].concat());
    for disk in [
        "driver=throttle,file.filename=b.raw",
        "driver=throttle,throttle-group=g",
        "driver=throttle,throttle-group=g,foo=3,file.filename=b.raw",
        "driver=throttle,throttle-group=x,file.filename=b.raw",
    ] {
        both.same(Io, &["--object", GROUP, "--image-opts", disk, "-c", "read 0 512"]);
    }
}

#[test]
fn a_throttled_disk_is_shown_as_in_qemu() {
    let both = images();
    for disk in [RAW, FILE, TOP] {
        for command in [
            &["info"][..],
            &["info", "--output=json"],
            &["info", "--backing-chain"],
            &["map"],
            &["map", "--output=json"],
            &["check"],
            &["measure", "-O", "qcow2"],
        ] {
            let options = ["--object", GROUP, "--image-opts", disk];
            both.same(Img, &[command, &options].concat());
        }
    }
    for image in ["top.qcow2", "data.qcow2"] {
        for options in ["", ",file.backing=", ",file.backing.file.filename=a.qcow2"] {
            for above in ["throttle,throttle-group=g", "raw"] {
                let disk =
                    format!("driver={above},file.driver=qcow2,file.file.filename={image}{options}");
                let words = ["info", "--output=json", "--object", GROUP, "--image-opts", &disk];
                both.same(Img, &words);
            }
        }
    }
    both.same(
        Img,
        &["compare", "--object", GROUP, "--image-opts", RAW, "driver=raw,file.filename=b.raw"],
    );
}

#[test]
fn requests_pass_a_throttled_disk_as_in_qemu() {
    let both = images();
    for disk in [FILE, TOP] {
        for commands in [
            &["write -P 3 100 70000", "read -P 3 100 70000", "flush"][..],
            &["write -z 0 64k", "write -zu 64k 64k", "discard 128k 64k", "map"],
            &["write -c 768k 64k", "alloc 0 1M", "length"],
            &["truncate 2M", "length", "write -P 4 1M 64k"],
            &["reopen -o throttle-group=y", "reopen -o foo=1", "read 0 512"],
        ] {
            let mut words = vec!["--object", GROUP, "--image-opts", disk];
            for command in commands {
                words.extend(["-c", command]);
            }
            both.same(Io, &words);
        }
    }
    both.same_content("top.qcow2");
    both.same_content("b.raw");
}

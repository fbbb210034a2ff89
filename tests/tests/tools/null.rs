//! The null disks on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

#[test]
fn null_disks_behave_as_in_qemu() {
    let both = Differential::new();
    for driver in ["null-co", "null-aio"] {
        for options in ["", "read-zeroes=on,", "read-zeroes=on,latency-ns=1000000,", "foo=1,"] {
            let disk = format!("{options}driver={driver},size=1M");
            let commands = ["write 0 4k", "write -z 4k 4k", "discard 0 1M", "flush", "map"];
            let mut words = vec!["--image-opts", &disk];
            for command in commands {
                words.extend(["-c", command]);
            }
            both.same(Io, &words);
            both.same(Img, &["info", "--output=json", "--image-opts", &disk]);
        }
        let latency = format!("driver={driver},latency-ns=-1");
        both.same(Io, &["--image-opts", &latency, "-c", "read 0 512"]);
        let pattern = format!("driver={driver},size=1M,read-zeroes=on,latency-ns=5");
        both.same(Io, &["--image-opts", &pattern, "-c", "read -P 0 0 1M", "-c", "read -P 1 0 4k"]);
        for name in [
            format!("{driver}://"),
            format!("{driver}://x"),
            format!("json:{{'driver':'{driver}','latency-ns':5,'read-zeroes':true}}"),
            format!("json:{{'driver':'{driver}','latency-ns':0,'size':4096}}"),
        ] {
            both.same(Img, &["info", &name]);
            both.same(Img, &["map", "--output=json", &name]);
        }
    }
}

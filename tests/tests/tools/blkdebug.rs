//! The filter `blkdebug` on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

const RAW: &str = "driver=raw,file.driver=blkdebug,file.image.filename=b.raw";

fn images() -> Differential {
    let both = Differential::new();
    both.file("b.raw", &[7; 1 << 16]);
    both.file("c.conf", b"[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\nonce = \"on\"\n");
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    both.qemu(Io, &["-c", "write -P 1 0 320k", "a.qcow2"]);
    both
}

#[test]
fn file_names_and_options_are_accepted_refused_and_shown_as_in_qemu() {
    let both = images();
    for name in [
        "blkdebug:c.conf:a.qcow2",
        "blkdebug::a.qcow2",
        "blkdebug::b.raw",
        "blkdebug:a.qcow2",
        "blkdebug:",
        "blkdebug:c.conf:",
        "blkdebug:absent:a.qcow2",
        "blkdebug::absent",
        "blkdebug:c.conf:blkdebug::a.qcow2",
        "blkdebug::null-co://",
        "json:{'driver':'blkdebug','image':{'driver':'file','filename':'a.qcow2'},\
         'inject-error':[{'event':'read_aio','errno':5}]}",
        "json:{'driver':'qcow2','file':{'driver':'blkdebug','align':512,\
         'image':{'driver':'file','filename':'a.qcow2'},\
         'set-state':[{'event':'pwritev','new_state':3}]}}",
        "json:{'driver':'blkdebug','image':{'driver':'qcow2',\
         'file':{'driver':'file','filename':'a.qcow2'}}}",
    ] {
        both.same(Img, &["info", name]);
        both.same(Img, &["info", "--output=json", name]);
        both.same(Img, &["map", name]);
    }
    for disk in [
        "driver=blkdebug,image.filename=a.qcow2",
        "driver=blkdebug,image.driver=qcow2,image.file.filename=a.qcow2",
        "driver=blkdebug,x-image=a.qcow2",
        "driver=blkdebug,image=a.qcow2",
        "driver=blkdebug",
        "driver=blkdebug,file.filename=a.qcow2",
        "driver=blkdebug,image.filename=a.qcow2,foo=1",
        "driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,file.config=c.conf",
        "driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,file.config=c.conf,\
         file.take-child-perms.0=resize",
        "driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,file.align=4096,\
         file.max-transfer=8192",
    ] {
        both.same(Img, &["info", "--output=json", "--image-opts", disk]);
        both.same(Img, &["check", "--image-opts", disk]);
        both.same(Img, &["map", "--output=json", "--image-opts", disk]);
        both.same(Img, &["measure", "-O", "qcow2", "--image-opts", disk]);
    }
}

#[test]
fn rules_and_limits_are_checked_as_in_qemu() {
    let both = images();
    for options in [
        "inject-error.0.event=foo",
        "inject-error.0.errno=5",
        "inject-error.0.event=read_aio,file.inject-error.0.errno=x",
        "inject-error.0.event=read_aio,file.inject-error.0.errno=0",
        "inject-error.0.event=read_aio,file.inject-error.0.errno=-5",
        "inject-error.0.event=read_aio,file.inject-error.0.once=x",
        "inject-error.0.event=read_aio,file.inject-error.0.foo=x",
        "inject-error.0.event=read_aio,file.inject-error.0.iotype=foo",
        "inject-error.1.event=read_aio",
        "inject-error.event=read_aio,file.inject-error.once=on",
        "inject-error=read_aio",
        "inject-error.0=read_aio",
        "set-state.0.event=read_aio",
        "set-state.0.event=read_aio,file.set-state.0.new_state=x",
        "set-state.0.new_state=1",
        "set-state.0.event=read_aio,file.set-state.0.foo=1",
        "align=3",
        "align=-1",
        "align=x",
        "align=2147483648",
        "max-transfer=768,file.align=512",
        "max-transfer=1024,file.align=512",
        "max-transfer=4294967296",
        "opt-write-zero=600,file.align=512",
        "max-write-zero=1024,file.opt-write-zero=768",
        "opt-discard=600,file.align=512",
        "max-discard=1024,file.opt-discard=768",
        "take-child-perms.0=foo",
        "take-child-perms.0=write,file.take-child-perms.1=resize",
        "take-child-perms.1=write",
        "take-child-perms.write=on",
        "unshare-child-perms=write",
        "unshare-child-perms.0=consistent-read",
        "config=absent",
    ] {
        let disk = format!("{RAW},file.{options}");
        both.io(&disk, &["read 0 4k", "read -P 7 0 4k", "write -z 0 1k", "discard 0 10k"]);
    }
    for config in [
        "",
        "# c\n\n[inject-error \"id\"]\n  event = \"read_aio\"\n errno = \"28\" x\nonce=\"on\"\n",
        "# c\n\n[inject-error \"id\"]\n  event = \"read_aio\"\n errno = \"28\" x\nonce = \"on\"\n",
        "[inject-error]\nevent=\"read_aio\"\n",
        "[inject-error]\nevent = read_aio\n",
        "[inject-error]\nevent = \"read_aio\n",
        "[inject-error]\nfoo = \"5\"\n",
        "[inject-error\nevent = \"read_aio\"\n",
        "[foo]\n",
        "[]\n",
        " \n",
        "event = \"read_aio\"\n",
        "[set-state]\nevent = \"read_aio\"\nnew_state = \"2\"\n[inject-error]\n\
         event = \"write_aio\"\nstate = \"2\"\nonce = \"on\"\nimmediately = \"on\"\n",
    ] {
        both.file("k.conf", config.as_bytes());
        let commands = ["-c", "read 0 4k", "-c", "write 0 4k", "-c", "write 0 4k"];
        both.same(Io, &[&["-f", "raw", "blkdebug:k.conf:b.raw"], &commands[..]].concat());
    }
}

#[test]
fn rules_fail_requests_as_in_qemu() {
    let both = images();
    let commands = [
        "read 0 4k",
        "write 0 4k",
        "read 0 8k",
        "read 4k 512",
        "read 4608 512",
        "write 4k 512",
        "write -z 8k 4k",
        "discard 0 4k",
        "write 100 5000",
        "read 100 20",
        "flush",
        "read 0 4k",
    ];
    for rules in [
        "inject-error.0.event=read_aio,file.inject-error.0.errno=28,\
         file.inject-error.0.once=on,file.inject-error.1.event=read_aio,\
         file.inject-error.1.errno=12,file.inject-error.1.once=on",
        "inject-error.0.event=read_aio,file.inject-error.0.sector=8,file.inject-error.0.once=on",
        "inject-error.0.event=none,file.inject-error.0.iotype=read",
        "inject-error.0.event=none,file.inject-error.0.iotype=write",
        "inject-error.0.event=none,file.inject-error.0.iotype=write-zeroes",
        "inject-error.0.event=none,file.inject-error.0.iotype=discard",
        "inject-error.0.event=read_aio,file.inject-error.0.state=2,\
         file.inject-error.0.once=on,file.set-state.0.event=write_aio,\
         file.set-state.0.new_state=2",
        "inject-error.0.event=read_aio,file.inject-error.0.state=1,\
         file.set-state.0.event=read_aio,file.set-state.0.new_state=2,\
         file.inject-error.1.event=read_aio,file.inject-error.1.state=2,\
         file.inject-error.1.errno=28,file.set-state.1.event=read_aio,\
         file.set-state.1.state=2,file.set-state.1.new_state=1,file.inject-error.1.once=on",
    ] {
        both.io(&format!("{RAW},file.{rules}"), &commands);
    }
    // QEMU ignores errors of the reads of a read-modify-write.
    for event in [
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "pwritev_rmw_after_tail",
        "read_aio",
        "write_aio",
    ] {
        let rule = format!("inject-error.0.event={event}");
        let disk = format!("{RAW},file.align=4096,file.{rule},file.inject-error.0.once=on");
        both.io(&disk, &commands);
        let disk = format!("driver=blkdebug,image.filename=b.raw,align=4096,{rule}");
        both.io(&format!("{disk},inject-error.0.once=on"), &commands);
    }
    both.same_content("b.raw");
}

#[test]
fn breakpoints_suspend_requests_as_in_qemu() {
    let both = images();
    let stacked = "driver=raw,file.driver=raw,file.file.driver=blkdebug,\
                   file.file.image.filename=b.raw";
    for (disk, commands) in [
        (RAW, &["break read_aio A", "aio_read 0 4k", "wait_break A", "length", "resume A"][..]),
        (stacked, &["break read_aio A", "aio_read 0 4k", "wait_break A", "resume A"]),
        (RAW, &["break foo A", "resume A", "remove_break A", "break read_aio", "wait_break"]),
        (RAW, &["break pwritev A", "remove_break A", "write 0 4k", "remove_break A"]),
        (RAW, &["break pwritev A", "break write_aio A", "remove_break A", "aio_write 0 4k"]),
        (RAW, &["break pwritev A", "aio_write 0 4k", "remove_break A", "aio_flush"]),
        (
            RAW,
            &[
                "break pwritev A",
                "break pwritev B",
                "aio_write 0 4k",
                "wait_break A",
                "resume A",
                "wait_break B",
                "resume B",
                "aio_flush",
            ],
        ),
        ("driver=blkdebug,image.filename=b.raw", &["break read_aio A", "aio_read 0 4k"]),
        ("driver=raw,file.filename=b.raw", &["break read_aio A", "remove_break A", "resume A"]),
        ("driver=null-co", &["break none A", "length"]),
    ] {
        both.io(disk, commands);
    }
    let help = ["break", "remove_break", "resume", "wait_break"].map(|name| format!("help {name}"));
    let help: Vec<&str> = help.iter().flat_map(|help| ["-c", help]).collect();
    both.same(Io, &help);
}

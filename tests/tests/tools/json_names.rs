//! Valid and invalid `json:` file names of many forms.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

fn images() -> Differential {
    let both = Differential::new();
    both.file("b.raw", &[0; 1 << 16]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2"]);
    both
}

/// Names that `info` opens or refuses.
const NAMES: &[&str] = &[
    r#"json:"#,
    r#"json: "#,
    r#"json:{}"#,
    r#"json:{ }"#,
    r#"json:[]"#,
    r#"json:null"#,
    r#"json:1"#,
    r#"json:"a""#,
    r#"json:true"#,
    r#"json:{"#,
    r#"json:}"#,
    r#"json:{}}"#,
    r#"json:{},"#,
    r#"json:{"driver"}"#,
    r#"json:{"driver":}"#,
    r#"json:{"driver":"raw",}"#,
    r#"json:{driver:"raw"}"#,
    r#"json:{'driver':'raw','file.filename':'b.raw'}"#,
    r#"json:{'driver':"raw","file.filename":'b.raw'}"#,
    r#"json:{"driver":"raw","file":{"driver":"file","filename":"b.raw"}}"#,
    r#"json:{"driver":"raw","file.driver":"file","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","file.filename":"b.raw"}"#,
    r#"json:{"file.filename":"b.raw"}"#,
    r#"json:{"file":{"filename":"b.raw"}}"#,
    r#"json:{"file":{"driver":"file","filename":"b.raw"}}"#,
    r#"json:{"file":{"driver":"file"}}"#,
    r#"json:{"file":{}}"#,
    r#"json:{"file":"b.raw"}"#,
    r#"json:{"file":"nope","driver":"raw"}"#,
    r#"json:{"file":1,"driver":"raw"}"#,
    r#"json:{"file":null,"driver":"raw"}"#,
    r#"json:{"file":true,"driver":"raw"}"#,
    r#"json:{"file":[],"driver":"raw"}"#,
    r#"json:{"file":["b.raw"],"driver":"raw"}"#,
    r#"json:{"file":[{"driver":"file"}],"driver":"raw"}"#,
    r#"json:{"driver":"raw"}"#,
    r#"json:{"driver":"qcow2"}"#,
    r#"json:{"driver":"file"}"#,
    r#"json:{"driver":"file","filename":"b.raw"}"#,
    r#"json:{"driver":"file","filename":""}"#,
    r#"json:{"driver":"file","filename":1}"#,
    r#"json:{"driver":"file","filename":null}"#,
    r#"json:{"driver":"file","filename":true}"#,
    r#"json:{"driver":"file","filename":{}}"#,
    r#"json:{"driver":"file","filename":[]}"#,
    r#"json:{"driver":"file","filename":"file:b.raw"}"#,
    r#"json:{"filename":"b.raw"}"#,
    r#"json:{"driver":"nonsense"}"#,
    r#"json:{"driver":""}"#,
    r#"json:{"driver":1}"#,
    r#"json:{"driver":null}"#,
    r#"json:{"driver":true}"#,
    r#"json:{"driver":{}}"#,
    r#"json:{"driver":{"a":"b"}}"#,
    r#"json:{"driver":[]}"#,
    r#"json:{"driver":"raw","file":{"driver":"nonsense"}}"#,
    r#"json:{"driver":"raw","file":{"driver":"file","filename":"b.raw","bogus":1}}"#,
    r#"json:{"driver":"raw","bogus":1,"file":{"driver":"file","filename":"b.raw"}}"#,
    r#"json:{"driver":"raw","bogus":{"a":1},"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","bogus":null,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","bogus":[],"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","bogus":{},"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":"64k","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":65536,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":"65536","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":65536.5,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":1e4,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":-1,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":true,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":null,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":"x","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","offset":512,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","offset":"512","size":"1k","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","read-only":true,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","read-only":"on","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","read-only":"yes","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","read-only":1,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","read-only":"maybe","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","read-only":null,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"qcow2","lazy-refcounts":true,"file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","lazy-refcounts":"on","file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","lazy-refcounts":1,"file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","cache-size":"1M","file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","cache-size":1048576,"file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","l2-cache-size":1.5,"file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","overlap-check":{"template":"none"},"file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","overlap-check.template":"bad","file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"raw","cache":{"direct":false},"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","cache.direct":"off","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","cache":"none","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","cache":{"bogus":1},"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","node-name":"n","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","node-name":"1n","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","node-name":"","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","node-name":1,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","discard":"unmap","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","discard":true,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","detect-zeroes":"bogus","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","driver":"qcow2","file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"qcow2","driver":"raw","file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"raw","file":{"filename":"b.raw"},"file.filename":"a.qcow2"}"#,
    r#"json:{"driver":"raw","file.filename":"a.qcow2","file":{"filename":"b.raw"}}"#,
    r#"json:{"driver":"raw","file":"n","file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","file.filename.x":"b.raw"}"#,
    r#"json:{"driver":"raw",".file":"b.raw"}"#,
    r#"json:{"driver":"raw","":"b.raw"}"#,
    r#"json:{"":"x"}"#,
    r#"json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"file","filename":"b.raw"}}}"#,
    r#"json:{"driver":"raw","file.driver":"raw","file.file.driver":"raw","file.file.file.filename":"b.raw"}"#,
    r#"json:{"\u0064river":"raw","file.filename":"b\u002eraw"}"#,
    r#"json:{"driver":"raw","file.filename":"b\.raw"}"#,
    r#"json:{"driver":"raw","file.filename":"b\x.raw"}"#,
    r#"json:{"driver":"raw","file.filename":"\u12"}"#,
    r#"json:{"driver":"raw","file.filename":"\ud800"}"#,
    r#"json:{"driver":"raw","file.filename":"\ud83d\ude00"}"#,
    r#"json:{"driver":"raw","file.filename":"\u0000"}"#,
    r#"json:{"driver":"raw","file.filename":"b\u0000.raw"}"#,
    r#"json:{"driver":"raw","file.filename":"nö"}"#,
    r#"json:{"driver":"raw","file.filename":"n\n"}"#,
    r#"json:{"driver":"raw" "file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw";"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","file.filename":"b.raw}"#,
    r#"json:{"driver":"raw","file.filename":b.raw}"#,
    r#"json:{"driver":"raw","file.filename":%s}"#,
    r#"json:{"driver":"raw","size":012,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":0x10,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":+1,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":99999999999999999999,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":18446744073709551615,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":1.,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":nan,"file.filename":"b.raw"}"#,
    r#"json:{"driver":"raw","size":True,"file.filename":"b.raw"}"#,
    r#"json:json:{}"#,
    r#"JSON:{}"#,
    r#"json:{"driver":"raw","file":{"driver":"file","filename":"json:{}"}}"#,
    r#"json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":null}"#,
    r#"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":""}"#,
    r#"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":"nope"}"#,
    r#"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":1}"#,
    r#"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":[]}"#,
    r#"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":false}"#,
    r#"json:{"driver":"raw","file.filename":"b.raw","backing":null}"#,
    r#"json:{"driver":"raw","file.filename":"b.raw","backing":{"driver":"null-co"}}"#,
    r#"json:{"driver":"null-co"}"#,
    r#"json:{"driver":"null-co","size":65536}"#,
    r#"json:{"driver":"null-co","size":"64k"}"#,
    r#"json:{"driver":"null-co","file":{"driver":"null-co"}}"#,
    r#"json:{"driver":"raw","file":{"driver":"null-co"}}"#,
];

/// Options that describe the backing file of a qcow2 image.
const BACKING: &[&str] = &[
    r#""backing":null"#,
    r#""backing":"""#,
    r#""backing":"nope""#,
    r#""backing":1"#,
    r#""backing":[]"#,
    r#""backing":{"driver":"null-co"}"#,
    r#""backing.driver":"null-co","backing.bogus":1"#,
    r#""backing":{"driver":"qcow2","file.filename":"a.qcow2","backing":""}"#,
];

#[test]
fn info_opens_and_refuses_the_same_json_names_as_qemu() {
    let both = images();
    for name in NAMES {
        both.same(Img, &["info", name]);
    }
    for name in [
        "json:{\"driver\":\"raw\",\"file.filename\":\"n\nx\"}",
        "json:{\"driver\":\"raw\",\n\t\"file.filename\":\r\"b.raw\" }",
    ] {
        both.same(Img, &["info", name]);
    }
    both.same(Img, &["info", &format!("json:{}1{}", r#"{"file":"#.repeat(40), "}".repeat(40))]);
    for (open, close) in [(r#"{"a":"#, "}"), ("[", "]")] {
        both.same(Img, &["info", &format!("json:{}1{}", open.repeat(1030), close.repeat(1030))]);
    }
    for format in ["raw", "qcow2"] {
        both.same(Img, &["info", "-f", format, r#"json:{"driver":"raw","file.driver":"null-co"}"#]);
        both.same(Img, &["info", "-f", format, r#"json:{"file.filename":"b.raw"}"#]);
    }
}

#[test]
fn options_describe_a_backing_file_as_in_qemu() {
    let both = images();
    for backing in BACKING {
        let name = format!(r#"json:{{"driver":"qcow2","file.filename":"top.qcow2",{backing}}}"#);
        both.same(Img, &["map", &name]);
    }
    for backing in &BACKING[..5] {
        let name = format!(r#"json:{{"driver":"qcow2","file.filename":"top.qcow2",{backing}}}"#);
        both.same(Img, &["info", &name]);
    }
    for backing in ["null", "\"\""] {
        let name =
            format!(r#"json:{{"driver":"raw","file.filename":"b.raw","backing":{backing}}}"#);
        both.same(Img, &["map", &name]);
    }
    for backing in ["backing=", "backing=nope"] {
        for image in ["driver=qcow2,file.filename=top.qcow2", "driver=raw,file.filename=b.raw"] {
            both.same(Img, &["map", "--image-opts", &format!("{image},{backing}")]);
        }
    }
}

#[test]
fn every_command_accepts_json_names() {
    let both = images();
    let raw = r#"json:{"driver":"raw","file.filename":"b.raw"}"#;
    let qcow2 = r#"json:{"driver":"qcow2","file.filename":"a.qcow2"}"#;
    for args in [
        &["map", "json:"][..],
        &["map", "json:{}"],
        &["map", r#"json:{"driver":"raw","size":"x","file.filename":"b.raw"}"#],
        &["convert", "-O", "raw", "json:{}", "o"],
        &["convert", "-O", "raw", raw, "o"],
        &["convert", "-O", "raw", "b.raw", r#"json:{"driver":"raw","file.filename":"o"}"#],
        &["convert", "-n", "-O", "raw", "b.raw", r#"json:{"driver":"raw","file.filename":"o"}"#],
        &["convert", "-n", "-O", "raw", "b.raw", r#"json:{"driver":"qcow2","file.filename":"o"}"#],
        &["create", "-f", "raw", raw, "1M"],
        &["create", "-f", "raw", r#"json:{"driver":"file","filename":"o"}"#, "1M"],
        &["create", "-f", "qcow2", "-b", "json:{}", "-F", "raw", "n"],
        &["create", "-f", "qcow2", "-b", raw, "-F", "raw", "n"],
        &["create", "-f", "qcow2", "-b", r#"json:{"file.filename":"b.raw"}"#, "-F", "raw", "n"],
        &["info", "--backing-chain", "n"],
        &["compare", raw, "json:{"],
        &["check", qcow2],
        &["check", r#"json:{"driver":"qcow2"}"#],
        &["resize", raw, "128k"],
        &["resize", r#"json:{"file.filename":"b.raw"}"#, "128k"],
        &["snapshot", "-l", qcow2],
        &["amend", "-o", "compat=v3", qcow2],
        &["bitmap", "--add", qcow2, "b0"],
    ] {
        both.same(Img, args);
    }
    both.same(Io, &["-c", "read 0 4k", "json:{"]);
    both.same(Io, &["-c", "open json:{}", "-c", "quit"]);
    both.same(Io, &["-c", "length", raw]);
}

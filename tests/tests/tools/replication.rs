//! The filter `replication` on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::Img;

#[test]
fn options_are_accepted_refused_and_shown_as_in_qemu() {
    let both = Differential::new();
    both.file("a.raw", &[7; 1 << 16]);
    let file = "file.driver=file,file.filename=a.raw";
    for options in [
        "mode=primary",
        "mode=secondary,top-id=x",
        "mode=secondary",
        "mode=secondary,top-id=",
        "mode=primary,top-id=x",
        "mode=x",
        "mode=",
        "top-id=x",
        "mode=primary,foo=1",
    ] {
        let disk = format!("driver=replication,{options},{file}");
        both.same(Img, &["info", "--image-opts", &disk]);
        both.same(Img, &["info", "--output", "json", "--image-opts", &disk]);
        both.same(Img, &["map", "--output", "json", "--image-opts", &disk]);
    }
    let json = r#"json:{"driver":"replication","mode":"primary","file":{"driver":"file","filename":"a.raw"}}"#;
    both.same(Img, &["info", json]);
    both.same(Img, &["info", "-f", "replication", "a.raw"]);
}

#[test]
fn requests_fail_before_the_replication_starts_as_in_qemu() {
    let both = Differential::new();
    both.file("a.raw", &[7; 1 << 16]);
    for mode in ["mode=primary", "mode=secondary,top-id=x"] {
        let disk = format!("driver=replication,{mode},file.driver=file,file.filename=a.raw");
        both.io(&disk, &["read 0 4k", "write 0 4k", "flush"]);
    }
}

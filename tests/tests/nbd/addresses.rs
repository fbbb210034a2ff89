//! Every form of address for `oxblk serve --nbd`.

use crate::served::python;
use oxblk_tests::program::{Program, Server, oxblk};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

/// Returns a port that no program uses.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn start(dir: &Path, address: &str) -> Server {
    let args = ["serve", "d", "-f", "raw", "--nbd", address];
    Program::oxblk().args(args).directory(dir).start()
}

fn with_disk() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("d"), vec![0; 1 << 20]).unwrap();
    dir
}

fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.collect()
}

/// Returns the URI that the server has printed.
fn printed_uri(printed: &str) -> String {
    let line = printed.lines().find_map(|line| line.strip_prefix("  at "));
    line.unwrap_or_else(|| panic!("no URI in {printed}")).to_owned()
}

#[test]
fn every_form_of_tcp_address_is_listened_on_and_creates_no_file() {
    let dir = with_disk();
    for (form, uri) in [
        ("PORT", "nbd://localhost:PORT/"),
        (":PORT", "nbd://localhost:PORT/"),
        ("127.0.0.1:PORT", "nbd://127.0.0.1:PORT/"),
        ("tcp:127.0.0.1:PORT", "nbd://127.0.0.1:PORT/"),
        ("tcp:PORT", "nbd://localhost:PORT/"),
        ("nbd://127.0.0.1:PORT", "nbd://127.0.0.1:PORT/"),
        ("nbd://localhost:PORT/x%20y", "nbd://localhost:PORT/x%20y"),
    ] {
        let port = free_port();
        let (form, uri) =
            (form.replace("PORT", &port.to_string()), uri.replace("PORT", &port.to_string()));
        let mut server = start(dir.path(), &form);
        server.wait_for(&form, || TcpStream::connect(("localhost", port)).is_ok());
        python(&uri, "assert h.get_size() == 1 << 20").succeed();
        assert_eq!(files(dir.path()), ["d"], "{form}");
        let printed = server.stop();
        assert_eq!(printed_uri(&printed), uri);
    }
}

#[test]
fn an_address_that_other_machines_can_reach_is_printed_with_a_warning() {
    let dir = with_disk();
    for (host, exposed) in [("0.0.0.0", true), ("127.0.0.1", false), ("127.0.0.2", false)] {
        let port = free_port();
        let given = format!("{host}:{port}");
        let reached = if exposed { "127.0.0.1" } else { host };
        let serve = format!("exec {} serve d -f raw --nbd {given} 2>log", oxblk().display());
        let mut server = Program::new("sh").arg("-c").arg(serve).directory(dir.path()).start();
        server.wait_for(&given, || TcpStream::connect((reached, port)).is_ok());
        let printed = server.stop();
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        let warning =
            format!("every machine that can connect to {given} can read and write the disk");
        assert_eq!(log.contains(&warning), exposed, "{log}");
        assert_eq!(printed.contains(&format!("listening on {given}")), exposed, "{printed}");
    }
}

#[test]
fn ipv6_addresses_are_accepted_in_brackets() {
    let Ok(probe) = TcpListener::bind("[::1]:0") else {
        return eprintln!("this machine has no IPv6");
    };
    let port = probe.local_addr().unwrap().port();
    drop(probe);
    let dir = with_disk();
    for form in [format!("[::1]:{port}"), format!("nbd://[::1]:{port}/")] {
        let mut server = start(dir.path(), &form);
        server.wait_for(&form, || TcpStream::connect(("::1", port)).is_ok());
        assert_eq!(printed_uri(&server.stop()), format!("nbd://[::1]:{port}/"));
    }
}

#[test]
fn every_form_of_unix_address_is_listened_on_and_the_printed_uri_is_accepted() {
    let dir = with_disk();
    let here = dir.path().display().to_string();
    for (form, socket) in [
        (format!("{here}/a"), "a"),
        ("./a".to_owned(), "a"),
        ("a.sock".to_owned(), "a.sock"),
        ("unix:10809".to_owned(), "10809"),
        (format!("unix:{here}/a:b"), "a:b"),
        (format!("nbd+unix:///?socket={here}/a"), "a"),
        ("nbd+unix:///name?socket=rel%20ative".to_owned(), "rel ative"),
    ] {
        let path = dir.path().join(socket);
        let mut server = start(dir.path(), &form);
        server.wait_for_socket(&path);
        let uri = printed_uri(&server.stop());
        assert!(!path.exists(), "{form}");

        let mut server = start(dir.path(), &uri);
        server.wait_for_socket(&path);
        python(&uri, "assert h.get_size() == 1 << 20").succeed();
        assert_eq!(printed_uri(&server.stop()), uri);
        assert_eq!(files(dir.path()), ["d"], "{form}");
    }
}

#[test]
fn an_invalid_address_is_refused_and_creates_no_file() {
    let dir = with_disk();
    for (form, part) in [
        ("myhost", "'./myhost'"),
        ("example.com", "'./example.com'"),
        ("http://localhost/", "not an NBD URI scheme"),
        ("nbds://localhost/", "TLS"),
        ("nbd+unix:///x", "socket"),
        ("nbd:localhost:1", "Invalid port"),
        ("localhost:99999", "Invalid port"),
        ("unix:", "must not be empty"),
        ("", "must not be empty"),
        ("localhost:10809/disk", "Cannot listen on"),
    ] {
        let args = ["serve", "d", "-f", "raw", "--nbd", form];
        let reply = Program::oxblk().args(args).directory(dir.path()).run();
        assert_eq!(reply.code(), 1, "{form}: {}", reply.out());
        assert!(reply.err().contains(part), "{form}: {}", reply.err());
        assert_eq!(files(dir.path()), ["d"], "{form}");
    }
}

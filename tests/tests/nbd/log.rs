//! The log that `oxblk serve` writes to standard error. In files, the log is plain text. The server never waits for a reader of
//! the log.

use crate::served::python;
use oxblk_tests::program::{Program, Server, oxblk};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Starts `oxblk serve` on a raw disk, with a verbose log. `line` is a shell command line; `$SERVE` is the command that starts
/// the server.
fn started_by(dir: &Path, line: &str) -> Server {
    std::fs::write(dir.join("d"), vec![0; 1 << 20]).unwrap();
    let serve = format!("{} serve d -f raw --nbd ./s", oxblk().display());
    let line = line.replace("$SERVE", &serve);
    let shell = Program::new("env").args(["RUST_LOG=trace", "sh", "-c"]).arg(line);
    let mut server = shell.directory(dir).start();
    server.wait_for_socket(&dir.join("s"));
    server
}

fn is_served(dir: &Path) {
    let uri = format!("nbd+unix:///?socket={}", dir.join("s").display());
    for byte in [1, 2, 3] {
        let script = format!("h.pwrite(b'\\x0{byte}' * 4096, 0); h.flush()");
        python(&uri, &script).succeed();
        assert_eq!(std::fs::read(dir.join("d")).unwrap()[..4096], [byte; 4096]);
    }
}

#[test]
fn a_log_in_a_file_holds_no_escape_codes() {
    let dir = tempfile::tempdir().unwrap();
    let server = started_by(dir.path(), "exec $SERVE 2>log");
    is_served(dir.path());
    server.stop();
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains("DEBUG"), "{log}");
    assert!(!log.contains('\x1b'), "{log}");
}

#[test]
fn a_log_on_a_terminal_is_coloured_unless_no_color_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let run = "
import os, pty, signal, socket, sys, time
os.environ['TERM'] = 'xterm'
os.environ['RUST_LOG'] = 'debug'
if sys.argv[2]: os.environ['NO_COLOR'] = sys.argv[2]
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], ['oxblk', 'serve', 'd', '-f', 'raw', '--size', '1M', '--nbd', './s'])
for _ in range(3000):
    try:
        client = socket.socket(socket.AF_UNIX)
        client.connect('s')
        break
    except OSError:
        time.sleep(0.01)
client.recv(18)
client.close()
text = b''
while b'DEBUG' not in text:
    text += os.read(terminal, 4096)
os.kill(pid, signal.SIGINT)
os.waitpid(pid, 0)
sys.stdout.buffer.write(text)
";
    for (no_color, coloured) in [("", true), ("1", false)] {
        let python = Program::new("/usr/bin/python3").arg("-c").arg(run).arg(oxblk()).arg(no_color);
        let out = python.directory(dir.path()).succeed().out();
        assert!(out.contains("erving 'd'"), "{out}");
        assert_eq!(out.contains('\x1b'), coloured, "{out}");
    }
}

#[test]
fn closed_full_or_unread_standard_streams_do_not_stop_the_server() {
    for line in [
        "exec $SERVE 2>&-",
        "exec $SERVE >&- 2>&-",
        "exec $SERVE 2>/dev/full",
        "exec $SERVE >/dev/full 2>/dev/full",
        "mkfifo f; : <f & exec 2>f; wait $!; exec $SERVE",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = started_by(dir.path(), line);
        is_served(dir.path());
        server.stop();
        assert!(!dir.path().join("s").exists(), "{line}");
    }
}

#[test]
fn an_unread_log_delays_neither_requests_nor_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    // The server itself keeps the read end of the FIFO open (descriptor 3), and reads nothing.
    let server = started_by(dir.path(), "mkfifo f && exec 3<>f 2>f && exec $SERVE");
    is_served(dir.path());
    // Each client causes one or two lines in the log. The lines of all clients exceed the size of the pipe and the queue.
    let hang_up = || {
        for _ in 0..6000 {
            let mut client = UnixStream::connect(dir.path().join("s")).unwrap();
            client.read_exact(&mut [0; 18]).unwrap();
        }
    };
    hang_up();
    is_served(dir.path());
    // When the FIFO is read, a line in the log reports how many lines were dropped.
    let log = std::fs::File::options().read(true).write(true).open(dir.path().join("f")).unwrap();
    let mut lines = BufReader::new(log).lines().map(Result::unwrap);
    let note = lines.find(|line| line.starts_with("log: ")).unwrap();
    assert!(note.ends_with(" lines were dropped: standard error was not read in time"), "{note}");
    hang_up();
    server.stop();
}

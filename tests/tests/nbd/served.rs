//! Starts `oxblk serve` of the built program, and runs clients against it.

use oxblk_tests::program::{Program, Reply, Server};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A served image in its own directory.
pub(crate) struct Served {
    server: Server,
    pub(crate) socket: PathBuf,
}

impl Served {
    /// Starts `oxblk serve` with these arguments, on a socket in `dir`.
    pub(crate) fn start(dir: &Path, args: &[&str]) -> Served {
        let socket = dir.join("nbd.sock");
        let program = Program::oxblk().arg("serve").args(args).arg("--nbd").arg(&socket);
        let mut server = program.directory(dir).start();
        server.wait_for_socket(&socket);
        Served { server, socket }
    }

    /// Returns the URI of the default export.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Returns the process, for a test that ends the server.
    pub(crate) fn into_server(self) -> Server {
        self.server
    }

    /// Sends SIGTERM and waits until the server ends without an error. Returns the output.
    pub(crate) fn stop(self) -> String {
        let printed = self.server.stop();
        assert!(!self.socket.exists(), "the socket's file is still there");
        printed
    }

    /// Sends SIGKILL and waits until the socket is closed. The kernel closes the files of an io_uring a little later than the
    /// process.
    pub(crate) fn kill(self) {
        drop(self.server);
        for _ in 0..1000 {
            if UnixStream::connect(&self.socket).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the socket of a killed server still accepts connections");
    }

    /// Runs Python with libnbd. In the script, `h` is connected to the export, and `uri` is its URI.
    pub(crate) fn python(&self, script: &str) -> Reply {
        python(&self.uri(), script).succeed()
    }
}

/// Runs Python with libnbd. Uses the system's Python, because libnbd's module is installed there.
pub(crate) fn python(uri: &str, script: &str) -> Program {
    let prelude = format!(
        "import nbd, sys, os, errno\nuri = '{uri}'\nh = nbd.NBD()\n\
         h.add_meta_context('base:allocation')\nh.connect_uri(uri)\n"
    );
    Program::new("/usr/bin/python3").arg("-c").arg(prelude + script)
}

//! Runs programs with bounded time and memory: the built oxblk, the QEMU tools, other peers.
//!
//! Every run has a deadline, so no test can hang. A program that exceeds its deadline is killed, and the test fails with the
//! program's output. The output is read while the program runs, so a full pipe never blocks the program.
//!
//! The oxblk under test is `$OXBLK_BIN` if that is set (the nextest setup script and the soak set it). Otherwise it is built
//! once per test process, beside the test binary.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The time limit of a program if the test sets no other.
pub const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(120);

/// Held while a program is being started.
static STARTING: RwLock<()> = RwLock::new(());

/// Prevents programs from being started while the guard lives. A child that is being started holds copies of all descriptors,
/// so a file that is closed meanwhile, and its locks, would stay open.
pub fn none_starting() -> RwLockReadGuard<'static, ()> {
    STARTING.read().unwrap_or_else(PoisonError::into_inner)
}

/// A tool of oxblk and of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `qemu-img`, `oxblk img`.
    Img,
    /// `qemu-io`, `oxblk io`.
    Io,
    /// `qemu-nbd`, `oxblk nbd`.
    Nbd,
    /// `qemu-storage-daemon`, `oxblk daemon`.
    Daemon,
}

impl Tool {
    /// Every tool.
    pub const ALL: [Tool; 4] = [Tool::Img, Tool::Io, Tool::Nbd, Tool::Daemon];

    /// QEMU's name of the tool. oxblk acts as the tool when it is called through a link with this name.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Tool::Img => "qemu-img",
            Tool::Io => "qemu-io",
            Tool::Nbd => "qemu-nbd",
            Tool::Daemon => "qemu-storage-daemon",
        }
    }

    /// The oxblk subcommand.
    pub fn subcommand(self) -> &'static str {
        match self {
            Tool::Img => "img",
            Tool::Io => "io",
            Tool::Nbd => "nbd",
            Tool::Daemon => "daemon",
        }
    }
}

/// The oxblk program under test.
///
/// # Panics
/// When it cannot be built.
pub fn oxblk() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| match std::env::var_os("OXBLK_BIN") {
        Some(path) => PathBuf::from(path),
        None => build_oxblk(),
    })
}

/// Builds oxblk with the profile of this process, into the same target directory.
fn build_oxblk() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let mut directory = test.parent().expect("the test is in a directory");
    if directory.ends_with("deps") {
        directory = directory.parent().expect("deps is in the profile's directory");
    }
    let folder = directory.file_name().and_then(OsStr::to_str).expect("a UTF-8 profile name");
    let profile = if folder == "debug" { "dev" } else { folder };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let status = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--package",
            "oxblk-cli",
            "--bin",
            "oxblk",
            "--profile",
            profile,
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "oxblk does not build");
    directory.join("oxblk")
}

/// The result of a program.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The exit status.
    pub status: ExitStatus,
    /// The standard output.
    pub stdout: Vec<u8>,
    /// The standard error output.
    pub stderr: Vec<u8>,
}

impl Reply {
    /// Returns the standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Returns the standard error output as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Returns the exit code, or 128 + the number of the signal that ended the program, as a shell does.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
}

/// A program about to run.
#[derive(Debug)]
pub struct Program {
    path: OsString,
    args: Vec<OsString>,
    directory: Option<PathBuf>,
    stdin: Vec<u8>,
    time_limit: Duration,
    address_space: Option<u64>,
    perturbation: Option<u64>,
}

impl Program {
    /// A program given by its path, or by a name that is looked up in `PATH`.
    pub fn new(path: impl AsRef<OsStr>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            args: Vec::new(),
            directory: None,
            stdin: Vec::new(),
            time_limit: DEFAULT_TIME_LIMIT,
            address_space: None,
            perturbation: None,
        }
    }

    /// The oxblk under test.
    pub fn oxblk() -> Self {
        Self::new(oxblk())
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Sets the bytes that the program reads from standard input. The default is no bytes.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Sets the time after which the program is killed and the test fails.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// Limits the program's address space, in bytes (`RLIMIT_AS`, set by `prlimit`).
    #[must_use]
    pub fn address_space(mut self, bytes: u64) -> Self {
        self.address_space = Some(bytes);
        self
    }

    /// Makes the program delay hand-overs between threads at random ([`oxblk_ring::perturb`]). A program that was built without
    /// perturbation ignores this.
    #[must_use]
    pub fn perturbed(mut self, seed: u64) -> Self {
        self.perturbation = Some(seed);
        self
    }

    /// Returns the command line, for messages.
    pub fn line(&self) -> String {
        let mut line = self.path.to_string_lossy().into_owned();
        for arg in &self.args {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        line
    }

    fn command(&self) -> Command {
        let mut command = match self.address_space {
            None => Command::new(&self.path),
            Some(bytes) => {
                let mut command = Command::new("prlimit");
                command.arg(format!("--as={bytes}")).arg("--core=0").arg("--").arg(&self.path);
                command
            }
        };
        command.args(&self.args).env("LC_ALL", "C").env("TZ", "UTC").env_remove("RUST_LOG");
        if let Some(seed) = self.perturbation {
            command.env("OXBLK_PERTURB", seed.to_string());
        }
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }

    /// Starts the command. Until the child process calls exec, it holds copies of all descriptors of this process.
    fn spawn(&self, command: &mut Command) -> Child {
        let _alone = STARTING.write().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn();
        child
            .unwrap_or_else(|error| panic!("{}: {error} (scripts/install-test-tools)", self.line()))
    }

    /// Runs the program to its end.
    ///
    /// # Panics
    /// When the program cannot be started (the message says which script installs it) or exceeds its time limit.
    pub fn run(self) -> Reply {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.spawn(&mut command);
        let stdout = drain(child.stdout.take().expect("piped"));
        let stderr = drain(child.stderr.take().expect("piped"));
        let mut stdin = child.stdin.take().expect("piped");
        let input = self.stdin.clone();
        // A program may end without reading its input, so a broken pipe is not an error.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let status = wait_until(&mut child, Instant::now() + self.time_limit);
        if status.is_none() {
            drop(child.kill());
            drop(child.wait());
        }
        feeder.join().expect("the feeder does not panic");
        let stdout = stdout.join().expect("the reader does not panic");
        let stderr = stderr.join().expect("the reader does not panic");
        let Some(status) = status else {
            panic!(
                "{} ran for more than {:?}\nstdout: {}\nstderr: {}",
                self.line(),
                self.time_limit,
                String::from_utf8_lossy(&stdout),
                String::from_utf8_lossy(&stderr)
            );
        };
        Reply { status, stdout, stderr }
    }

    /// Runs the program to its end. The exit code must be 0.
    ///
    /// # Panics
    /// As [`Program::run`], and when the program fails.
    pub fn succeed(self) -> Reply {
        let line = self.line();
        let reply = self.run();
        assert!(
            reply.status.success(),
            "{line}\nended with {}\nstdout: {}\nstderr: {}",
            reply.code(),
            reply.out(),
            reply.err()
        );
        reply
    }

    /// Starts the program as a server, which is killed when the guard is dropped.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn start(self) -> Server {
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let child = self.spawn(&mut command);
        Server { line: self.line(), child, stdout: None }
    }
}

/// Reads a pipe to its end on a new thread.
fn drain(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        drop(pipe.read_to_end(&mut bytes));
        bytes
    })
}

/// Waits for the end of a child. Returns `None` if the child still runs at the deadline.
fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    let mut nap = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(20));
    }
}

/// A running server. Dropping it kills the server. [`Server::stop`] sends SIGTERM and checks that the server ends.
#[derive(Debug)]
pub struct Server {
    line: String,
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
}

impl Server {
    /// Waits until `ready` returns true (a socket exists, a port accepts connections).
    ///
    /// # Panics
    /// When the server ends first, or after 30 seconds.
    pub fn wait_for(&mut self, what: &str, mut ready: impl FnMut() -> bool) {
        if self.stdout.is_none() {
            self.stdout = Some(drain(self.child.stdout.take().expect("piped")));
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while !ready() {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                panic!("{} ended ({status}) before {what}", self.line);
            }
            assert!(Instant::now() < deadline, "{}: no {what} after 30 s", self.line);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a Unix socket accepts connections.
    ///
    /// # Panics
    /// As [`Server::wait_for`].
    pub fn wait_for_socket(&mut self, path: &Path) {
        self.wait_for("socket", || std::os::unix::net::UnixStream::connect(path).is_ok());
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, given by its name without `SIG`. A server that has already ended does not get it.
    ///
    /// # Panics
    /// When there is no shell.
    pub fn signal(&self, name: &str) {
        self.try_signal(name);
    }

    /// Sends a signal. Returns whether the process still existed. A minimal system has `kill` only as a command of the shell.
    fn try_signal(&self, name: &str) -> bool {
        let line = format!("kill -{name} {}", self.pid());
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(line).stderr(Stdio::null()).status().expect("sh runs").success()
    }

    /// Waits until the server ends.
    ///
    /// # Panics
    /// When the server does not end within 30 seconds.
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait_until(&mut self.child, Instant::now() + Duration::from_secs(30));
        status.unwrap_or_else(|| panic!("{} does not end", self.line))
    }

    /// Sends SIGTERM and waits for the end with exit code 0. Returns the standard output.
    ///
    /// # Panics
    /// When the server does not end within 30 seconds, or with another exit code.
    pub fn stop(mut self) -> String {
        assert!(self.try_signal("TERM"), "{} had ended already", self.line);
        let status = wait_until(&mut self.child, Instant::now() + Duration::from_secs(30));
        let status = status.unwrap_or_else(|| panic!("{} ignores SIGTERM", self.line));
        assert!(status.success(), "{} ended with {status}", self.line);
        let stdout = self.stdout.take().or_else(|| self.child.stdout.take().map(drain));
        let bytes = stdout.map(|reader| reader.join().expect("the reader does not panic"));
        String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

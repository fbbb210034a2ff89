//! Runs programs with bounded time and memory: the built oxblk, the QEMU tools, other peers.
//!
//! Every run has a deadline, so no test can hang. A program that exceeds its deadline is killed together with the programs that
//! it has started, and the test fails with the program's output. The output is read while the program runs, so a full pipe
//! never blocks the program.
//!
//! The oxblk under test is `$OXBLK_BIN`. The nextest setup script and the soak set this variable. Without it, oxblk is built
//! once per test process, in the directory of the test binary.

use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};

/// The time limit of a program if the test sets no other.
pub const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(120);

/// Locked for reading by [`none_starting`], and for writing while a program is being started.
static STARTING: RwLock<()> = RwLock::new(());

/// Prevents programs from being started while the guard lives. A child that is being started has copies of all descriptors. If
/// a file is closed at this moment, the file and its locks would stay open in the child.
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
}

impl Tool {
    /// Every tool.
    pub const ALL: [Tool; 2] = [Tool::Img, Tool::Io];

    /// QEMU's name of the tool. oxblk acts as the tool when it is called through a link with this name.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Tool::Img => "qemu-img",
            Tool::Io => "qemu-io",
        }
    }

    /// The oxblk subcommand.
    pub fn subcommand(self) -> &'static str {
        match self {
            Tool::Img => "img",
            Tool::Io => "io",
        }
    }
}

/// The oxblk program under test.
///
/// # Panics
/// When oxblk cannot be built.
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
    /// A program with this path, or with this name in `PATH`.
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
    /// perturbation ignores this setting.
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

    /// Starts the command. Until the child process calls exec, it has copies of all descriptors of this process.
    fn spawn(&self, command: &mut Command) -> Child {
        let _alone = STARTING.write().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn();
        child
            .unwrap_or_else(|error| panic!("{}: {error} (scripts/install-test-tools)", self.line()))
    }

    /// Runs the program to its end.
    ///
    /// # Panics
    /// When the program cannot be started (the message says which script installs it), when it exceeds its time limit, or when
    /// a process that it has started keeps its pipes open longer than the time limit.
    pub fn run(self) -> Reply {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // The processes that the program starts belong to its group.
        command.process_group(0);
        let mut child = self.spawn(&mut command);
        let group = child.id();
        let stdout = Output::read(child.stdout.take().expect("piped"));
        let stderr = Output::read(child.stderr.take().expect("piped"));
        let mut stdin = child.stdin.take().expect("piped");
        let input = self.stdin.clone();
        // A program may end without reading its input, so a broken pipe is not an error.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let deadline = Instant::now() + self.time_limit;
        let status = wait_until(&mut child, deadline);
        // A process that the program has started may keep the pipes open after the program's end.
        let ended = || feeder.is_finished() && stdout.is_at_end() && stderr.is_at_end();
        let closed = status.is_some() && becomes_true(deadline, ended);
        if !closed {
            kill_group(group);
            drop(child.wait());
            // A process that has left the group may survive. Do not wait for the pipes of such a process.
            becomes_true(Instant::now() + Duration::from_secs(5), ended);
        }
        let (stdout, stderr) = (stdout.bytes(), stderr.bytes());
        match status {
            Some(status) if closed => Reply { status, stdout, stderr },
            _ => panic!(
                "{} {} for more than {:?}\nstdout: {}\nstderr: {}",
                self.line(),
                if status.is_some() { "left a process that kept its pipes open" } else { "ran" },
                self.time_limit,
                String::from_utf8_lossy(&stdout),
                String::from_utf8_lossy(&stderr)
            ),
        }
    }

    /// Runs the program to its end. The exit code must be 0.
    ///
    /// # Panics
    /// In the cases of [`Program::run`], and when the program fails.
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

    /// Starts the program as a server. The server is killed when the guard is dropped.
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

/// A pipe that a thread reads to its end.
#[derive(Debug)]
struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Output {
    fn read(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let read = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut piece = [0; 8192];
            loop {
                match pipe.read(&mut piece) {
                    Ok(0) => return,
                    Ok(length) => lock(&read).extend_from_slice(&piece[..length]),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => panic!("a pipe cannot be read: {error}"),
                }
            }
        });
        Self { bytes, reader }
    }

    fn is_at_end(&self) -> bool {
        self.reader.is_finished()
    }

    /// Returns the bytes that the thread has read.
    fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `poll` repeatedly until it returns a value. Returns `None` if `poll` has returned no value at the deadline.
fn poll_until<T>(deadline: Instant, mut poll: impl FnMut() -> Option<T>) -> Option<T> {
    let mut nap = Duration::from_micros(500);
    loop {
        if let Some(value) = poll() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(20));
    }
}

/// Waits until a condition is true. Returns false if the condition is not true at the deadline.
fn becomes_true(deadline: Instant, condition: impl Fn() -> bool) -> bool {
    poll_until(deadline, || condition().then_some(())).is_some()
}

/// Waits for the end of a child. Returns `None` if the child still runs at the deadline.
fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    poll_until(deadline, || child.try_wait().expect("a child can be waited for"))
}

/// Kills all processes of a group.
fn kill_group(group: u32) {
    let group = i32::try_from(group).ok().and_then(Pid::from_raw).expect("the id of a process");
    match kill_process_group(group, Signal::KILL) {
        // `ESRCH`: the last process of the group has just ended.
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => panic!("group {group:?} cannot be killed: {error}"),
    }
}

/// A running server. Dropping this value kills the server. [`Server::stop`] sends SIGTERM and checks that the server ends.
#[derive(Debug)]
pub struct Server {
    line: String,
    child: Child,
    stdout: Option<Output>,
}

impl Server {
    /// Waits until `ready` returns true (a socket exists, a port accepts connections).
    ///
    /// # Panics
    /// When the server ends before `ready` returns true, or after 30 seconds.
    pub fn wait_for(&mut self, what: &str, mut ready: impl FnMut() -> bool) {
        if self.stdout.is_none() {
            self.stdout = Some(Output::read(self.child.stdout.take().expect("piped")));
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
    /// In the cases of [`Server::wait_for`].
    pub fn wait_for_socket(&mut self, path: &Path) {
        self.wait_for("socket", || std::os::unix::net::UnixStream::connect(path).is_ok());
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, given by its name without `SIG`. If the server has already ended, no signal is sent.
    ///
    /// # Panics
    /// When no shell is installed.
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
    /// When the server has already ended, does not end within 30 seconds, ends with another exit code, or leaves a process that
    /// keeps its output open.
    pub fn stop(mut self) -> String {
        assert!(self.try_signal("TERM"), "{} had ended already", self.line);
        let deadline = Instant::now() + Duration::from_secs(30);
        let status = wait_until(&mut self.child, deadline);
        let status = status.unwrap_or_else(|| panic!("{} ignores SIGTERM", self.line));
        assert!(status.success(), "{} ended with {status}", self.line);
        let stdout = self.stdout.take().or_else(|| self.child.stdout.take().map(Output::read));
        let stdout = stdout.expect("the output is read once");
        let closed = becomes_true(deadline, || stdout.is_at_end());
        assert!(closed, "{} left a process that keeps its output open", self.line);
        String::from_utf8_lossy(&stdout.bytes()).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panic_text;

    /// Runs a shell script that exceeds its time limit and first prints the id of a process. Returns the id. On a busy machine
    /// the script may need a longer limit until it prints the id.
    fn exceed_the_limit(script: &str, text: &str) -> String {
        let mut message = String::new();
        for limit in [200, 2000, 20_000].map(Duration::from_millis) {
            let program = Program::new("sh").args(["-c", script]).time_limit(limit);
            let outcome = std::panic::catch_unwind(|| program.run());
            message = panic_text(&*outcome.expect_err("the program exceeds its limit"));
            let pid = message.lines().find_map(|line| line.strip_prefix("stdout: "));
            if let Some(pid) = pid.filter(|pid| !pid.is_empty() && message.contains(text)) {
                return pid.to_owned();
            }
        }
        panic!("{message}");
    }

    fn is_alive(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie has ended, but its new parent has not collected it.
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
    }

    #[test]
    fn a_program_that_exceeds_its_limit_is_killed_with_its_children() {
        let script = "sleep 1000 & echo $!; wait";
        let sleep = exceed_the_limit(script, " ran for more than ");
        assert!(becomes_true(Instant::now() + Duration::from_secs(30), || !is_alive(&sleep)));
    }

    #[test]
    fn a_process_that_keeps_the_output_open_is_reported_and_killed() {
        let script = "sleep 1000 & echo $!";
        let sleep = exceed_the_limit(script, " left a process that kept its pipes open for ");
        assert!(becomes_true(Instant::now() + Duration::from_secs(30), || !is_alive(&sleep)));
    }

    #[test]
    fn output_and_exit_code_of_a_program_are_returned() {
        let reply =
            Program::new("sh").args(["-c", "cat; echo error >&2; exit 3"]).stdin("in").run();
        assert_eq!((reply.code(), reply.out(), reply.err()), (3, "in".into(), "error\n".into()));
    }
}

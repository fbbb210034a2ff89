//! Helpers for tests that lower a limit or forbid a system call, which a process cannot undo. Such a test runs itself
//! again as a child process, and only the child changes its limits.

use std::collections::BTreeMap;
use std::process::Command;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule};

/// The environment variable that is set in the child process.
const CHILD: &str = "OXBLK_TEST_CHILD";

/// Returns true in the child process. Otherwise runs the test `test` of this program as a child process, which must
/// succeed, and returns false.
pub fn is_child(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    false
}

/// Makes the kernel refuse the system calls `calls` of this process with `EPERM`.
pub fn refuse(calls: &[i64]) {
    let rules: BTreeMap<i64, Vec<SeccompRule>> = calls.iter().map(|call| (*call, vec![])).collect();
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter_all_threads(&program).unwrap();
}

//! Commands as a shell runs them.

use std::{
    io::Write as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{Fake, KEY};

/// A mesh, and a home without a configuration.
pub struct Shell {
    pub mesh: Fake,
    pub home: tempfile::TempDir,
}

impl Shell {
    pub fn new() -> Self {
        Self { mesh: Fake::start(), home: tempfile::tempdir().unwrap() }
    }

    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oc"));
        command
            .args(line.split_whitespace())
            .env_clear()
            .env("HOME", self.home.path())
            .env("OC_STATE_DIR", self.home.path().join("state"))
            .env("OC_API_URL", format!("http://{}/api", self.mesh.address))
            .env("OC_API_KEY", KEY)
            .current_dir(self.home.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    pub fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    pub fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} --json"))).unwrap()
    }

    /// Exit code and code of an error.
    pub fn refused(&self, line: &str) -> (i32, String) {
        let output = self.run(&format!("{line} --json"));
        let error: Value = serde_json::from_slice(&output.stderr).unwrap_or_else(|_| {
            panic!("{line}: no JSON on standard error: {:?}", text(&output.stderr));
        });
        assert!(!error["error"].as_str().unwrap().is_empty());
        (output.status.code().unwrap(), error["code"].as_str().unwrap().to_owned())
    }
}

/// Sends a signal to a child, once it decides itself what the signal means: before, it would just die of it.
pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let deadline = Instant::now() + Duration::from_secs(30);
    while signals_caught(pid) & 1 << (signal as i32 - 1) == 0 {
        assert!(Instant::now() < deadline, "{signal} is never caught");
        std::thread::yield_now();
    }
    kill(pid, signal).unwrap();
}

/// `SigCgt` of a process, proc_pid_status(5): bit N - 1 for signal N.
fn signals_caught(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap()
}

/// Makes a program of a script.
///
/// It is never open for writing in this process: another test's child would have that too until it is what it is to be,
/// and what is open for writing cannot be run.
pub fn script(path: &Path, body: &str) {
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    write!(install.stdin.take().unwrap(), "#!/bin/sh\n{body}\n").unwrap();
    assert!(install.wait().unwrap().success());
}

/// What a command wrote.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

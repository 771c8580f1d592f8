//! `oc node doctor`, with a script in the place of the agent's program.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use crate::fake::shell::{script, text};

/// As `oc-vmm-agent doctor` prints it: proto3 JSON.
const REPORT: &str = r#"{
  "checks": [
    {"id": "memory-swap", "title": "Swap", "status": "HOST_CHECK_STATUS_WARNING", "found": "/dev/sda2",
     "remedy": "swapoff -a", "concerns": ["VMM_KIND_QEMU", "VMM_KIND_FIRECRACKER"]},
    {"id": "kvm-device", "title": "/dev/kvm", "status": "HOST_CHECK_STATUS_PROBLEM", "found": "there is\u001b none",
     "remedy": "modprobe kvm_amd", "concerns": ["VMM_KIND_FIRECRACKER"], "fromTheFuture": 1},
    {"id": "clock", "title": "Clock", "status": "HOST_CHECK_STATUS_UNKNOWN", "found": "nobody shows",
     "concerns": ["VMM_KIND_QEMU", "VMM_KIND_FIRECRACKER"]}
  ],
  "ready": [READY],
  "version": "0.1.0"
}"#;

fn agent(directory: &Path, body: &str) {
    script(&directory.join("oc-vmm-agent"), body);
}

/// An agent that writes down what it is told, and knows these VMMs to be ready.
fn agent_with(directory: &Path, ready: &str) {
    let report = directory.join("report.json");
    fs::write(&report, REPORT.replace("READY", ready)).unwrap();
    agent(directory, &format!("echo \"$*\" > {0}/told; cat {1}", directory.display(), report.display()));
}

fn doctor(directory: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_oc"))
        .args(["node", "doctor", "--bin-dir", directory.to_str().unwrap()])
        .args(more)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("OC_STATE_DIR", "/state")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn what_is_found_is_shown_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    agent_with(directory.path(), "\"VMM_KIND_QEMU\"");
    let output = doctor(directory.path(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(
        text(&output.stdout),
        "STATUS   CHECK        FOR          FOUND\n\
         warning  memory-swap  all          /dev/sda2\n\
         problem  kvm-device   firecracker  there is\\u{1b} none\n\
         unknown  clock        all          nobody shows\n\
         \n\
         To do:\n\
         Swap      swapoff -a\n\
         /dev/kvm  modprobe kvm_amd\n\
         \n\
         qemu can run sandboxes here\n\
         firecracker runs no sandboxes here: kvm-device\n"
    );
    let told = fs::read_to_string(directory.path().join("told")).unwrap();
    assert_eq!(told, "doctor --data-dir /state/agent --network on --vmm auto\n");
}

#[test]
fn a_machine_that_runs_none_is_told_by_the_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    agent_with(directory.path(), "");
    let options = ["--json", "--vmm=firecracker", "--firecracker=/f", "--data-dir=/d", "--network=off"];
    let output = doctor(directory.path(), &options);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["checks"][1]["status"], "problem");
    assert_eq!(report["checks"][0]["concerns"][1], "firecracker");
    assert_eq!(report["ready"].as_array().map(Vec::len), Some(0));
    let told = fs::read_to_string(directory.path().join("told")).unwrap();
    assert_eq!(told, "doctor --data-dir /d --firecracker /f --network off --vmm firecracker\n");
}

#[test]
fn a_program_that_does_not_look_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |body: Option<&str>| {
        if let Some(body) = body {
            agent(directory.path(), body);
        }
        let output = doctor(directory.path(), &["--json"]);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        error["error"].as_str().unwrap().to_owned()
    };
    assert!(refused(None).contains("--bin-dir"));
    assert!(refused(Some("echo no such command >&2; exit 2")).contains("no such command"));
    assert!(refused(Some("echo '{\"checks\": 1}'")).contains("another version"));
}

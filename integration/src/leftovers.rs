//! What a mesh that was stopped has left on this machine: nothing but its state directory's records, logs and key.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest as _, Sha256};

use crate::processes;

/// What stays after a stop (clients/cli/src/up/layout.rs).
const STAYS: [&str; 5] = ["api-key", "log", "agent", "objects", "tls"];

/// Names everything of the mesh in `state` with the host `host_id` that should not be there any more.
///
/// # Errors
///
/// If this machine cannot be searched.
pub fn of(state: &Path, host_id: &str) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let text = state.display().to_string();
    for process in processes::naming(&text) {
        found.push(format!("process {}: {}", process.pid, process.command.join(" ")));
    }
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines().filter(|line| line.contains(&text)) {
        found.push(format!("mount {line}"));
    }
    found.extend(cgroups(host_id)?.into_iter().map(|dir| format!("cgroup {}", dir.display())));
    found.extend(networks(state)?);
    for name in names(state)? {
        if !STAYS.contains(&name.as_str()) && !name.starts_with("store.db") {
            found.push(format!("file {name}"));
        }
    }
    for place in ["agent/vms", "agent/journal"] {
        found.extend(names(&state.join(place))?.into_iter().map(|name| format!("file {place}/{name}")));
    }
    Ok(found)
}

/// Control groups of a host's agent, in every tree.
fn cgroups(host_id: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let root = Path::new("/sys/fs/cgroup");
    let trees = names(root)?.into_iter().map(|name| root.join(name)).chain([root.to_owned()]);
    for parent in trees.map(|tree| tree.join("opencomputer")) {
        for name in names(&parent)?.into_iter().filter(|name| name.starts_with(&format!("{host_id}-"))) {
            found.push(parent.join(name));
        }
    }
    Ok(found)
}

/// What tells the networks of the agent of the mesh in `state` from others' (vmm-agent/src/driver.rs).
pub fn tag(state: &Path) -> String {
    let agent = state.join("agent");
    let place = fs::canonicalize(&agent).unwrap_or(agent);
    hex::encode(&Sha256::digest(place.as_os_str().as_encoded_bytes())[..4])
}

/// Namespaces, links and tables of a packet filter that are the agent's of the mesh in `state`
/// (vmm-agent/src/network/plan.rs).
fn networks(state: &Path) -> io::Result<Vec<String>> {
    let tag = tag(state);
    let is_own = |name: &String| name.starts_with(&format!("oc-{tag}"));
    let mut found: Vec<String> = names(Path::new("/run/netns"))?
        .into_iter()
        .filter(is_own)
        .map(|name| format!("netns {name}"))
        .collect();
    let link = format!("oc{tag}");
    if Path::new("/sys/class/net").join(&link).exists() {
        found.push(format!("link {link}"));
    }
    let tables = Command::new("nft").args(["list", "tables"]).output()?;
    if !tables.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&tables.stderr).into_owned()));
    }
    let tables = String::from_utf8_lossy(&tables.stdout).into_owned();
    found.extend(tables.lines().filter(|line| line.contains(&tag)).map(str::to_owned));
    Ok(found)
}

/// What is in a directory; nothing if there is none.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

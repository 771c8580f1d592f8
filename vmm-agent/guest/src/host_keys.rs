//! The SSH server's host keys: who connects to a fork must not take it for the sandbox that it was forked of.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Where the keys are (sshd(8)).
const DIRECTORY: &str = "/etc/ssh";

/// Makes new keys in the place of those that are there, and tells a server that runs. Whether there were any.
///
/// # Errors
///
/// If a key cannot be replaced: then nobody must use this guest.
pub fn renew() -> io::Result<bool> {
    let old = keys(Path::new(DIRECTORY))?;
    if old.is_empty() {
        return Ok(false);
    }
    for key in &old {
        fs::remove_file(key)?;
    }
    // All kinds that are missing (ssh-keygen(1)).
    let made = Command::new("ssh-keygen")
        .arg("-A")
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .and_then(|mut child| child.wait());
    if let Err(error) = made {
        // Either there is no such program, and no keys are as good as new ones; or the first process, which takes the exit
        // of every child, was quicker.
        eprintln!("oc-guest: ssh-keygen: {error}");
    }
    servers()?.into_iter().for_each(|server| {
        // It reads its keys anew; one that has just ended need not.
        let _ = kill(server, Signal::SIGHUP);
    });
    Ok(true)
}

/// The files of host keys in a directory, private and public; none if there is no such directory.
fn keys(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let is_key = |name: &str| {
            name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub"))
        };
        if name.to_str().is_some_and(is_key) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The SSH servers that listen: processes called `sshd`.
fn servers() -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let pid = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        let is_server = fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim_end() == "sshd");
        if let Some(pid) = pid.filter(|_| is_server) {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_keys_are_keys() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "ssh_host_ed25519_key",
            "ssh_host_ed25519_key.pub",
            "sshd_config",
            "ssh_config",
            "ssh_host_notes",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let mut names: Vec<_> =
            keys(dir.path()).unwrap().into_iter().map(|path| path.file_name().unwrap().to_owned()).collect();
        names.sort();
        assert_eq!(names, ["ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"]);
        assert!(keys(&dir.path().join("none")).unwrap().is_empty());
    }
}

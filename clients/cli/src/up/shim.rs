//! How a service is started: as `oc run-service`, which gives it a session of its own, journals it, and becomes
//! it. The journal exists before the service does, and whoever holds the lock on the state directory after the
//! supervisor's death finds every service that lives: a shim whose supervisor is gone ends instead.

use std::{ffi::OsString, fs, io, os::unix::process::CommandExt as _, path::Path, process::Command};

use clap::Args;
use nix::{
    sys::stat::{Mode, umask},
    unistd::{getpid, getppid, setsid},
};

use crate::{config::write_secret_by, failure::Failure};

use super::{identity::Identity, layout::Layout};

/// Name of the command on `oc`'s command line.
pub const COMMAND: &str = "run-service";

/// `oc run-service`.
#[derive(Debug, Args)]
pub struct RunService {
    /// Its name
    #[arg(long)]
    pub service: String,
    /// Process ID of the supervisor
    #[arg(long)]
    pub supervisor: i32,
    /// Only the owner may use the files it makes
    #[arg(long)]
    pub private: bool,
    /// The service and its arguments
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

/// Becomes the service; returns only if that fails.
pub fn become_service(state_dir: &Path, service: &RunService) -> Failure {
    let journal = match Layout::new(state_dir) {
        Ok(layout) => layout.journal(&service.service, getpid().as_raw()),
        Err(failure) => return failure,
    };
    let failure = attempt(&journal, service);
    // Nothing runs that it could name.
    let _ = fs::remove_file(journal);
    failure
}

fn attempt(journal: &Path, service: &RunService) -> Failure {
    let [program, arguments @ ..] = service.command.as_slice() else {
        return Failure::Usage("no service is named".to_owned());
    };
    // The terminal's Ctrl-C and hang-up are the supervisor's alone.
    if let Err(errno) = setsid() {
        return Failure::local("cannot start a session", io::Error::from(errno));
    }
    umask(Mode::from_bits_truncate(if service.private { 0o077 } else { 0o022 }));
    if let Err(error) = write_journal(journal) {
        return Failure::local(format!("cannot write {}", journal.display()), error);
    }
    if getppid().as_raw() != service.supervisor {
        return Failure::Conflict("the supervisor has ended".to_owned());
    }
    let error = Command::new(program).args(arguments).exec();
    Failure::local(format!("cannot run {}", program.display()), error)
}

/// Says who the service is. The directory is not made: where it is gone the mesh has ended, and nothing of it may come
/// back.
fn write_journal(journal: &Path) -> io::Result<()> {
    let identity = Identity::current()?;
    let temporary = journal.with_extension(format!("tmp-{}", identity.pid()));
    write_secret_by(&temporary, journal, format!("{identity}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_does_not_bring_its_directory_back() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        let journal = run.join("scheduler.1.pid");
        assert_eq!(write_journal(&journal).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!run.exists());
        fs::create_dir(&run).unwrap();
        write_journal(&journal).unwrap();
        let identity: Identity = fs::read_to_string(&journal).unwrap().parse().unwrap();
        assert!(identity.is_alive());
        assert_eq!(fs::read_dir(&run).unwrap().count(), 1);
    }
}

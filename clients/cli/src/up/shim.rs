//! How a service is started: as `oc run-service`, which gives it a session of its own, journals it, and becomes
//! it. The journal exists before the service does, and whoever holds the lock on the state directory after the
//! supervisor's death finds every service that lives: a shim whose supervisor is gone ends instead.

use std::{ffi::OsString, fs, io, os::unix::process::CommandExt as _, path::Path, process::Command};

use clap::Args;
use nix::{
    sys::stat::{Mode, umask},
    unistd::{getpid, getppid, setsid},
};

use crate::{config::write_secret, failure::Failure};

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
    let journaled =
        Identity::current().and_then(|identity| write_secret(journal, format!("{identity}\n").as_bytes()));
    if let Err(error) = journaled {
        return Failure::local(format!("cannot write {}", journal.display()), error);
    }
    if getppid().as_raw() != service.supervisor {
        return Failure::Conflict("the supervisor has ended".to_owned());
    }
    let error = Command::new(program).args(arguments).exec();
    Failure::local(format!("cannot run {}", program.display()), error)
}

//! One agent per data directory: two would destroy each other's VMs.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

const FILE: &str = "lock";

/// Held while an agent works on a data directory. The kernel lets go of it however the agent ends.
#[derive(Debug)]
pub struct Lock {
    _held: Flock<File>,
}

/// Why a data directory cannot be worked on.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent does.
    #[error("another agent works on {}: stop it first", .0.display())]
    Held(PathBuf),
    /// The file system says no.
    #[error("cannot lock {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

impl Lock {
    /// Takes the lock of `data_dir`, which must exist.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] while another agent has it.
    pub fn take(data_dir: &Path) -> Result<Self, LockError> {
        let path = data_dir.join(FILE);
        // Opened close-on-exec, as all files of Rust's: VM processes do not inherit it.
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| LockError::Io(path.clone(), error))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Self { _held: held }),
            Err((_, Errno::EWOULDBLOCK)) => Err(LockError::Held(data_dir.to_owned())),
            Err((_, errno)) => Err(LockError::Io(path, errno.into())),
        }
    }

    /// The name of the lock's file in a data directory.
    pub fn file_name() -> &'static str {
        FILE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_until_the_first_ends() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        assert!(matches!(Lock::take(dir.path()), Err(LockError::Held(_))));
        drop(first);
        Lock::take(dir.path()).unwrap();
    }
}

//! A VM's process, held by a pidfd: no other process is ever taken for it, and it need not be a child of the agent.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSliceMut},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::uio::{RemoteIoVec, process_vm_readv},
};
use rustix::{
    io::Errno,
    process::{
        Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitId, WaitIdOptions, pidfd_getfd, pidfd_open,
        pidfd_send_signal, waitid,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

/// A process that was killed ends when its memory is given back.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// A process that runs, or did.
#[derive(Clone, Debug)]
pub struct Process {
    pid: i32,
    fd: Arc<AsyncFd<OwnedFd>>,
}

impl Process {
    /// Takes hold of the process `pid`. The caller makes sure afterwards that it is the one it means.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let number = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = pidfd_open(number, PidfdFlags::NONBLOCK)?;
        // SAFETY: `OwnedFd` is one descriptor that stays open, and the same, until it is dropped.
        #[allow(unsafe_code)]
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? };
        Ok(Self { pid, fd: Arc::new(fd) })
    }

    /// Opens a file of the process in `/proc`. It stays this process's, whoever gets its number later.
    ///
    /// # Errors
    ///
    /// If it has ended, or the file cannot be opened.
    pub fn open_file(&self, name: &str, options: &OpenOptions) -> io::Result<File> {
        let file = options.open(format!("/proc/{}/{name}", self.pid))?;
        // Its number was not another's when the file was opened.
        self.alive()?;
        Ok(file)
    }

    /// A copy of its descriptor of what `/proc/PID/fd` calls `name`, if it has one.
    ///
    /// # Errors
    ///
    /// If it has ended, or the kernel does not permit.
    pub fn copy_of_descriptor(&self, name: &str) -> io::Result<Option<OwnedFd>> {
        let named = Path::new(name);
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
            let path = entry?.path();
            // One that is closed meanwhile is not the one.
            if fs::read_link(&path).ok().as_deref() != Some(named) {
                continue;
            }
            let number = path.file_name().and_then(|number| number.to_str()?.parse().ok());
            let number = number.ok_or(io::ErrorKind::InvalidData)?;
            let copy = pidfd_getfd(self.fd.get_ref(), number, PidfdGetfdFlags::empty())?;
            // It may have put another in its place since: what came of it is what counts.
            let got = fs::read_link(format!("/proc/self/fd/{}", copy.as_raw_fd()))?;
            return Ok((got == named).then_some(copy));
        }
        self.alive()?;
        Ok(None)
    }

    /// Reads `places`, addresses and lengths in the process's memory, one after the other into `buffer`, which they fill:
    /// 1024 at most.
    ///
    /// # Errors
    ///
    /// If it has ended, or has nothing there.
    pub fn read_memory(&self, places: impl Iterator<Item = (u64, u64)>, buffer: &mut [u8]) -> io::Result<()> {
        // Both fit: the process is one of this machine.
        let remote: Vec<_> =
            places.map(|(base, len)| RemoteIoVec { base: base as usize, len: len as usize }).collect();
        let wanted = buffer.len();
        let read =
            process_vm_readv(nix::unistd::Pid::from_raw(self.pid), &mut [IoSliceMut::new(buffer)], &remote)?;
        if read != wanted {
            return Err(io::Error::other(format!(
                "{read} of {wanted} bytes of a process's memory can be read"
            )));
        }
        self.alive()
    }

    /// Fails if it has ended: then its number may be another's.
    fn alive(&self) -> io::Result<()> {
        let mut ended = [PollFd::new(self.fd.get_ref().as_fd(), PollFlags::POLLIN)];
        match poll(&mut ended, PollTimeout::ZERO)? {
            0 => Ok(()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Completes when the process has ended.
    pub fn exit(&self) -> BoxFuture<'static, ()> {
        let fd = self.fd.clone();
        Box::pin(async move {
            // pidfd_open(2): readable once the process has ended, for ever.
            if let Err(error) = fd.readable().await {
                tracing::error!(%error, "cannot wait for a process");
                return std::future::pending().await;
            }
            reap(&fd);
        })
    }

    /// Ends it and waits until it is gone.
    ///
    /// # Errors
    ///
    /// If it does not end in time.
    pub async fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.fd.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        timeout(ENDS_WITHIN, self.exit()).await.map_err(|_| io::ErrorKind::TimedOut.into())
    }
}

/// Takes the exit status if it is a child of ours; those of an earlier agent are init's to reap.
fn reap(fd: &AsyncFd<OwnedFd>) {
    let _ = waitid(WaitId::PidFd(fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn tells_when_a_process_has_ended() {
        #[allow(clippy::zombie_processes, reason = "what is tested takes its exit status")]
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::open(pid).unwrap();
        assert!(timeout(Duration::from_millis(20), process.exit()).await.is_err());
        process.kill().await.unwrap();
        process.kill().await.unwrap();
        process.exit().await;
        // Reaped: its number is free.
        assert!(Process::open(pid).is_err());
    }
}

//! Processes that cannot be mistaken for others: a process ID is reused, a process ID with its start time on
//! the same boot is not. Signals go through a pidfd, which stays with its process.

use std::{
    fmt, fs, io,
    os::fd::{AsFd as _, OwnedFd},
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::task::spawn_blocking;

/// After SIGKILL a process ends as soon as the kernel lets it; one stuck in a system call may not.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// One process for ever: ID, start time, boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pid: i32,
    /// Clock ticks since the boot: field 22 of `/proc/PID/stat`, proc_pid_stat(5).
    start: u64,
    boot: String,
}

impl Identity {
    /// Of the process that has this ID now; none if there is none, or only its exit status.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start) = state_and_start(&stat)?;
        if matches!(state, 'Z' | 'X') {
            return None;
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Some(Self { pid, start, boot: boot.trim().to_owned() })
    }

    /// Our own.
    pub fn current() -> io::Result<Self> {
        // The same number as `process::id()`, with the sign that the kernel gives it.
        let pid = nix::unistd::getpid().as_raw();
        Self::of(pid).ok_or_else(|| io::Error::other("/proc does not show this process"))
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Process ID.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

/// The third field and the 22nd; the second is a name in parentheses that may hold anything.
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

impl fmt::Display for Identity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {}", self.pid, self.start, self.boot)
    }
}

impl FromStr for Identity {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let mut fields = text.split_whitespace();
        let parsed = (|| {
            let pid = fields.next()?.parse().ok().filter(|pid| *pid > 0)?;
            let start = fields.next()?.parse().ok()?;
            Some(Self { pid, start, boot: fields.next().unwrap_or_default().to_owned() })
        })();
        parsed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a process identity"))
    }
}

/// A process of ours that somebody else is the parent of.
#[derive(Debug)]
pub struct Process {
    fd: Arc<OwnedFd>,
}

impl Process {
    /// Takes hold of a process; none if it has ended.
    pub fn open(identity: &Identity) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(identity.pid) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Only now: the ID may have passed to another process until we had hold of it, but not since.
        if !identity.is_alive() {
            return Ok(None);
        }
        Ok(Some(Self { fd: Arc::new(fd) }))
    }

    /// Sends a signal. One that has ended is fine.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&*self.fd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for its end; whether it came within `patience`.
    pub async fn ended(&self, patience: Duration) -> io::Result<bool> {
        let fd = Arc::clone(&self.fd);
        // A thread of its own for a wait that happens thrice in the life of a supervisor.
        spawn_blocking(move || poll_until(&fd, Instant::now() + patience)).await.map_err(io::Error::other)?
    }

    /// Asks it to end, and makes it end after `patience`.
    pub async fn terminate(&self, patience: Duration) -> io::Result<()> {
        self.signal(Signal::TERM)?;
        if self.ended(patience).await? {
            return Ok(());
        }
        self.signal(Signal::KILL)?;
        if self.ended(KILL_DEADLINE).await? { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }
}

/// A pidfd is readable from the end of its process on.
fn poll_until(fd: &OwnedFd, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_confuse() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 99";
        assert_eq!(state_and_start(&format!("7 (a) b (c)) {tail}")), Some(('S', 4242)));
        assert_eq!(state_and_start("7 (a) S 1"), None);
    }

    #[test]
    fn an_identity_survives_its_file() {
        let identity = Identity::current().unwrap();
        assert!(identity.is_alive());
        assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        assert!("".parse::<Identity>().is_err());
        assert!("-1 5 x".parse::<Identity>().is_err());
    }

    #[tokio::test]
    async fn another_process_with_the_same_id_is_left_alone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut identity = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        identity.start += 1;
        assert!(Process::open(&identity).unwrap().is_none());
        identity.start -= 1;
        let process = Process::open(&identity).unwrap().unwrap();
        process.terminate(Duration::from_secs(5)).await.unwrap();
        assert!(!identity.is_alive());
        assert!(Process::open(&identity).unwrap().is_none());
        child.wait().unwrap();
        assert!(Process::open(&identity).unwrap().is_none());
    }

    #[tokio::test]
    async fn one_that_does_not_listen_is_killed() {
        let mut child = Command::new("sh")
            .args(["-c", "trap '' TERM; echo; exec sleep 60"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The line says that the trap is set.
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let identity = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let process = Process::open(&identity).unwrap().unwrap();
        process.terminate(Duration::from_millis(50)).await.unwrap();
        child.wait().unwrap();
    }
}

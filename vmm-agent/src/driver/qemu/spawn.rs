//! fork(2), what a child gives up, and execve(2).
//!
//! In this order, because each step needs what a later one takes away: joins its control group, leaves the host's
//! network and IPC namespaces, becomes a session of its own (so that no signal of the agent's terminal reaches it),
//! takes its limits, becomes its home's user, and can gain nothing any more.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Command, Stdio},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::{Gid, Uid, setgid, setgroups, setsid, setuid},
};
use tokio::task::spawn_blocking;

use super::PROGRAM;
use crate::driver::{child, home::SNAPSHOT_GID, process::Process};

/// Files that a VMM may have open.
const MAX_FILES: u64 = 512;

/// What a child becomes.
#[derive(Debug)]
pub struct Plan {
    /// QEMU's arguments.
    pub arguments: Vec<String>,
    /// What it inherits, under the numbers that these have here.
    pub inherited: Vec<OwnedFd>,
    /// Where it joins its control group.
    pub entrances: Vec<File>,
    /// Its user, and the group of the same number.
    pub uid: u32,
    /// Its standard output and standard error.
    pub console: OwnedFd,
    /// A library that is loaded before the program, if any. By descriptor: its user need not find the way to it.
    pub preload: Option<File>,
}

/// Starts QEMU. If this future is dropped, the process is still in its control group.
///
/// # Errors
///
/// If a step fails; the error does not say which, the kernel's number usually does.
pub async fn spawn(plan: Plan) -> io::Result<Process> {
    let child = spawn_blocking(move || {
        let errors = plan.console.try_clone()?;
        let mut command = Command::new(PROGRAM);
        command
            .args(&plan.arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(plan.console)
            .stderr(errors);
        let mut inherited: Vec<RawFd> = plan.inherited.iter().map(|fd| fd.as_raw_fd()).collect();
        if let Some(library) = &plan.preload {
            command.env("LD_PRELOAD", format!("/proc/self/fd/{}", library.as_raw_fd()));
            inherited.push(library.as_raw_fd());
        }
        let (uid, entrances) = (plan.uid, plan.entrances);
        // SAFETY: the closure runs in the child of a process with threads, where only async-signal-safe functions may be
        // called. It makes system calls on values that were made before, and does not allocate.
        unsafe {
            command.pre_exec(move || {
                child::join(&entrances)?;
                become_nobody(uid)?;
                for &fd in &inherited {
                    fcntl(std::os::fd::BorrowedFd::borrow_raw(fd), FcntlArg::F_SETFD(FdFlag::empty()))?;
                }
                Ok(())
            });
        }
        let child = command.spawn()?;
        drop((plan.inherited, plan.preload));
        io::Result::Ok(child.id())
    })
    .await??;
    let pid = i32::try_from(child).map_err(|_| io::ErrorKind::InvalidData)?;
    // Our child, not yet waited for: its number cannot be another's.
    let process = Process::open(pid)?;
    // Its exit status is taken whoever else is interested in its end.
    tokio::spawn(process.exit());
    Ok(process)
}

fn become_nobody(uid: u32) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC)?;
    setsid()?;
    // Huge pages round up what QEMU's heap and its translated code take, for every VM: some 4 MiB (measured). A
    // clone's memory is a file's and has none either way.
    prctl::set_thp_disable(true)?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FILES, MAX_FILES)?;
    setgroups(&[Gid::from_raw(SNAPSHOT_GID)])?;
    setgid(Gid::from_raw(uid))?;
    setuid(Uid::from_raw(uid))?;
    child::bound()
}

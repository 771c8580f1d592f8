//! Starts a jailer, which becomes Firecracker.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{ExitStatus, Stdio},
};

use nix::sched::{CloneFlags, unshare};
use tokio::process::Command;

use crate::driver::child;

/// What a jailer is started with.
#[derive(Debug)]
pub struct Plan {
    /// The jailer.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where it joins the VM's control group.
    pub entrances: Vec<File>,
    /// Standard output and standard error, of it and what it becomes.
    pub console: OwnedFd,
    /// Whether it is told a network to enter; else it has none.
    pub has_network: bool,
}

/// Runs a jailer until it has started the VMM, which is not its child any more then, but in its control group.
///
/// # Errors
///
/// If it cannot be started. How it has ended is the answer.
pub async fn jail(plan: Plan) -> io::Result<ExitStatus> {
    let errors = plan.console.try_clone()?;
    let (entrances, has_network) = (plan.entrances, plan.has_network);
    let mut command = Command::new(&plan.program);
    command
        .args(&plan.arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(plan.console)
        .stderr(errors)
        .kill_on_drop(true);
    // SAFETY: the closure runs in the child of a process with threads, where only async-signal-safe functions may be called. It
    // makes system calls on values that were made before, and does not allocate.
    unsafe {
        command.pre_exec(move || {
            child::join(&entrances)?;
            let mut left = CloneFlags::CLONE_NEWIPC;
            left.set(CloneFlags::CLONE_NEWNET, !has_network);
            unshare(left)?;
            child::bound()?;
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(|error| {
        let program = plan.program.display();
        io::Error::new(error.kind(), format!("cannot run {program}: {error}"))
    })?;
    // Else it would hold the console's end that is the VMM's.
    drop(command);
    child.wait().await
}

//! Every process of the guest whose parent is PID 1: commands, and what they left behind.
//!
//! There is one table for the process, as the kernel has one. Starting a command and noting its ID happen under the lock
//! under which ended processes are collected, so that no end is missed and no ID is used for another process.

use std::{
    collections::HashMap,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use crate::family::Family;

/// Exit codes of commands that a signal ended begin here, as a shell reports them.
const SIGNALLED: i32 = 128;

static RUNNING: Mutex<Option<HashMap<i32, oneshot::Sender<i32>>>> = Mutex::new(None);

fn running() -> MutexGuard<'static, Option<HashMap<i32, oneshot::Sender<i32>>>> {
    // A map of senders is whole whatever panicked.
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A command that was started, the leader of a process group. Dropped before it has ended, it is killed with its group:
/// nobody would hear of its end.
#[derive(Debug)]
pub struct Process {
    id: i32,
    exit: oneshot::Receiver<i32>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_group();
    }
}

/// A process group, by its leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group(i32);

impl Group {
    /// Everybody who descends from its leader. Blocks.
    pub fn family(self) -> Family {
        Family::of(self.0)
    }

    /// Signals every process of the group, unless its leader has ended already: then its ID may be another's.
    pub fn signal(self, signal: Signal) {
        if running().as_ref().is_some_and(|running| running.contains_key(&self.0)) {
            // It fails only if there is none left.
            let _ = killpg(Pid::from_raw(self.0), signal);
        }
    }
}

/// Notes the process whose ID `spawn` returns. It must be the leader of a process group.
///
/// # Errors
///
/// What `spawn` said.
pub fn start<E>(spawn: impl FnOnce() -> Result<i32, E>) -> Result<Process, E> {
    let mut running = running();
    let id = spawn()?;
    let (ended, exit) = oneshot::channel();
    running.get_or_insert_default().insert(id, ended);
    Ok(Process { id, exit })
}

impl Process {
    /// Waits until it has ended: its exit code, or 128 and the signal.
    pub async fn exit(&mut self) -> i32 {
        // Its sender is dropped only with the table, which never is.
        (&mut self.exit).await.unwrap_or(-1)
    }

    /// Its group, which may be signalled by others than whoever waits for its end.
    pub fn group(&self) -> Group {
        Group(self.id)
    }

    /// Kills it and every process of its group, unless it has ended already.
    pub fn kill_group(&self) {
        self.group().signal(Signal::SIGKILL);
    }

    /// Kills what it has left of its group; only right after it has ended. Its ID is nobody else's while there is anything left,
    /// and afterwards not until the kernel has given out all others.
    pub fn kill_rest(&self) {
        let _ = killpg(Pid::from_raw(self.id), Signal::SIGKILL);
    }
}

/// Collects every process that ends, from now on.
///
/// # Errors
///
/// If the signal cannot be watched.
pub fn reap_forever() -> io::Result<()> {
    let mut ended = signal(SignalKind::child())?;
    tokio::spawn(async move {
        loop {
            collect();
            if ended.recv().await.is_none() {
                return;
            }
        }
    });
    Ok(())
}

fn collect() {
    let mut running = running();
    loop {
        let (id, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(id, code)) => (id, code),
            Ok(WaitStatus::Signaled(id, signal, _)) => (id, SIGNALLED + signal as i32),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(error) => {
                eprintln!("oc-guest: waitpid: {error}");
                return;
            }
        };
        if let Some(waiting) = running.as_mut().and_then(|running| running.remove(&id.as_raw())) {
            let _ = waiting.send(code);
        }
    }
}

/// Collects the commands that end in a process of tests, and leaves what tests start by other means to them.
#[cfg(test)]
pub fn reap_in_tests() {
    static REAPED: std::sync::Once = std::sync::Once::new();
    REAPED.call_once(|| {
        std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut ended = signal(SignalKind::child()).unwrap();
                loop {
                    let ids: Vec<i32> = running().iter().flatten().map(|(id, _)| *id).collect();
                    for id in ids {
                        collect_one(Pid::from_raw(id));
                    }
                    ended.recv().await;
                }
            });
        });
    });
}

#[cfg(test)]
fn collect_one(id: Pid) {
    let code = match waitpid(id, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => code,
        Ok(WaitStatus::Signaled(_, signal, _)) => SIGNALLED + signal as i32,
        _ => return,
    };
    if let Some(waiting) = running().as_mut().and_then(|running| running.remove(&id.as_raw())) {
        let _ = waiting.send(code);
    }
}

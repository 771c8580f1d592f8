//! The agent's [fail points](oc_mesh::fail): each stands behind the step that it is called by.
//!
//! A step that can meet an error is followed by [`pass`], which may be one; one that is done for good by [`reached`].

use std::{fs, io, os::fd::AsFd as _};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oc_mesh::fail::{self, Action, Failed, Point};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tracing::{error, warn};

use crate::microvm::MakeError;

oc_mesh::fail_points! {
    /// The guest that is to be taken down stands still.
    CAPTURE_QUIESCED = "agent.capture.quiesced";
    /// The snapshot is begun.
    CAPTURE_DRAFTED = "agent.capture.drafted";
    /// The VM is paused.
    CAPTURE_PAUSED = "agent.capture.paused";
    /// It goes on.
    CAPTURE_RESUMED = "agent.capture.resumed";
    /// Its guest says so.
    CAPTURE_THAWED = "agent.capture.thawed";
    /// The snapshot is listed.
    CAPTURE_KEPT = "agent.capture.kept";

    /// The devices of a snapshot are written.
    SNAPSHOT_DEVICES = "agent.snapshot.devices";
    /// The pages and the disk of a snapshot are taken.
    SNAPSHOT_PAGES = "agent.snapshot.pages";
    /// All parts of a snapshot are on disk.
    SNAPSHOT_FILLED = "agent.snapshot.filled";
    /// Its manifest is.
    SNAPSHOT_MANIFEST = "agent.snapshot.manifest";
    /// It has its name.
    SNAPSHOT_RENAMED = "agent.snapshot.renamed";

    /// The guest that is to be put to sleep stands still.
    HIBERNATE_QUIESCED = "agent.hibernate.quiesced";
    /// The VM does.
    HIBERNATE_HALTED = "agent.hibernate.halted";
    /// The journal says that it is paused.
    HIBERNATE_PAUSED = "agent.hibernate.paused";
    /// What is stored of it is begun.
    HIBERNATE_DRAFTED = "agent.hibernate.drafted";
    /// It is stored.
    HIBERNATE_STORED = "agent.hibernate.stored";
    /// The journal says that it is hibernated.
    HIBERNATE_JOURNALLED = "agent.hibernate.journalled";
    /// Its process has ended.
    HIBERNATE_RELEASED = "agent.hibernate.released";

    /// A VM has its network, and no VMM yet.
    START_PLUGGED = "agent.start.plugged";
    /// The VMM of a VM that is made of a snapshot has been started.
    START_LAUNCHED = "agent.start.launched";
    /// Its memory is there.
    START_PAGED = "agent.start.paged";
    /// Its devices are.
    START_LOADED = "agent.start.loaded";

    /// A clone of the pool has taken on what is stored of a VM.
    WAKE_GRAFTED = "agent.wake.grafted";
    /// The journal says that the clone runs, and that the VM is stored.
    WAKE_CLAIMED = "agent.wake.claimed";
    /// It speaks of the clone alone.
    WAKE_REPLACED = "agent.wake.replaced";
    /// The journal says that a VM that slept runs.
    WAKE_JOURNALLED = "agent.wake.journalled";
    /// It is let go on.
    WAKE_RESUMED = "agent.wake.resumed";
    /// Its guest has answered.
    WAKE_ANSWERED = "agent.wake.answered";
    /// What was stored of it is removed.
    WAKE_FORGOTTEN = "agent.wake.forgotten";

    /// The home of a new VM is made.
    CREATE_HOME = "agent.create.home";
    /// A snapshot's disk is in it.
    CREATE_LAYER = "agent.create.layer";
    /// A clone of the pool is of the snapshot's state.
    CREATE_GRAFTED = "agent.create.grafted";
    /// The VM goes on.
    CREATE_RESUMED = "agent.create.resumed";
    /// Its guest knows who it is.
    CREATE_ACTIVATED = "agent.create.activated";
    /// The journal says that it runs.
    CREATE_JOURNALLED = "agent.create.journalled";
    /// The VM that it was to replace is gone.
    CREATE_REPLACED = "agent.create.replaced";

    /// A snapshot that is deleted is not listed any more.
    DELETE_UNLISTED = "agent.delete.unlisted";
    /// It has a draft's name.
    DELETE_HIDDEN = "agent.delete.hidden";
    /// It is removed.
    DELETE_REMOVED = "agent.delete.removed";
}

/// What the agent's points know.
pub const ACTIONS: &[Action] = &[Action::Kill, Action::KillVmm, Action::Fail, Action::Pause];
/// A VMM that was killed gives its memory back first.
const ENDS_WITHIN_MS: u16 = 10_000;

impl From<Failed> for MakeError {
    fn from(failed: Failed) -> Self {
        Self::Backend(failed.to_string())
    }
}

/// Passes a point of the VM called `vm`.
///
/// # Errors
///
/// [`Failed`] if it is to be one.
pub fn pass(point: Point, vm: &str) -> Result<(), Failed> {
    match fail::pass(point) {
        None | Some(Action::Kill | Action::Pause) => {}
        Some(Action::Fail) => return Err(Failed(point)),
        Some(Action::KillVmm) => {
            if let Err(error) = kill_vmm(vm) {
                error!(vm, %error, "cannot kill a VMM at a fail point");
            }
        }
    }
    Ok(())
}

/// Passes a point of the VM called `vm`, at which nothing can fail any more.
pub fn reached(point: Point, vm: &str) {
    if let Err(failed) = pass(point, vm) {
        warn!(vm, "not so: {failed}");
    }
}

/// Kills the processes that have the name of a VM, and nothing else of ours, on their command line; they are gone then.
fn kill_vmm(vm: &str) -> io::Result<()> {
    if vm.is_empty() {
        return Err(io::Error::other("no VM is at hand"));
    }
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else {
            continue;
        };
        // Held before it is looked at: the number is no other's then.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let command = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let program = command.split('\0').next().unwrap_or_default();
        if program.contains("qemu") && command.contains(vm) {
            pidfd_send_signal(&process, Signal::KILL)?;
            // pidfd_open(2): readable once it has ended.
            poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::from(ENDS_WITHIN_MS))?;
        }
    }
    Ok(())
}

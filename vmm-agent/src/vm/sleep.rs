//! How a VM is stored and made to run again.
//!
//! ```text
//!   quiesce ─► pause ─► write memory and devices ─► journal: hibernated ─► end the process
//!                                                     (from here on it is)
//!   verify ─► start a VMM, paused, with all of it ─► journal: running ─► let it go on ─► forget what was stored
//!                                                     (from here on it does)
//! ```
//!
//! The disk is never copied: nothing writes to it between the pause and the moment in which the VM goes on. What is
//! stored of the memory is of exactly that disk, so it counts only while the journal says that the VM is stored. A
//! death before either line of the journal leads back to where it began, one after it to the end.
//!
//! Memory that cannot be used is removed for good before its disk is booted instead.

use std::time::Duration;

use tokio::time::timeout;
use tracing::{info, warn};

use super::start::{Order, StartError};
use crate::{
    journal::{Owner, Stage, StartPath},
    microvm::{MakeError, MicroVm},
    telemetry,
};

/// Memory is written at the disk's pace.
const STORE_DEADLINE: Duration = Duration::from_secs(120);
/// The process of a stored VM is to be gone.
const RELEASE_DEADLINE: Duration = Duration::from_secs(30);
/// Memory is read at the disk's pace.
const RESTORE_DEADLINE: Duration = Duration::from_secs(60);
/// From the moment a woken VM goes on to its guest's answer: milliseconds at rest.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// As of a new VM.
const BOOT_DEADLINE: Duration = Duration::from_secs(65);

/// Stores the VM of `owner`, which was started by `path`. When it returns `Ok` it is stored for good, though its process
/// may still be there ([`release`]). Returns what that takes, bytes.
///
/// Not to be dropped half-way.
///
/// # Errors
///
/// [`MakeError`] says why it runs on.
pub async fn store(owner: &Owner, path: StartPath, microvm: &mut MicroVm) -> Result<u64, MakeError> {
    let is_quiet = match microvm.quiesce().await {
        Ok(()) => true,
        Err(error) => {
            // Memory and disk are of one instant all the same. Only a boot of the disk alone sees a difference.
            warn!(%error, "the guest does not stand still by itself: it is stored as it is");
            false
        }
    };
    let writing = telemetry::step("store", microvm.instance().store(is_quiet));
    let stored = match timeout(STORE_DEADLINE, writing).await.unwrap_or(Err(MakeError::Late)) {
        Ok(stored_bytes) => {
            let stage = Stage::Hibernated { owner: owner.clone(), path, stored_bytes };
            microvm.enter_for_good(stage).await.map(|()| stored_bytes)
        }
        Err(error) => Err(error),
    };
    if stored.is_err()
        && let Err(error) = timeout(ANSWER_DEADLINE, go_on(microvm)).await.unwrap_or(Err(MakeError::Late))
    {
        warn!(%error, "it was not stored, and its guest does not answer yet");
    }
    stored
}

/// Ends the process of a VM that is stored. What resists is ended when it is woken.
pub async fn release(microvm: &mut MicroVm) {
    match timeout(RELEASE_DEADLINE, microvm.instance().release()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(vm = microvm.id(), %error, "cannot end all of a stored VM yet"),
        Err(_) => warn!(vm = microvm.id(), "cannot end all of a stored VM in time"),
    }
}

/// Makes the stored VM of `owner` run again; when it returns `Ok`, its guest has answered and the journal says that it
/// runs.
///
/// Not to be dropped half-way.
///
/// # Errors
///
/// [`StartError`]: it is stored, as it was or by its disk alone.
pub async fn wake(owner: &Owner, order: &Order, microvm: &mut MicroVm) -> Result<StartPath, StartError> {
    let restored = match timeout(RESTORE_DEADLINE, restore(order, microvm)).await {
        // Before it goes on: from here on its disk may change.
        Ok(Ok(())) => {
            let stage = Stage::Running { owner: owner.clone(), path: StartPath::Memory };
            microvm.enter_for_good(stage).await
        }
        restored => restored.unwrap_or(Err(MakeError::Late)),
    };
    let reason = match restored {
        Ok(()) => match timeout(ANSWER_DEADLINE, go_on(microvm)).await.unwrap_or(Err(MakeError::Late)) {
            Ok(()) => {
                info!(vm = microvm.id(), "woken");
                return Ok(StartPath::Memory);
            }
            // It may have written to its disk since: its memory is of another one.
            Err(error) => error.to_string(),
        },
        Err(MakeError::Unusable(reason)) => reason,
        Err(error) => {
            warn!(%error, vm = microvm.id(), console = microvm.console_tail(), "cannot be woken now");
            release(microvm).await;
            return Err(StartError::Failed(error.to_string()));
        }
    };
    warn!(reason, vm = microvm.id(), console = microvm.console_tail(), "booting from the stored disk");
    release(microvm).await;
    telemetry::attempt_failed(StartPath::Memory);
    match boot(owner, order, microvm).await {
        Ok(()) => Ok(StartPath::Disk),
        Err(error) => {
            warn!(%error, vm = microvm.id(), console = microvm.console_tail(), "cannot be booted now");
            release(microvm).await;
            Err(StartError::Failed(error.to_string()))
        }
    }
}

async fn restore(order: &Order, microvm: &mut MicroVm) -> Result<(), MakeError> {
    // An earlier attempt may have left a process.
    microvm.instance().release().await?;
    microvm.instance().restore_stored(&order.kind).await
}

/// Lets a VM go on that stands still, and removes what is stored of its memory: it is worth nothing from then on.
async fn go_on(microvm: &mut MicroVm) -> Result<(), MakeError> {
    microvm.resume().await?;
    microvm.wake_guest().await?;
    if let Err(error) = microvm.instance().forget_stored().await {
        // It counts for nothing, and is replaced when the VM is stored again.
        warn!(%error, "what was stored stays for now");
    }
    Ok(())
}

async fn boot(owner: &Owner, order: &Order, microvm: &mut MicroVm) -> Result<(), MakeError> {
    // For good, before the disk changes; then the journal may say again that it is stored: by its disk alone.
    microvm.instance().forget_stored().await?;
    let stage = Stage::Hibernated { owner: owner.clone(), path: StartPath::Disk, stored_bytes: 0 };
    microvm.enter_for_good(stage).await?;
    let booted = async {
        microvm.instance().boot_stored(&order.kind).await?;
        microvm.activate(order.identity(owner)).await
    };
    timeout(BOOT_DEADLINE, booted).await.unwrap_or(Err(MakeError::Late))?;
    microvm.enter_for_good(Stage::Running { owner: owner.clone(), path: StartPath::Disk }).await
}

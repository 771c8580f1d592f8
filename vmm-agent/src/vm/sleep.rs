//! How a VM is put to sleep and made to run again, in two [tiers](super::tier).
//!
//! ```text
//!   quiesce ─► halt ─► journal: paused ─► (answer) ─► write memory and devices ─► journal: captured
//!                       (from here on it is)              ─► … ─► journal: hibernated ─► end the process
//!   quiesce ─► halt ─► write memory and devices ─► journal: hibernated ─► end the process ─► (answer)
//!                                                  (from here on it is)
//!
//!   paused:      journal: running ─► let it go on
//!               (from here on it does)
//!   hibernated:  verify ─► start a VMM, paused, with all of it ─► journal: running ─► let it go on
//!                                                                 (from here on it does)
//!      or, if a clone of the pool takes it on ([`graft`]):
//!                put it into the clone ─► journal: the clone runs ─► journal: forget the stored one ─► let the clone go on
//!                                         (from here on the clone is it)
//! ```
//!
//! The disk is never copied: nothing writes to it between the pause and the moment in which the VM goes on. What is
//! stored of the memory is of exactly that disk, so it counts only while the journal says that the VM is hibernated; it is
//! removed soon after the VM went on, and for good before it is halted again. A death before a line of the journal leads
//! back to where it began, one after it to the end. The journal says *paused* only of a process that stands still as it
//! was: before another is started, it says *hibernated*.
//!
//! Memory that cannot be used is removed for good before its disk is booted instead.

use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{
    start::{Order, StartError, Starter},
    tier::{Left, Paused, Tier},
};
use crate::{
    backend::Scion,
    fail,
    journal::{Owner, Stage, StartPath},
    microvm::{MakeError, MicroVm},
    telemetry,
};

/// A VMM halts its VM in milliseconds.
const HALT_DEADLINE: Duration = Duration::from_secs(30);
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

/// What a VM that was put to sleep is.
#[derive(Clone, Copy, Debug)]
pub enum Asleep {
    /// Of the first tier.
    Paused(Paused),
    /// Of the second tier; what it takes, bytes.
    Stored(u64),
}

/// Puts the VM of `owner`, which was started by `path`, to sleep: into the first tier if that is wanted and its guest stands
/// still by itself, else into the second. When it returns `Ok` it sleeps for good, though the process of one of the second
/// tier may still be there.
///
/// Not to be dropped half-way.
///
/// # Errors
///
/// [`MakeError`] says why it runs on.
pub async fn hibernate(
    owner: &Owner,
    path: StartPath,
    tier: Tier,
    microvm: &mut MicroVm,
) -> Result<Asleep, MakeError> {
    let is_quiet = match microvm.quiesce().await {
        Ok(()) => true,
        Err(error) => {
            // Memory and disk are of one instant all the same. Only a boot of the disk alone sees a difference.
            warn!(%error, "the guest does not stand still by itself: it is stored as it is");
            false
        }
    };
    let halting = async {
        fail::pass(fail::HIBERNATE_QUIESCED, microvm.id())?;
        telemetry::step("halt", microvm.instance().halt()).await?;
        Ok(fail::pass(fail::HIBERNATE_HALTED, microvm.id())?)
    };
    let asleep = match timeout(HALT_DEADLINE, halting).await.unwrap_or(Err(MakeError::Late)) {
        Ok(()) if tier == Tier::Paused && is_quiet => {
            let paused = Paused { since: SystemTime::now(), stored_bytes: 0, is_gone: false };
            note_paused(owner, path, paused, microvm).await.map(|()| Asleep::Paused(paused))
        }
        Ok(()) => match capture(microvm, is_quiet).await {
            Ok(stored_bytes) => {
                let stage = Stage::Hibernated { owner: owner.clone(), path, stored_bytes };
                let entered = microvm.enter_for_good(stage).await;
                fail::reached(fail::HIBERNATE_JOURNALLED, microvm.id());
                entered.map(|()| Asleep::Stored(stored_bytes))
            }
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    match asleep {
        Ok(Asleep::Stored(_)) => release(microvm).await,
        Ok(Asleep::Paused(_)) => {}
        Err(_) => {
            if let Err(error) = go_on(microvm).await {
                warn!(%error, "it was not put to sleep, and its guest does not answer yet");
            }
        }
    }
    asleep
}

/// Stores memory and devices of a VM that stands still. Returns what that takes, bytes. May be given up at any time.
///
/// # Errors
///
/// [`MakeError`] of the disk or the VMM.
pub async fn capture(microvm: &mut MicroVm, is_quiet: bool) -> Result<u64, MakeError> {
    let writing = telemetry::step("store", microvm.instance().store(is_quiet));
    let stored_bytes = timeout(STORE_DEADLINE, writing).await.unwrap_or(Err(MakeError::Late))?;
    fail::pass(fail::HIBERNATE_STORED, microvm.id())?;
    Ok(stored_bytes)
}

/// Writes down for good what is known of a VM of the first tier.
///
/// Not to be dropped half-way.
///
/// # Errors
///
/// [`MakeError::Journal`].
pub async fn note_paused(
    owner: &Owner,
    path: StartPath,
    paused: Paused,
    microvm: &MicroVm,
) -> Result<(), MakeError> {
    let Paused { since, stored_bytes, .. } = paused;
    microvm.enter_for_good(Stage::Paused { owner: owner.clone(), path, since, stored_bytes }).await?;
    fail::reached(fail::HIBERNATE_PAUSED, microvm.id());
    Ok(())
}

/// Makes a VM of the first tier one of the second.
///
/// Not to be dropped half-way.
///
/// # Errors
///
/// [`MakeError::Journal`]: it is as it was.
pub async fn leave_first_tier(
    owner: &Owner,
    path: StartPath,
    paused: Paused,
    microvm: &mut MicroVm,
) -> Result<(), MakeError> {
    let stage = Stage::Hibernated { owner: owner.clone(), path, stored_bytes: paused.stored_bytes };
    microvm.enter_for_good(stage).await?;
    fail::reached(fail::HIBERNATE_JOURNALLED, microvm.id());
    release(microvm).await;
    Ok(())
}

/// Ends the process of a VM that is stored. What resists is ended when it is woken.
pub async fn release(microvm: &mut MicroVm) {
    match timeout(RELEASE_DEADLINE, microvm.instance().release()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(vm = microvm.id(), %error, "cannot end all of a stored VM yet"),
        Err(_) => warn!(vm = microvm.id(), "cannot end all of a stored VM in time"),
    }
}

/// Makes the VM of `owner`, which was started by `path` and sleeps, run again; when it returns `Ok`, its guest has
/// answered and the journal says that it runs. What is stored of it is to be forgotten then. `left` is what it goes on
/// from, which is less and less as it is tried.
///
/// Not to be dropped half-way.
///
/// # Errors
///
/// [`StartError`]: it sleeps, as it did or by its disk alone.
pub async fn wake(
    owner: &Owner,
    path: StartPath,
    order: &Order,
    left: &mut Left,
    starter: &Starter,
    microvm: &mut MicroVm,
) -> Result<StartPath, StartError> {
    let _first = starter.put_off_refill();
    if let Left::Paused(paused) = *left
        && (paused.is_gone || !is_there(microvm).await)
    {
        // Before another process is started.
        let second = leave_first_tier(owner, path, paused, microvm).await;
        second.map_err(|error| StartError::Failed(error.to_string()))?;
        *left = Left::Stored;
    }
    let woken = match left {
        Left::Paused(_) => {
            let stage = Stage::Running { owner: owner.clone(), path: StartPath::Paused };
            microvm.enter_for_good(stage).await.map_err(|error| StartError::Failed(error.to_string()))?;
            fail::reached(fail::WAKE_JOURNALLED, microvm.id());
            // It may have written to its disk since, unless it answers: its memory is of another one.
            let gone_on = go_on(microvm).await.map_err(|error| NotWoken::BootIt(error.to_string()));
            gone_on.map(|()| StartPath::Paused)
        }
        Left::Stored => {
            // An earlier attempt may have left a process.
            release(microvm).await;
            match graft(owner, order, starter, microvm).await {
                Some(replaced) => go_on_as_clone(replaced, microvm).await,
                None => wake_stored(owner, order, microvm).await,
            }
        }
        Left::Disk => Err(NotWoken::BootIt("its memory was no good before".into())),
    };
    let reason = match woken {
        Ok(woken_by) => {
            info!(vm = microvm.id(), path = woken_by.as_str(), "woken");
            return Ok(woken_by);
        }
        Err(NotWoken::BootIt(reason)) => reason,
        Err(NotWoken::NotNow(error)) => {
            warn!(%error, vm = microvm.id(), console = microvm.console_tail(), "cannot be woken now");
            release(microvm).await;
            return Err(StartError::Failed(error.to_string()));
        }
    };
    *left = Left::Disk;
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

/// Whether the VMM of a VM that stands still is there and answers.
async fn is_there(microvm: &MicroVm) -> bool {
    microvm.exit().now_or_never().is_none() && microvm.condition().await.is_ok()
}

/// Why a VM does not go on where it was.
enum NotWoken {
    /// What is left of it is its disk.
    BootIt(String),
    /// It may, later.
    NotNow(MakeError),
}

/// Makes a VM of the second tier go on from its stored memory.
async fn wake_stored(owner: &Owner, order: &Order, microvm: &mut MicroVm) -> Result<StartPath, NotWoken> {
    let restored = match timeout(RESTORE_DEADLINE, restore(order, microvm)).await {
        // Before it goes on: from here on its disk may change.
        Ok(Ok(())) => {
            let stage = Stage::Running { owner: owner.clone(), path: StartPath::Memory };
            microvm.enter_for_good(stage).await
        }
        restored => restored.unwrap_or(Err(MakeError::Late)),
    };
    match restored {
        // As above.
        Ok(()) => {
            fail::reached(fail::WAKE_JOURNALLED, microvm.id());
            let gone_on = go_on(microvm).await.map_err(|error| NotWoken::BootIt(error.to_string()));
            gone_on.map(|()| StartPath::Memory)
        }
        Err(MakeError::Unusable(reason)) => Err(NotWoken::BootIt(reason)),
        Err(error) => Err(NotWoken::NotNow(error)),
    }
}

/// Puts the state of a stored VM into a clone that waits, if there is one that is good for that, and the clone into `microvm`.
/// Returns the VM whose place the clone has taken, of which nothing counts any more. `None` if all is as it was.
async fn graft(owner: &Owner, order: &Order, starter: &Starter, microvm: &mut MicroVm) -> Option<MicroVm> {
    let mut clone = starter.clone_for(Scion::Stored(microvm.id()), &order.kind)?;
    let grafted = async {
        clone.enter(Stage::Claimed(owner.clone()))?;
        let graft = clone.instance().graft(Scion::Stored(microvm.id()), &order.kind);
        timeout(RESTORE_DEADLINE, graft).await.unwrap_or(Err(MakeError::Late))?;
        fail::pass(fail::WAKE_GRAFTED, clone.id())?;
        unless_ended(&clone)?;
        // Until the clone goes on either may be gone on with, so one of the two is written down at any moment.
        clone.enter_for_good(Stage::Running { owner: owner.clone(), path: StartPath::Memory }).await?;
        fail::reached(fail::WAKE_CLAIMED, clone.id());
        microvm.forget_for_good().await?;
        fail::reached(fail::WAKE_REPLACED, clone.id());
        Ok::<_, MakeError>(())
    };
    match grafted.await {
        Ok(()) => Some(std::mem::replace(microvm, clone)),
        Err(error) => {
            warn!(%error, vm = clone.id(), console = clone.console_tail(), "a clone cannot take it on");
            clone.destroy().await;
            telemetry::attempt_failed(StartPath::Memory);
            None
        }
    }
}

/// Lets a clone go on that has taken the place of `replaced`, and removes that.
async fn go_on_as_clone(mut replaced: MicroVm, microvm: &mut MicroVm) -> Result<StartPath, NotWoken> {
    let (gone_on, ()) = tokio::join!(go_on(microvm), replaced.destroy());
    gone_on.map(|()| StartPath::Memory).map_err(|error| NotWoken::BootIt(error.to_string()))
}

async fn restore(order: &Order, microvm: &mut MicroVm) -> Result<(), MakeError> {
    microvm.instance().release().await?;
    microvm.instance().restore_stored(&order.kind).await?;
    unless_ended(microvm)
}

/// One that has ended before it went on has changed nothing: what is stored is still good.
fn unless_ended(microvm: &MicroVm) -> Result<(), MakeError> {
    match microvm.exit().now_or_never() {
        Some(()) => Err(MakeError::Backend("its VMM process ended".into())),
        None => Ok(()),
    }
}

/// Lets a VM go on that stands still.
async fn go_on(microvm: &mut MicroVm) -> Result<(), MakeError> {
    let answered = async {
        microvm.resume().await?;
        fail::pass(fail::WAKE_RESUMED, microvm.id())?;
        microvm.wake_guest().await?;
        fail::reached(fail::WAKE_ANSWERED, microvm.id());
        Ok(())
    };
    timeout(ANSWER_DEADLINE, answered).await.unwrap_or(Err(MakeError::Late))
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

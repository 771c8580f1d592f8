//! The life of a sandbox's record. Each step is a function from the record before to the record after; the
//! [ledger](crate::ledger) makes it durable by compare-and-set, so that of two steps that start from the same record
//! one happens and the other is decided anew.
//!
//! ```text
//!             place            run                 mark_deleting              bury
//!   draft ───────────► CREATING ─────► RUNNING ───────────────► (deleting) ────────► DELETED ──► collected
//!                       │ ▲  │          │                           ▲ ▲                 ▲
//!                 place └─┘  │     fail │                           │ │                 │
//!                (next host) │          ▼                           │ │                 │
//!                            │       FAILED ──── mark_deleting ─────┘ │   bury          │
//!                            │          └─────────────────────────────┼─(old failures)──┘
//!                            └──────────────── mark_deleting ─────────┘
//!
//!                mark_hibernating             hibernate            mark_waking            wake
//!   RUNNING ────────────────────► (hibernating) ──────► HIBERNATED ───────────► (waking) ─────► RUNNING
//!      ▲                                │                   ▲                       │
//!      └──────────── spare ─────────────┘                   └───────── doze ────────┘
//!
//!                          mark_restoring                restore
//!   RUNNING or HIBERNATED ──────────────► (restoring) ────────────► RUNNING
//!             ▲                                │
//!             └─────────── stay ───────────────┘
//! ```
//!
//! - `CREATING` that nobody works on is *undone*: it becomes `DELETED` at once. Its creator was never told of it, but
//!   those who watch were.
//! - `deleting` is not a state but a mark beside one: no call may use the sandbox any more, and its host is asked to end
//!   it until it has.
//! - *Hibernating* and *waking* are marks, too: `RUNNING` whose host is asked to store it, and `HIBERNATED` whose host is
//!   asked to wake it. Until the host has answered, nobody can tell which it is; should the scheduler die in between,
//!   reconciliation asks the host. For idleness a host stores only what is still idle, so that a call that has just begun
//!   wins.
//! - `HIBERNATED` is on a host, too: its disk and memory are stored there. A host may store the memory after it has
//!   answered: until then `stored_bytes` is 0. If an object store has all of it (`stored_snapshot_id`) and its host is lost,
//!   it is placed anew when it is to wake. From then on it is *in the store alone*, until it runs.
//! - `reserved` says whether the sandbox's share of host and quota is counted. It changes in the same transaction as
//!   the counts; every step that clears it does so once, because it starts from a record that has it set.
//! - The epoch grows with each placement and with deletion, and never shrinks.
//! - *Restoring* is a mark, too: a sandbox that runs or is hibernated, and whose host is asked to put it back to a
//!   checkpoint. It is asked by a new epoch, `tried_epoch`, and keeps the microVM of the old one until that of the new one
//!   runs; so the epoch that it has tells whether it was put back. Users see it as `RESTORING`.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use oc_proto::{
    mesh::{CreateVmResponse, HibernateVmResponse, SandboxRecord, SandboxTransition, WakeVmResponse},
    v1::SandboxState,
};
use thiserror::Error;

use crate::{sandbox_id::SandboxId, validate::Order};

/// How long a deleted sandbox is remembered.
pub const TOMBSTONE_KEPT: Duration = Duration::from_secs(3600);
/// How long a failed sandbox that nobody deletes is kept.
pub const FAILURE_KEPT: Duration = Duration::from_secs(24 * 3600);
/// Metadata that one that is over keeps, all together: no quota counts it any more.
const METADATA_KEPT: usize = 1 << 10;

/// Why a step cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Denied {
    /// It is deleted, or about to be.
    #[error("the sandbox has been deleted")]
    Deleted,
    /// Its microVM is lost.
    #[error("the sandbox's microVM is lost; nothing but deleting is left to do with it")]
    Failed,
    /// It is between two states: the same step may succeed later.
    #[error("the sandbox is changing its state at the moment, try again")]
    NotReady,
    /// It is past that step.
    #[error("the sandbox is past that step")]
    Passed,
}

/// The record of a sandbox that has no host yet. Not stored before [`place`].
pub fn draft(id: &SandboxId, tenant: &str, order: Order, now: SystemTime) -> SandboxRecord {
    SandboxRecord {
        sandbox_id: id.as_str().into(),
        tenant: tenant.into(),
        state: SandboxState::Creating.into(),
        template_id: order.template_id,
        size: Some(order.size),
        envs: order.envs,
        metadata: order.metadata,
        timeout: order.timeout,
        egress: order.egress.into(),
        preview_token_hash: order.preview_token_hash,
        created_at: Some(now.into()),
        active_at: Some(now.into()),
        ..Default::default()
    }
}

/// Gives it a host: the first, or another one after the first has failed to make it, or is lost while it is in an object
/// store.
///
/// # Errors
///
/// [`Denied`] once it ran, unless it is [to be woken elsewhere](mark_moving); or if it is being deleted.
pub fn place(record: &SandboxRecord, host_id: &str) -> Result<SandboxRecord, Denied> {
    match record.in_store_alone {
        true if record.transition() != SandboxTransition::Waking => return Err(Denied::NotReady),
        true => hibernated(record)?,
        false => creating(record)?,
    }
    let epoch = record.epoch.max(record.tried_epoch) + 1;
    Ok(SandboxRecord { host_id: host_id.into(), epoch, reserved: true, ..record.clone() })
}

/// Its microVM answers.
///
/// # Errors
///
/// [`Denied`] if it is not being created any more.
pub fn run(
    record: &SandboxRecord,
    made: &CreateVmResponse,
    now: SystemTime,
) -> Result<SandboxRecord, Denied> {
    creating(record)?;
    Ok(SandboxRecord {
        state: SandboxState::Running.into(),
        accelerator: made.accelerator.clone(),
        start_path: made.start_path,
        renewed: made.renewed.clone(),
        active_at: Some(now.into()),
        ..record.clone()
    })
}

/// It was never made, and nobody works on it any more.
///
/// # Errors
///
/// [`Denied`] if it is not being created any more.
pub fn undo(record: &SandboxRecord, now: SystemTime) -> Result<SandboxRecord, Denied> {
    creating(record)?;
    bury(&mark_deleting(record)?, now)
}

/// The record of a sandbox that is made of a snapshot, on the host that has it. Not stored yet.
pub fn draft_on(draft: SandboxRecord, host_id: &str) -> SandboxRecord {
    SandboxRecord { host_id: host_id.into(), epoch: 1, reserved: true, ..draft }
}

/// Its microVM is lost. What could hold a secret is forgotten: nothing is made of it any more.
///
/// Its epoch is raised to the highest that its host was asked for: whatever is left there is ended by it.
///
/// # Errors
///
/// [`Denied`] if it neither runs nor is hibernated.
pub fn fail(record: &SandboxRecord, failure: &str, now: SystemTime) -> Result<SandboxRecord, Denied> {
    alive(record)?;
    Ok(SandboxRecord {
        state: SandboxState::Failed.into(),
        transition: SandboxTransition::Unspecified.into(),
        stored_bytes: 0,
        in_store_alone: false,
        failure: failure.into(),
        epoch: record.epoch.max(record.tried_epoch),
        active_at: Some(now.into()),
        reserved: false,
        envs: Default::default(),
        metadata: kept_metadata(record),
        ..record.clone()
    })
}

/// Its idle time starts anew, with this limit; that of a hibernated one when it wakes.
///
/// # Errors
///
/// [`Denied`] if it neither runs nor is hibernated, or its host is being asked to store it or to put it back.
pub fn set_timeout(record: &SandboxRecord, timeout: i32, now: SystemTime) -> Result<SandboxRecord, Denied> {
    alive(record)?;
    if matches!(record.transition(), SandboxTransition::Hibernating | SandboxTransition::Restoring) {
        return Err(Denied::NotReady);
    }
    Ok(SandboxRecord { timeout, active_at: Some(now.into()), ..record.clone() })
}

/// Its host is going to be asked to store it. Fine if it is marked.
///
/// # Errors
///
/// [`Denied`] if it does not run.
pub fn mark_hibernating(record: &SandboxRecord) -> Result<SandboxRecord, Denied> {
    running(record)?;
    unless_restoring(record)?;
    Ok(SandboxRecord { transition: SandboxTransition::Hibernating.into(), ..record.clone() })
}

/// It was not stored: it was in use, or its host cannot.
///
/// # Errors
///
/// [`Denied`] if it does not run.
pub fn spare(record: &SandboxRecord, now: SystemTime) -> Result<SandboxRecord, Denied> {
    running(record)?;
    unless_restoring(record)?;
    Ok(SandboxRecord {
        transition: SandboxTransition::Unspecified.into(),
        active_at: Some(now.into()),
        ..record.clone()
    })
}

/// Its host has hibernated it. Fine if it is hibernated.
///
/// # Errors
///
/// [`Denied`] if it neither runs nor is hibernated.
pub fn hibernate(record: &SandboxRecord, host: &HibernateVmResponse) -> Result<SandboxRecord, Denied> {
    alive(record)?;
    unless_restoring(record)?;
    if record.state() == SandboxState::Hibernated {
        return Ok(record.clone());
    }
    Ok(SandboxRecord {
        state: SandboxState::Hibernated.into(),
        transition: SandboxTransition::Unspecified.into(),
        stored_bytes: host.stored_bytes,
        hibernation_tier: host.tier,
        reserved: false,
        ..not_in_store(record)
    })
}

/// What is stored of a hibernated sandbox, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// What its memory and devices take, bytes.
    pub bytes: i64,
    /// The snapshot of all of it that is in an object store; empty if none is.
    pub snapshot_id: String,
    /// That store.
    pub object_store_id: String,
    /// What its memory depends on.
    pub snapshot_key: String,
    /// What its disk is laid over.
    pub base_digest: String,
}

impl Stored {
    /// As the record has it.
    pub fn of(record: &SandboxRecord) -> Self {
        Self {
            bytes: record.stored_bytes,
            snapshot_id: record.stored_snapshot_id.clone(),
            object_store_id: record.object_store_id.clone(),
            snapshot_key: record.stored_snapshot_key.clone(),
            base_digest: record.stored_base_digest.clone(),
        }
    }
}

/// Its host has stored it since it was hibernated, or has lost what it had stored.
///
/// # Errors
///
/// [`Denied`] unless it is hibernated, and nothing else is being done with it.
pub fn note_stored(record: &SandboxRecord, stored: &Stored) -> Result<SandboxRecord, Denied> {
    idle(record)?;
    Ok(SandboxRecord {
        stored_bytes: stored.bytes,
        stored_snapshot_id: stored.snapshot_id.clone(),
        object_store_id: stored.object_store_id.clone(),
        stored_snapshot_key: stored.snapshot_key.clone(),
        stored_base_digest: stored.base_digest.clone(),
        ..record.clone()
    })
}

/// Its host has nothing of it any more, but an object store has.
///
/// # Errors
///
/// [`Denied`] unless it is hibernated; [`Denied::Failed`] if no store has it.
pub fn leave_to_store(record: &SandboxRecord) -> Result<SandboxRecord, Denied> {
    hibernated(record)?;
    unless_restoring(record)?;
    if record.stored_snapshot_id.is_empty() {
        return Err(Denied::Failed);
    }
    Ok(SandboxRecord {
        transition: SandboxTransition::Unspecified.into(),
        in_store_alone: true,
        reserved: false,
        ..record.clone()
    })
}

/// It is to be woken on a host that it is [placed](place) on now, of what the object store has.
///
/// # Errors
///
/// [`Denied`] unless it is hibernated and nothing else is being done with it; [`Denied::Failed`] if no store has it.
pub fn mark_moving(record: &SandboxRecord) -> Result<SandboxRecord, Denied> {
    idle(record)?;
    mark_waking(&leave_to_store(record)?)
}

/// Nothing of it is in an object store that would be worth anything.
fn not_in_store(record: &SandboxRecord) -> SandboxRecord {
    SandboxRecord {
        stored_snapshot_id: String::new(),
        object_store_id: String::new(),
        stored_snapshot_key: String::new(),
        stored_base_digest: String::new(),
        in_store_alone: false,
        ..record.clone()
    }
}

/// Its host is going to be asked to wake it: its share is counted from now on. Fine if it is marked.
///
/// # Errors
///
/// [`Denied`] if it is not hibernated.
pub fn mark_waking(record: &SandboxRecord) -> Result<SandboxRecord, Denied> {
    hibernated(record)?;
    unless_restoring(record)?;
    Ok(SandboxRecord { transition: SandboxTransition::Waking.into(), reserved: true, ..record.clone() })
}

/// It was not woken.
///
/// # Errors
///
/// [`Denied`] if it is not hibernated.
pub fn doze(record: &SandboxRecord) -> Result<SandboxRecord, Denied> {
    hibernated(record)?;
    unless_restoring(record)?;
    Ok(SandboxRecord { transition: SandboxTransition::Unspecified.into(), reserved: false, ..record.clone() })
}

/// Its host has woken it.
///
/// # Errors
///
/// [`Denied`] if it is not hibernated.
pub fn wake(
    record: &SandboxRecord,
    woken: &WakeVmResponse,
    now: SystemTime,
) -> Result<SandboxRecord, Denied> {
    hibernated(record)?;
    unless_restoring(record)?;
    Ok(SandboxRecord {
        state: SandboxState::Running.into(),
        transition: SandboxTransition::Unspecified.into(),
        accelerator: woken.accelerator.clone(),
        start_path: woken.start_path,
        stored_bytes: 0,
        active_at: Some(now.into()),
        reserved: true,
        ..not_in_store(record)
    })
}

/// Its host is going to be asked to put it back to a checkpoint, by a new epoch. Its share is counted from now on.
///
/// # Errors
///
/// [`Denied`] if it neither runs nor is hibernated, or something else is being done with it.
pub fn mark_restoring(record: &SandboxRecord, checkpoint_id: &str) -> Result<SandboxRecord, Denied> {
    alive(record)?;
    if record.transition() != SandboxTransition::Unspecified {
        return Err(Denied::NotReady);
    }
    Ok(SandboxRecord {
        transition: SandboxTransition::Restoring.into(),
        tried_epoch: record.epoch.max(record.tried_epoch) + 1,
        restoring_id: checkpoint_id.into(),
        reserved: true,
        ..record.clone()
    })
}

/// Its host has put it back: it runs by `epoch`, which was tried.
///
/// # Errors
///
/// [`Denied`] if it neither runs nor is hibernated, or that epoch is not one that was tried since.
pub fn restore(
    record: &SandboxRecord,
    epoch: u64,
    made: &CreateVmResponse,
    now: SystemTime,
) -> Result<SandboxRecord, Denied> {
    alive(record)?;
    if epoch <= record.epoch || epoch > record.tried_epoch {
        return Err(Denied::Passed);
    }
    Ok(SandboxRecord {
        state: SandboxState::Running.into(),
        transition: SandboxTransition::Unspecified.into(),
        epoch,
        checkpoint_id: record.restoring_id.clone(),
        accelerator: made.accelerator.clone(),
        start_path: made.start_path,
        renewed: made.renewed.clone(),
        stored_bytes: 0,
        active_at: Some(now.into()),
        reserved: true,
        ..not_in_store(record)
    })
}

/// It was not put back: it is as it was.
///
/// # Errors
///
/// [`Denied`] if it is not marked.
pub fn stay(record: &SandboxRecord) -> Result<SandboxRecord, Denied> {
    alive(record)?;
    if record.transition() != SandboxTransition::Restoring {
        return Err(Denied::Passed);
    }
    Ok(SandboxRecord {
        transition: SandboxTransition::Unspecified.into(),
        reserved: record.state() == SandboxState::Running,
        ..record.clone()
    })
}

/// What it goes on from is this checkpoint now, and not the one before that: parent of the next one. One that went on
/// from another meanwhile stays with that, so that saying it late, or twice, takes no sandbox back to an older branch.
///
/// # Errors
///
/// [`Denied`] if it neither runs nor is hibernated.
pub fn follow(record: &SandboxRecord, before: &str, checkpoint_id: &str) -> Result<SandboxRecord, Denied> {
    alive(record)?;
    match record.checkpoint_id == before {
        true => Ok(SandboxRecord { checkpoint_id: checkpoint_id.into(), ..record.clone() }),
        false => Ok(record.clone()),
    }
}

/// From here on nobody uses it. Fine if it is marked.
///
/// # Errors
///
/// [`Denied::Deleted`] if it is deleted.
pub fn mark_deleting(record: &SandboxRecord) -> Result<SandboxRecord, Denied> {
    match record.state() {
        SandboxState::Deleted => Err(Denied::Deleted),
        _ if record.deleting => Ok(record.clone()),
        _ => Ok(SandboxRecord {
            deleting: true,
            epoch: record.epoch.max(record.tried_epoch) + 1,
            transition: SandboxTransition::Unspecified.into(),
            ..record.clone()
        }),
    }
}

/// Nothing of it is left on its host.
///
/// What could hold a secret is forgotten; what a look at the tombstone shows is kept, unless it is large.
///
/// # Errors
///
/// [`Denied`] unless it is marked, or failed.
pub fn bury(record: &SandboxRecord, now: SystemTime) -> Result<SandboxRecord, Denied> {
    let epoch = match record.state() {
        SandboxState::Deleted => return Err(Denied::Deleted),
        _ if record.deleting => record.epoch,
        SandboxState::Failed => record.epoch.max(record.tried_epoch) + 1,
        _ => return Err(Denied::NotReady),
    };
    Ok(SandboxRecord {
        state: SandboxState::Deleted.into(),
        epoch,
        deleting: false,
        deleted_at: Some(now.into()),
        reserved: false,
        stored_bytes: 0,
        envs: Default::default(),
        metadata: kept_metadata(record),
        ..record.clone()
    })
}

/// The metadata of a sandbox that is over: all of it if it is small, else none.
fn kept_metadata(record: &SandboxRecord) -> HashMap<String, String> {
    let bytes: usize = record.metadata.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes <= METADATA_KEPT { record.metadata.clone() } else { HashMap::new() }
}

/// Whether users see it as deleted: it is, or is about to be.
pub fn is_deleted(record: &SandboxRecord) -> bool {
    record.deleting || record.state() == SandboxState::Deleted
}

/// Where it is in its life, marks included: what those who watch it are told.
pub fn phase(record: &SandboxRecord) -> SandboxState {
    match (record.state(), record.transition()) {
        _ if is_deleted(record) => SandboxState::Deleted,
        (_, SandboxTransition::Restoring) => SandboxState::Restoring,
        (SandboxState::Running, SandboxTransition::Hibernating) => SandboxState::Hibernating,
        (SandboxState::Hibernated, SandboxTransition::Waking) => SandboxState::Waking,
        (state, _) => state,
    }
}

/// Whether its host is being asked to store it.
pub fn is_hibernating(record: &SandboxRecord) -> bool {
    record.state() == SandboxState::Running && record.transition() == SandboxTransition::Hibernating
}

/// Whether its host is being asked for something: it will be in one state or another before long.
pub fn is_settling(record: &SandboxRecord) -> bool {
    record.transition() != SandboxTransition::Unspecified && !is_deleted(record)
}

/// Whether its host is being asked to put it back to a checkpoint.
pub fn is_restoring(record: &SandboxRecord) -> bool {
    record.transition() == SandboxTransition::Restoring && !is_deleted(record)
}

/// When it was last used, as far as the record knows.
pub fn active_at(record: &SandboxRecord) -> SystemTime {
    time(record.active_at)
}

/// A time of a record; the epoch where it says none.
pub fn time(timestamp: Option<prost_types::Timestamp>) -> SystemTime {
    timestamp.and_then(|time| time.try_into().ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn creating(record: &SandboxRecord) -> Result<(), Denied> {
    match record.state() {
        _ if is_deleted(record) => Err(Denied::Deleted),
        SandboxState::Creating => Ok(()),
        _ => Err(Denied::Passed),
    }
}

fn hibernated(record: &SandboxRecord) -> Result<(), Denied> {
    match record.state() {
        _ if is_deleted(record) => Err(Denied::Deleted),
        SandboxState::Hibernated => Ok(()),
        SandboxState::Failed => Err(Denied::Failed),
        SandboxState::Running => Err(Denied::Passed),
        _ => Err(Denied::NotReady),
    }
}

/// Whether it is hibernated, and nothing else is being done with it.
fn idle(record: &SandboxRecord) -> Result<(), Denied> {
    hibernated(record)?;
    if record.transition() == SandboxTransition::Unspecified { Ok(()) } else { Err(Denied::NotReady) }
}

/// Whether it runs or is hibernated.
fn alive(record: &SandboxRecord) -> Result<(), Denied> {
    hibernated(record).or_else(|_| running(record))
}

fn unless_restoring(record: &SandboxRecord) -> Result<(), Denied> {
    if record.transition() == SandboxTransition::Restoring { Err(Denied::NotReady) } else { Ok(()) }
}

fn running(record: &SandboxRecord) -> Result<(), Denied> {
    match record.state() {
        _ if is_deleted(record) => Err(Denied::Deleted),
        SandboxState::Running => Ok(()),
        SandboxState::Failed => Err(Denied::Failed),
        _ => Err(Denied::NotReady),
    }
}

#[cfg(test)]
mod tests;

//! The life of a sandbox's record. Each step is a function from the record before to the record after; the
//! [ledger](crate::ledger) makes it durable by compare-and-set, so that of two steps that start from the same record
//! one happens and the other is decided anew.
//!
//! ```text
//!             place            run                 mark_deleting              bury
//!   draft ───────────► CREATING ─────► RUNNING ───────────────► (deleting) ────────► DELETED ──► collected
//!                       │ ▲  │          │ ▲ │                       ▲ ▲                 ▲
//!                 place └─┘  │     fail │ │ │ end_idle              │ │                 │
//!                (next host) │          ▼ │ ▼                       │ │                 │
//!                            │      FAILED│(idle end asked) ────────┼─┼── bury ─────────┤
//!                            │          │ │ spare │                 │ │                 │
//!                            │          │ └───────┘                 │ │                 │
//!                            │          └──── mark_deleting ────────┘ │   bury          │
//!                            │          └─────────────────────────────┼─(old failures)──┘
//!                            └──────────────── mark_deleting ─────────┘
//! ```
//!
//! - `CREATING` that nobody works on is *undone*: the record is removed. Its creator was never told of it.
//! - `deleting` is not a state but a mark beside one: no call may use the sandbox any more, and its host is asked to end
//!   it until it has.
//! - *Idle end asked* is `RUNNING` with `deleted_at` set ahead. The host ends the microVM only if it is still idle, so
//!   that a call that has just begun wins; until the host has answered, nobody can tell. Should the scheduler die in
//!   between, a microVM that is gone was ended for idleness, not lost.
//! - `reserved` says whether the sandbox's share of host and quota is counted. It changes in the same transaction as
//!   the counts; every step that clears it does so once, because it starts from a record that has it set.
//! - The epoch grows with each placement and with deletion, and never shrinks.
//! - `HIBERNATED` and `RESTORING` are not entered yet.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use oc_proto::{
    mesh::{CreateVmResponse, SandboxRecord},
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
        created_at: Some(now.into()),
        active_at: Some(now.into()),
        ..Default::default()
    }
}

/// Gives it a host: the first, or another one after the first has failed to make it.
///
/// # Errors
///
/// [`Denied`] once it ran, or is being deleted.
pub fn place(record: &SandboxRecord, host_id: &str) -> Result<SandboxRecord, Denied> {
    creating(record)?;
    Ok(SandboxRecord { host_id: host_id.into(), epoch: record.epoch + 1, reserved: true, ..record.clone() })
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
        active_at: Some(now.into()),
        ..record.clone()
    })
}

/// Its microVM is lost. What could hold a secret is forgotten: nothing is made of it any more.
///
/// # Errors
///
/// [`Denied`] if it does not run.
pub fn fail(record: &SandboxRecord, failure: &str, now: SystemTime) -> Result<SandboxRecord, Denied> {
    running(record)?;
    Ok(SandboxRecord {
        state: SandboxState::Failed.into(),
        failure: failure.into(),
        active_at: Some(now.into()),
        reserved: false,
        envs: Default::default(),
        metadata: kept_metadata(record),
        ..record.clone()
    })
}

/// Its idle time starts anew, with this limit.
///
/// # Errors
///
/// [`Denied`] if it does not run, or its host is being asked to end it for idleness.
pub fn set_timeout(record: &SandboxRecord, timeout: i32, now: SystemTime) -> Result<SandboxRecord, Denied> {
    running(record)?;
    if is_ending_idle(record) {
        return Err(Denied::NotReady);
    }
    Ok(SandboxRecord { timeout, active_at: Some(now.into()), ..record.clone() })
}

/// Its host is going to be asked to end it, if it is still idle.
///
/// # Errors
///
/// [`Denied`] if it does not run.
pub fn end_idle(record: &SandboxRecord, now: SystemTime) -> Result<SandboxRecord, Denied> {
    running(record)?;
    Ok(SandboxRecord { deleted_at: Some(now.into()), ..record.clone() })
}

/// It was in use when its host was asked to end it for idleness.
///
/// # Errors
///
/// [`Denied`] if it does not run.
pub fn spare(record: &SandboxRecord, now: SystemTime) -> Result<SandboxRecord, Denied> {
    running(record)?;
    Ok(SandboxRecord { deleted_at: None, active_at: Some(now.into()), ..record.clone() })
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
        _ => Ok(SandboxRecord { deleting: true, epoch: record.epoch + 1, ..record.clone() }),
    }
}

/// Nothing of it is left on its host.
///
/// What could hold a secret is forgotten; what a look at the tombstone shows is kept, unless it is large.
///
/// # Errors
///
/// [`Denied`] unless it is marked, or failed, or its host ended it for idleness.
pub fn bury(record: &SandboxRecord, now: SystemTime) -> Result<SandboxRecord, Denied> {
    let epoch = match record.state() {
        SandboxState::Deleted => return Err(Denied::Deleted),
        _ if record.deleting => record.epoch,
        SandboxState::Failed => record.epoch + 1,
        SandboxState::Running if is_ending_idle(record) => record.epoch + 1,
        _ => return Err(Denied::NotReady),
    };
    Ok(SandboxRecord {
        state: SandboxState::Deleted.into(),
        epoch,
        deleting: false,
        deleted_at: Some(now.into()),
        reserved: false,
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

/// Whether its host is being asked to end it for idleness.
pub fn is_ending_idle(record: &SandboxRecord) -> bool {
    record.state() == SandboxState::Running && !record.deleting && record.deleted_at.is_some()
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

fn running(record: &SandboxRecord) -> Result<(), Denied> {
    match record.state() {
        _ if is_deleted(record) => Err(Denied::Deleted),
        SandboxState::Running => Ok(()),
        SandboxState::Failed => Err(Denied::Failed),
        _ => Err(Denied::NotReady),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Place,
        Run,
        Fail,
        SetTimeout,
        EndIdle,
        Spare,
        MarkDeleting,
        Bury,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Place),
            Just(Step::Run),
            Just(Step::Fail),
            Just(Step::SetTimeout),
            Just(Step::EndIdle),
            Just(Step::Spare),
            Just(Step::MarkDeleting),
            Just(Step::Bury),
        ];
        prop::collection::vec(step, 0..30)
    }

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + second)
    }

    fn start() -> SandboxRecord {
        let order = crate::validate::order(Default::default()).unwrap();
        let record = draft(&SandboxId::generate().unwrap(), "acme", order, at(0));
        place(&record, "host-0").unwrap()
    }

    fn take(record: &SandboxRecord, step: Step, second: u64) -> Result<SandboxRecord, Denied> {
        let now = at(second);
        match step {
            Step::Place => place(record, &format!("host-{second}")),
            Step::Run => run(record, &CreateVmResponse::default(), now),
            Step::Fail => fail(record, "gone", now),
            Step::SetTimeout => set_timeout(record, 60, now),
            Step::EndIdle => end_idle(record, now),
            Step::Spare => spare(record, now),
            Step::MarkDeleting => mark_deleting(record),
            Step::Bury => bury(record, now),
        }
    }

    /// Every record that the steps lead through; those that are denied are left out.
    fn play(steps: &[Step]) -> Vec<SandboxRecord> {
        let mut records = vec![start()];
        for (second, step) in steps.iter().enumerate() {
            if let Ok(next) = take(&records[records.len() - 1], *step, second as u64) {
                records.push(next);
            }
        }
        records
    }

    fn rank(record: &SandboxRecord) -> u8 {
        match record.state() {
            SandboxState::Creating => 0,
            SandboxState::Running => 1,
            SandboxState::Failed => 2,
            SandboxState::Deleted => 3,
            other => panic!("{other:?} is not entered"),
        }
    }

    proptest! {
        #[test]
        fn a_life_only_goes_forward(steps in steps()) {
            prop_assert!(play(&steps).is_sorted_by_key(rank));
        }

        #[test]
        fn epochs_grow_and_placement_and_deletion_raise_them(steps in steps()) {
            for pair in play(&steps).windows(2) {
                prop_assert!(pair[0].epoch <= pair[1].epoch);
                if pair[0].host_id != pair[1].host_id || is_deleted(&pair[0]) != is_deleted(&pair[1]) {
                    prop_assert_eq!(pair[0].epoch + 1, pair[1].epoch);
                }
            }
        }

        #[test]
        fn a_share_is_released_exactly_once(steps in steps()) {
            let records = play(&steps);
            prop_assert!(records[0].reserved);
            let releases = records.windows(2).filter(|pair| pair[0].reserved && !pair[1].reserved).count();
            let takes = records.windows(2).filter(|pair| !pair[0].reserved && pair[1].reserved).count();
            prop_assert_eq!(takes, 0);
            let last = &records[records.len() - 1];
            prop_assert_eq!(releases, usize::from(!last.reserved));
            for record in &records {
                let gone = matches!(record.state(), SandboxState::Failed | SandboxState::Deleted);
                prop_assert_eq!(record.reserved, !gone);
            }
        }

        #[test]
        fn what_is_deleted_stays_deleted(steps in steps()) {
            prop_assert!(play(&steps).is_sorted_by_key(is_deleted));
        }

        #[test]
        fn every_life_can_be_ended(steps in steps()) {
            let records = play(&steps);
            let last = &records[records.len() - 1];
            if last.state() != SandboxState::Deleted {
                let ended = bury(&mark_deleting(last).unwrap(), at(99)).unwrap();
                prop_assert_eq!(ended.state(), SandboxState::Deleted);
                prop_assert!(!ended.deleting && !ended.reserved && ended.deleted_at.is_some());
            }
        }
    }

    #[test]
    fn a_timeout_waits_for_the_end_of_an_idle_end() {
        let running = take(&start(), Step::Run, 1).unwrap();
        let ending = end_idle(&running, at(2)).unwrap();
        assert_eq!(set_timeout(&ending, 0, at(3)), Err(Denied::NotReady));
        let spared = spare(&ending, at(4)).unwrap();
        assert_eq!(set_timeout(&spared, 0, at(5)).unwrap().timeout, 0);
        assert_eq!(active_at(&spared), at(4));
    }

    #[test]
    fn what_is_over_holds_no_secrets_and_little_else() {
        let mut record = take(&start(), Step::Run, 1).unwrap();
        record.envs = [("TOKEN".into(), "secret".into())].into();
        for (size, kept) in [(METADATA_KEPT - 7, 1), (METADATA_KEPT - 6, 0)] {
            record.metadata = [("purpose".into(), "x".repeat(size))].into();
            let failed = fail(&record, "gone", at(2)).unwrap();
            let buried = bury(&mark_deleting(&record).unwrap(), at(2)).unwrap();
            for over in [failed, buried] {
                assert!(over.envs.is_empty());
                assert_eq!(over.metadata.len(), kept, "{size} at {:?}", over.state());
            }
        }
    }
}

//! What is to be done where records and microVMs differ. Pure: values in, actions out.
//!
//! A plan is made from knowledge that is not of one moment: records as they were *before* the host was asked what it
//! has. So nothing is done by the plan alone. Each action is judged once more with the record as it is stored *after*
//! the host's answer; only what both looks agree on is carried out, and by compare-and-set from that record.
//!
//! - *lost*: running before the host was asked, missing in its answer, and still running: it was missing while it ran.
//! - *stray*: in the host's answer, and no record afterwards that wants it. Records are written before their microVMs.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use oc_proto::{
    mesh::{SandboxRecord, SandboxTransition, Vm, VmState},
    v1::SandboxState,
};

use crate::{
    lifecycle::{self, FAILURE_KEPT, Stored, TOMBSTONE_KEPT},
    sandboxes::create::ABANDONED_AFTER,
};

/// `CREATING` that no flow of this scheduler works on is given this long even if there is no other scheduler: that one
/// may have started a moment ago.
const UNOWNED_GRACE: Duration = Duration::from_secs(3);

/// What to do about one sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nobody finishes making it.
    Undo,
    /// Its microVM is lost.
    Fail {
        /// Why.
        failure: String,
    },
    /// A microVM that no record wants.
    EndStray {
        /// Its epoch: a newer one stays.
        epoch: u64,
    },
    /// It is marked: end the microVM, bury it.
    FinishDelete,
    /// It was idle for longer than its timeout.
    HibernateIdle {
        /// Spare it if it was used since then.
        idle_since: SystemTime,
    },
    /// Its host was going to be asked to store it, but nobody does any more.
    Spare,
    /// Its host has hibernated it.
    FinishHibernate {
        /// What it has stored of it by now.
        stored_bytes: i64,
    },
    /// Its host has stored it since it was hibernated.
    NoteStored(Stored),
    /// Its host has nothing of it any more, but an object store has.
    LeaveToStore,
    /// Its host was going to be asked to wake it, but nobody does any more.
    Doze,
    /// Its host has woken it.
    FinishWake,
    /// Its host has put it back to a checkpoint, or does so by now: it is of this epoch.
    FinishRestore {
        /// Its epoch.
        epoch: u64,
    },
    /// Its host was going to be asked to put it back, but nobody does any more.
    Stay,
    /// Nothing is left of it.
    Bury,
    /// It was deleted long ago: forget it.
    Collect,
}

impl Action {
    /// Its name in metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Undo => "undo",
            Self::Fail { .. } => "fail",
            Self::EndStray { .. } => "end_stray",
            Self::FinishDelete => "finish_delete",
            Self::HibernateIdle { .. } => "hibernate_idle",
            Self::Spare => "spare",
            Self::FinishHibernate { .. } => "finish_hibernate",
            Self::NoteStored(_) => "note_stored",
            Self::LeaveToStore => "leave_to_store",
            Self::Doze => "doze",
            Self::FinishWake => "finish_wake",
            Self::FinishRestore { .. } => "finish_restore",
            Self::Stay => "stay",
            Self::Bury => "bury",
            Self::Collect => "collect",
        }
    }
}

/// The moment of a look.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The time.
    pub now: SystemTime,
    /// Whether this is the only scheduler.
    pub is_alone: bool,
}

/// What to do about the microVMs of one host: `records` are all there were before it was asked, `vms` its answer.
pub fn plan(
    host_id: &str,
    records: &BTreeMap<String, Arc<SandboxRecord>>,
    vms: &[Vm],
    moment: Moment,
) -> Vec<(String, Action)> {
    let listed: BTreeMap<&str, &Vm> = vms.iter().map(|vm| (vm.sandbox_id.as_str(), vm)).collect();
    let here = records.iter().filter(|(_, record)| record.host_id == host_id).map(|(id, _)| id.as_str());
    let mut ids: Vec<&str> = here.chain(listed.keys().copied()).collect();
    ids.sort_unstable();
    ids.dedup();
    let judged = ids.into_iter().filter_map(|id| {
        let record = records.get(id).map(AsRef::as_ref);
        Some((id.to_owned(), judge(host_id, record, listed.get(id).copied(), moment)?))
    });
    judged.collect()
}

/// What to do about one sandbox, by its record and by what its host, or another, said of it.
pub fn judge(
    host_id: &str,
    record: Option<&SandboxRecord>,
    vm: Option<&Vm>,
    moment: Moment,
) -> Option<Action> {
    match (record.filter(|record| record.host_id == host_id), vm) {
        (Some(record), vm) => judge_placed(record, vm, moment),
        (None, None) => None,
        (None, Some(vm)) => match record {
            // Placed elsewhere, with a newer epoch. Were it older, the record would be what is out of date.
            Some(record) if record.epoch <= vm.epoch => None,
            Some(_) | None => Some(Action::EndStray { epoch: vm.epoch }),
        },
    }
}

fn judge_placed(record: &SandboxRecord, vm: Option<&Vm>, moment: Moment) -> Option<Action> {
    let stray = || vm.filter(|vm| vm.epoch <= record.epoch).map(|vm| Action::EndStray { epoch: vm.epoch });
    match record.state() {
        SandboxState::Deleted => stray(),
        _ if record.deleting => Some(Action::FinishDelete),
        SandboxState::Failed => stray(),
        SandboxState::Running | SandboxState::Hibernated if lifecycle::is_restoring(record) => {
            judge_restoring(record, vm)
        }
        SandboxState::Running => judge_running(record, vm, moment),
        // A flow works on it, or it is undone without its host.
        SandboxState::Creating => None,
        SandboxState::Hibernated => judge_hibernated(record, vm),
        // Never a record's.
        SandboxState::Restoring
        | SandboxState::Hibernating
        | SandboxState::Waking
        | SandboxState::Unspecified => None,
    }
}

fn judge_running(record: &SandboxRecord, vm: Option<&Vm>, moment: Moment) -> Option<Action> {
    let vm = match vm {
        None => return Some(Action::Fail { failure: "its host has no such microVM any more".into() }),
        Some(vm) if vm.epoch != record.epoch => return judge_other_epoch(record, vm),
        Some(vm) => vm,
    };
    match vm.state() {
        VmState::Failed => Some(lost(vm)),
        VmState::Hibernated => Some(Action::FinishHibernate { stored_bytes: vm.stored_bytes }),
        _ => match overdue_since(record, vm, moment.now) {
            Some(idle_since) => Some(Action::HibernateIdle { idle_since }),
            None => lifecycle::is_hibernating(record).then_some(Action::Spare),
        },
    }
}

fn judge_hibernated(record: &SandboxRecord, vm: Option<&Vm>) -> Option<Action> {
    let is_waking = record.transition() == SandboxTransition::Waking;
    let vm = match vm {
        // It was going to be made here, but nobody does any more.
        None if record.in_store_alone => return is_waking.then_some(Action::Doze),
        None if !record.stored_snapshot_id.is_empty() => return Some(Action::LeaveToStore),
        None => return Some(Action::Fail { failure: "its host has not stored it any more".into() }),
        Some(vm) if vm.epoch != record.epoch => return judge_other_epoch(record, vm),
        Some(vm) => vm,
    };
    match vm.state() {
        VmState::Failed => Some(lost(vm)),
        // Somebody has asked for it, and died.
        VmState::Running => Some(Action::FinishWake),
        _ if is_waking => Some(Action::Doze),
        VmState::Hibernated => {
            let stored = Stored {
                bytes: vm.stored_bytes,
                snapshot_id: vm.snapshot_id.clone(),
                object_store_id: vm.object_store_id.clone(),
                snapshot_key: vm.snapshot_key.clone(),
                base_digest: vm.base_digest.clone(),
            };
            // A host that has just started may not know yet that it is there.
            let is_news = vm.stored_bytes != record.stored_bytes || !vm.snapshot_id.is_empty();
            (is_news && stored != Stored::of(record)).then_some(Action::NoteStored(stored))
        }
        _ => None,
    }
}

/// Its host has the microVM of the epoch that was tried, or still that of the one before.
fn judge_restoring(record: &SandboxRecord, vm: Option<&Vm>) -> Option<Action> {
    match vm {
        None if !record.stored_snapshot_id.is_empty() => Some(Action::Stay),
        None => Some(Action::Fail { failure: "its host has no such microVM any more".into() }),
        Some(vm) if vm.epoch == record.epoch => Some(Action::Stay),
        Some(vm) => judge_other_epoch(record, vm),
    }
}

fn judge_other_epoch(record: &SandboxRecord, vm: &Vm) -> Option<Action> {
    match vm.epoch {
        older if older < record.epoch => Some(Action::EndStray { epoch: vm.epoch }),
        tried if tried <= record.tried_epoch => match vm.state() {
            VmState::Failed => Some(lost(vm)),
            // It may fail yet, and then the one before goes on.
            VmState::Starting => None,
            _ => Some(Action::FinishRestore { epoch: vm.epoch }),
        },
        _ => None,
    }
}

fn lost(vm: &Vm) -> Action {
    let failure = if vm.failure.is_empty() { "its microVM is lost".to_owned() } else { vm.failure.clone() };
    Action::Fail { failure }
}

/// The time since which it must have been used to be spared, if it was not.
fn overdue_since(record: &SandboxRecord, vm: &Vm, now: SystemTime) -> Option<SystemTime> {
    let timeout = u64::try_from(record.timeout).ok().filter(|seconds| *seconds > 0)?;
    let used = lifecycle::time(vm.active_at).max(lifecycle::active_at(record));
    let idle_since = now.checked_sub(Duration::from_secs(timeout))?;
    (used < idle_since).then_some(idle_since)
}

/// What is known of a record without asking its host.
#[derive(Clone, Copy, Debug)]
pub struct Around {
    /// Whether a flow of this scheduler works on it.
    pub is_live: bool,
    /// Whether its host is a member.
    pub has_host: bool,
}

/// What to do about one record, whatever its host says.
pub fn judge_record(record: &SandboxRecord, around: Around, moment: Moment) -> Option<Action> {
    let Around { is_live, has_host } = around;
    let since = |timestamp| moment.now.duration_since(lifecycle::time(timestamp)).unwrap_or_default();
    match record.state() {
        SandboxState::Deleted => (since(record.deleted_at) > TOMBSTONE_KEPT).then_some(Action::Collect),
        // A look at its host finishes it. Without one nobody else would.
        _ if record.deleting => (!has_host && !is_live).then_some(Action::FinishDelete),
        SandboxState::Creating if !is_live => {
            let patience = if moment.is_alone { UNOWNED_GRACE } else { ABANDONED_AFTER };
            (since(record.created_at) > patience).then_some(Action::Undo)
        }
        SandboxState::Failed => (since(record.active_at) > FAILURE_KEPT).then_some(Action::Bury),
        _ => None,
    }
}

#[cfg(test)]
mod tests;

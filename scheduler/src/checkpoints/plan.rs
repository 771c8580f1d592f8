//! What is to be done where checkpoints' records and hosts' snapshots differ. Pure.
//!
//! As with [sandboxes](crate::reconcile::plan) an action is judged twice: by the records as they were before the host was
//! asked, and by the record as it is stored after its answer.

use std::time::Duration;

use oc_proto::{
    mesh::{CheckpointRecord, Snapshot},
    v1::CheckpointState,
};

use super::shown;
use crate::{lifecycle, reconcile::plan::Moment};

/// What nobody of this scheduler works on may be another's: it is given this long.
const GRACE: Duration = Duration::from_secs(600);
/// As above where there is no other scheduler: that one may have started a moment ago.
const GRACE_ALONE: Duration = Duration::from_secs(5);

/// What to do about one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Its host has taken it.
    Finish(Snapshot),
    /// Nobody takes it any more.
    Abandon,
    /// Its host has lost it.
    Fail,
    /// It is marked: remove it.
    FinishDelete,
    /// The object store of this name has it, too.
    NoteUploaded(String),
    /// Its policy was not carried out.
    Retire,
    /// A snapshot that nobody wants.
    EndStray,
}

impl Action {
    /// Its name in metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Finish(_) => "finish_checkpoint",
            Self::Abandon => "abandon_checkpoint",
            Self::Fail => "fail_checkpoint",
            Self::FinishDelete => "finish_delete_checkpoint",
            Self::NoteUploaded(_) => "note_uploaded_checkpoint",
            Self::Retire => "retire_checkpoints",
            Self::EndStray => "end_stray_snapshot",
        }
    }
}

/// What to do about a checkpoint whose host has answered, by its record and by what that listed of it. `is_live` says
/// whether a flow of this scheduler works on it.
pub fn judge(
    record: Option<&CheckpointRecord>,
    listed: Option<&Snapshot>,
    is_live: bool,
    moment: Moment,
) -> Option<Action> {
    if is_live {
        return None;
    }
    let Some(record) = record else {
        let is_old = listed.is_some_and(|snapshot| is_old(snapshot.created_at, moment));
        return is_old.then_some(Action::EndStray);
    };
    if record.deleting {
        return Some(Action::FinishDelete);
    }
    let checkpoint = shown(record);
    match (checkpoint.state(), listed) {
        (CheckpointState::Processing | CheckpointState::Failed, Some(snapshot)) => {
            Some(Action::Finish(snapshot.clone()))
        }
        (CheckpointState::Processing, None) => {
            is_old(checkpoint.created_at, moment).then_some(Action::Abandon)
        }
        // Its host gets it from there when it needs it.
        (CheckpointState::Ready, None) if !record.object_store_id.is_empty() => None,
        (CheckpointState::Ready, None) => Some(Action::Fail),
        (CheckpointState::Ready, Some(snapshot)) if is_new_place(record, snapshot) => {
            Some(Action::NoteUploaded(snapshot.object_store_id.clone()))
        }
        (CheckpointState::Ready, Some(_)) if record.retention_policy.is_some() => {
            is_old(checkpoint.created_at, moment).then_some(Action::Retire)
        }
        _ => None,
    }
}

/// What to do about a checkpoint whose host is no member.
pub fn judge_without_host(record: &CheckpointRecord, is_live: bool, moment: Moment) -> Option<Action> {
    let checkpoint = shown(record);
    match checkpoint.state() {
        _ if is_live => None,
        _ if record.deleting => Some(Action::FinishDelete),
        CheckpointState::Processing => is_old(checkpoint.created_at, moment).then_some(Action::Abandon),
        // It may come back with it.
        _ => None,
    }
}

/// Whether its host has put it into a store that its record does not name. One that has just started may not know yet.
fn is_new_place(record: &CheckpointRecord, snapshot: &Snapshot) -> bool {
    !snapshot.object_store_id.is_empty() && snapshot.object_store_id != record.object_store_id
}

fn is_old(created_at: Option<prost_types::Timestamp>, moment: Moment) -> bool {
    let age = moment.now.duration_since(lifecycle::time(created_at)).unwrap_or_default();
    age > if moment.is_alone { GRACE_ALONE } else { GRACE }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use oc_proto::v1::{Checkpoint, RetentionPolicy};

    use super::*;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + second)
    }

    fn moment(second: u64) -> Moment {
        Moment { now: at(second), is_alone: true }
    }

    fn record(state: CheckpointState) -> CheckpointRecord {
        let checkpoint =
            Checkpoint { state: state.into(), created_at: Some(at(0).into()), ..Default::default() };
        CheckpointRecord { checkpoint: Some(checkpoint), ..Default::default() }
    }

    fn snapshot() -> Snapshot {
        Snapshot { created_at: Some(at(0).into()), ..Default::default() }
    }

    #[test]
    fn what_a_host_has_taken_is_ready_and_what_it_has_not_is_abandoned() {
        let processing = record(CheckpointState::Processing);
        let finish = Some(Action::Finish(snapshot()));
        assert_eq!(judge(Some(&processing), Some(&snapshot()), false, moment(1)), finish);
        assert_eq!(judge(Some(&processing), None, false, moment(1)), None, "it may be on its way");
        assert_eq!(judge(Some(&processing), None, false, moment(60)), Some(Action::Abandon));
        let others = Moment { is_alone: false, ..moment(60) };
        assert_eq!(judge(Some(&processing), None, false, others), None, "another scheduler may take it");
        for listed in [None, Some(&snapshot())] {
            assert_eq!(judge(Some(&processing), listed, true, moment(9999)), None, "somebody works on it");
        }
    }

    #[test]
    fn what_a_host_has_lost_fails_and_comes_back_with_it() {
        let ready = record(CheckpointState::Ready);
        assert_eq!(judge(Some(&ready), Some(&snapshot()), false, moment(60)), None);
        assert_eq!(judge(Some(&ready), None, false, moment(60)), Some(Action::Fail));
        assert_eq!(
            judge_without_host(&ready, false, moment(60)),
            None,
            "a host that is gone has not lost it"
        );
        let failed = record(CheckpointState::Failed);
        assert_eq!(
            judge(Some(&failed), Some(&snapshot()), false, moment(60)),
            Some(Action::Finish(snapshot()))
        );
        assert_eq!(judge(Some(&failed), None, false, moment(60)), None);
    }

    #[test]
    fn what_is_in_a_store_is_noted_and_is_not_lost_with_its_host() {
        let in_store = |record: CheckpointRecord| CheckpointRecord { object_store_id: "s1".into(), ..record };
        let put = Snapshot { object_store_id: "s1".into(), ..snapshot() };
        let ready = record(CheckpointState::Ready);
        assert_eq!(
            judge(Some(&ready), Some(&put), false, moment(1)),
            Some(Action::NoteUploaded("s1".into()))
        );
        let noted = in_store(ready);
        for listed in [Some(&put), Some(&snapshot()), None] {
            assert_eq!(judge(Some(&noted), listed, false, moment(60)), None);
        }
        assert_eq!(judge_without_host(&noted, false, moment(60)), None);
        let moved = Snapshot { object_store_id: "s2".into(), ..snapshot() };
        assert_eq!(
            judge(Some(&noted), Some(&moved), false, moment(1)),
            Some(Action::NoteUploaded("s2".into()))
        );
    }

    #[test]
    fn what_is_marked_goes_and_what_nobody_wants_too() {
        let marked = CheckpointRecord { deleting: true, ..record(CheckpointState::Ready) };
        for listed in [None, Some(&snapshot())] {
            assert_eq!(judge(Some(&marked), listed, false, moment(0)), Some(Action::FinishDelete));
        }
        assert_eq!(judge_without_host(&marked, false, moment(0)), Some(Action::FinishDelete));
        assert_eq!(judge(None, Some(&snapshot()), false, moment(60)), Some(Action::EndStray));
        assert_eq!(judge(None, Some(&snapshot()), true, moment(60)), None, "a fork is made of it");
        assert_eq!(judge(None, Some(&snapshot()), false, moment(1)), None, "its record may follow");
    }

    #[test]
    fn a_policy_is_carried_out_in_the_end() {
        let policy = Some(RetentionPolicy::default());
        let ready = CheckpointRecord { retention_policy: policy, ..record(CheckpointState::Ready) };
        assert_eq!(judge(Some(&ready), Some(&snapshot()), false, moment(60)), Some(Action::Retire));
    }
}

//! Which checkpoints a sandbox may have. Pure.

use oc_proto::{
    mesh::{CheckpointEntry, CheckpointIndex},
    v1::{CheckpointKind, RetentionMode, RetentionPolicy},
};
use thiserror::Error;

/// Checkpoints of everything that a sandbox may have.
pub const MAX_FULL: usize = 10;
/// Checkpoints of its disk that a sandbox may have.
pub const MAX_DISK_ONLY: usize = 100;

/// Why no checkpoint may be taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Inadmissible {
    /// The name is taken.
    #[error("the sandbox has a checkpoint called {0:?}")]
    Exists(String),
    /// There are as many as there may be.
    #[error("the sandbox has {max} checkpoints of that kind, as many as it may have; delete one first")]
    TooMany {
        /// That is how many.
        max: usize,
    },
}

/// How many checkpoints of a kind a sandbox may have.
pub fn limit(kind: CheckpointKind) -> usize {
    match kind {
        CheckpointKind::DiskOnly => MAX_DISK_ONLY,
        CheckpointKind::Full | CheckpointKind::Unspecified => MAX_FULL,
    }
}

/// The index with `entry` in it.
///
/// # Errors
///
/// [`Inadmissible`]. What the policy will delete once `entry` is taken is not counted.
pub fn admit(
    index: &CheckpointIndex,
    entry: CheckpointEntry,
    policy: Option<&RetentionPolicy>,
) -> Result<CheckpointIndex, Inadmissible> {
    if index.entries.iter().any(|other| other.name == entry.name) {
        return Err(Inadmissible::Exists(entry.name));
    }
    let max = limit(entry.kind());
    let mut next = index.clone();
    next.entries.push(entry.clone());
    let of_kind = next.entries.iter().filter(|other| other.kind == entry.kind).count();
    if of_kind - surplus(&next, &entry.checkpoint_id, policy).len() > max {
        return Err(Inadmissible::TooMany { max });
    }
    Ok(next)
}

/// The index without a checkpoint.
pub fn without(index: &CheckpointIndex, checkpoint_id: &str) -> CheckpointIndex {
    let entries = index.entries.iter().filter(|entry| entry.checkpoint_id != checkpoint_id);
    CheckpointIndex { entries: entries.cloned().collect() }
}

/// The checkpoints that are deleted, by the policy of the checkpoint `taken`, once that is ready: the oldest of its kind
/// before it.
pub fn surplus(index: &CheckpointIndex, taken: &str, policy: Option<&RetentionPolicy>) -> Vec<String> {
    let Some(policy) = policy.filter(|policy| policy.mode() == RetentionMode::DeleteOldest) else {
        return Vec::new();
    };
    let Some(at) = index.entries.iter().position(|entry| entry.checkpoint_id == taken) else {
        return Vec::new();
    };
    let (before, from) = index.entries.split_at(at);
    let Some(taken) = from.first() else { return Vec::new() };
    let max = limit(taken.kind());
    let kept = usize::try_from(policy.max_count).ok().filter(|kept| *kept > 0).unwrap_or(max).min(max);
    let older: Vec<_> = before.iter().filter(|entry| entry.kind == taken.kind).collect();
    // The new one is one of those that are kept.
    let gone = (older.len() + 1).saturating_sub(kept);
    older.into_iter().take(gone).map(|entry| entry.checkpoint_id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(number: usize, kind: CheckpointKind) -> CheckpointEntry {
        CheckpointEntry {
            checkpoint_id: format!("cp-{number}"),
            name: format!("n{number}"),
            kind: kind.into(),
        }
    }

    fn index(full: usize, disks: usize) -> CheckpointIndex {
        let full = (0..full).map(|number| entry(number, CheckpointKind::Full));
        let disks = (0..disks).map(|number| entry(1000 + number, CheckpointKind::DiskOnly));
        CheckpointIndex { entries: full.chain(disks).collect() }
    }

    fn keep(max_count: i32) -> RetentionPolicy {
        RetentionPolicy { mode: RetentionMode::DeleteOldest.into(), max_count }
    }

    #[test]
    fn a_name_is_given_once_and_there_are_ten_and_a_hundred() {
        let taken = CheckpointEntry { name: "n0".into(), ..entry(5, CheckpointKind::DiskOnly) };
        assert_eq!(admit(&index(1, 0), taken, None), Err(Inadmissible::Exists("n0".into())));
        for (kind, there) in
            [(CheckpointKind::Full, index(MAX_FULL, 3)), (CheckpointKind::DiskOnly, index(3, MAX_DISK_ONLY))]
        {
            let max = limit(kind);
            assert_eq!(admit(&there, entry(9999, kind), None), Err(Inadmissible::TooMany { max }));
            let room =
                without(&there, &there.entries.iter().rfind(|e| e.kind() == kind).unwrap().checkpoint_id);
            assert_eq!(admit(&room, entry(9999, kind), None).unwrap().entries.len(), there.entries.len());
            // With a policy that makes room there is room.
            let next = admit(&there, entry(9999, kind), Some(&keep(0))).unwrap();
            assert_eq!(surplus(&next, "cp-9999", Some(&keep(0))).len(), 1);
        }
    }

    proptest! {
        #[test]
        fn as_many_stay_as_the_policy_says(full in 0..MAX_FULL, disks in 0..20_usize, kept in 1..12_i32) {
            let before = index(full, disks);
            let next = admit(&before, entry(9999, CheckpointKind::Full), Some(&keep(kept))).unwrap();
            let gone = surplus(&next, "cp-9999", Some(&keep(kept)));
            let left = gone.iter().fold(next, |index, id| without(&index, id));
            let kept = usize::try_from(kept).unwrap().min(MAX_FULL);
            prop_assert_eq!(left.entries.len() - disks, (full + 1).min(kept));
            prop_assert!(left.entries.iter().any(|entry| entry.checkpoint_id == "cp-9999"));
            // The oldest went.
            let oldest: Vec<_> = (0..gone.len()).map(|number| format!("cp-{number}")).collect();
            prop_assert_eq!(&gone, &oldest);
            // Looked at again, nothing more goes.
            prop_assert!(surplus(&left, "cp-9999", Some(&keep(i32::try_from(kept).unwrap()))).is_empty());
        }
    }
}

//! Checkpoints that are in an object store, too: what else than their own host can do for them.

use oc_proto::{mesh::CheckpointRecord, v1::CheckpointKind};

use super::{Checkpoints, shown};
use crate::{agents::AgentError, placement::Like};

/// What a host must have to make something of a checkpoint that it does not have; `None` if no store has it.
pub(super) fn like_of(record: &CheckpointRecord, is_cold: bool) -> Option<Like> {
    if record.object_store_id.is_empty() {
        return None;
    }
    let like = Like {
        object_store_id: record.object_store_id.clone(),
        base_digest: record.base_digest.clone(),
        snapshot_key: record.snapshot_key.clone(),
    };
    let boots = is_cold || shown(record).kind() == CheckpointKind::DiskOnly;
    Some(if boots { like.for_disk() } else { like })
}

/// A host that gets at what the object store has of a checkpoint, whether or not it can make something of it.
fn reads(record: &CheckpointRecord) -> Option<Like> {
    let object_store_id = record.object_store_id.clone();
    (!object_store_id.is_empty()).then(|| Like { object_store_id, ..Like::default() })
}

/// The record of a checkpoint that is in the store `object_store_id`; as it was where that is empty.
pub(super) fn uploaded(record: &CheckpointRecord, object_store_id: &str) -> CheckpointRecord {
    if object_store_id.is_empty() {
        return record.clone();
    }
    let mut checkpoint = shown(record);
    checkpoint.is_uploaded = true;
    CheckpointRecord {
        checkpoint: Some(checkpoint),
        object_store_id: object_store_id.to_owned(),
        ..record.clone()
    }
}

impl Checkpoints {
    /// A host to ask about a checkpoint: the one that has taken it, or else one that uses the store which has it.
    ///
    /// # Errors
    ///
    /// [`AgentError::NotMember`] if there is none at the moment.
    pub(super) fn host_for(&self, record: &CheckpointRecord) -> Result<String, AgentError> {
        let own = shown(record).worker_id;
        if self.member(&own).is_ok() {
            return Ok(own);
        }
        let other =
            reads(record).and_then(|like| self.sandboxes.agents.any_host(|host| like.is_met_by(host)));
        other.ok_or(AgentError::NotMember(own))
    }

    /// Whether a host can put one of its sandboxes back to a checkpoint.
    pub(super) fn can_restore(&self, record: &CheckpointRecord, host_id: &str) -> bool {
        let host = self.sandboxes.agents.hosts().get(host_id);
        let like = like_of(record, false);
        host.is_some_and(|host| {
            shown(record).worker_id == host_id || like.is_some_and(|like| like.is_met_by(&host))
        })
    }

    /// Removes the snapshot of a checkpoint from its host, or from its object store if its host is no member.
    ///
    /// # Errors
    ///
    /// [`AgentError`]: it may still be there.
    pub(super) async fn remove_snapshot(&self, record: &CheckpointRecord) -> Result<(), AgentError> {
        let agents = &self.sandboxes.agents;
        let checkpoint = shown(record);
        let id = &checkpoint.checkpoint_id;
        match agents.delete_snapshot(&checkpoint.worker_id, id).await {
            // If it comes back, what it still has is wanted by nobody, and removed as such.
            Err(AgentError::NotMember(_)) => {}
            removed => return removed,
        }
        match (reads(record), agents.any_host(|host| !host.object_store_id.is_empty())) {
            (Some(_), _) => agents.delete_snapshot(&self.host_for(record)?, id).await,
            // It may have been put there just before its host went: whoever says that it was is not there to ask.
            (None, Some(other)) => {
                if let Err(error) = agents.delete_snapshot(&other, id).await {
                    tracing::info!(checkpoint_id = id, %error, "cannot look for it in the object store");
                }
                Ok(())
            }
            (None, None) => Ok(()),
        }
    }
}

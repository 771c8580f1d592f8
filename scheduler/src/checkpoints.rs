//! Checkpoints: states of sandboxes that are kept, and what is made of them.
//!
//! ```text
//!   write PROCESSING, and its name into the index ─► host takes the snapshot ─► write READY ─► answer
//!                                                       └─ refuses ─► remove both ─► refuse
//! ```
//!
//! A checkpoint is a record here and a snapshot of the same name on one host, and soon in the object store of that host, from
//! which other hosts can make something of it ([`elsewhere`]). Names and limits are kept by the *index* of
//! its sandbox ([`index`]), which changes in one transaction with the records ([`book`]). A host that does not answer
//! leaves `PROCESSING`, and deleting leaves a mark; [`plan`] says what becomes of them, and of snapshots that no record
//! wants. A checkpoint outlives its sandbox.
//!
//! The tree: a record names the checkpoint that its sandbox went on from last. When one is deleted, its children and the
//! sandboxes that went on from it are given to its parent before it goes. One that is taken at that very moment is shown
//! as a root.

use std::sync::Arc;

use oc_mesh::{
    keys,
    store::{SharedStore, StoreError},
    view::View,
};
use oc_proto::{
    mesh::{CheckpointRecord, SnapshotSource},
    v1::{Checkpoint, CheckpointKind, CheckpointState},
};
use tokio_util::sync::CancellationToken;

use crate::{
    agents::AgentError, checkpoints::book::Book, fail, lifecycle, refusal::Refusal, sandbox_id,
    sandboxes::Sandboxes,
};
use oc_mesh::error::Reason;

pub mod book;
mod elsewhere;
pub mod fork;
pub mod index;
pub mod plan;
mod reconcile;
pub mod take;
#[cfg(test)]
mod tests;

/// What the IDs of checkpoints begin with.
const PREFIX: &str = "cp-";

/// Everything that checkpoints are managed with.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    pub(crate) sandboxes: Sandboxes,
    book: Book,
    records: View<CheckpointRecord>,
}

impl Checkpoints {
    /// The checkpoints that are in `store`, of these sandboxes.
    ///
    /// # Errors
    ///
    /// They cannot be listed.
    pub async fn new(
        sandboxes: Sandboxes,
        store: SharedStore,
        cancel: CancellationToken,
    ) -> Result<Self, StoreError> {
        let records = View::start(store.clone(), keys::CHECKPOINTS, cancel).await?;
        Ok(Self { sandboxes, book: Book::new(store), records })
    }

    /// One checkpoint of a tenant, of `sandbox_id` if that is not empty, that is not being deleted.
    ///
    /// # Errors
    ///
    /// [`Refusal::CheckpointNotFound`], for another tenant's too.
    pub async fn get(
        &self,
        tenant: &str,
        checkpoint_id: &str,
        sandbox_id: &str,
    ) -> Result<CheckpointRecord, Refusal> {
        let found = self.find(tenant, checkpoint_id, sandbox_id).await?;
        if found.deleting { Err(Refusal::CheckpointNotFound) } else { Ok(found) }
    }

    /// As [`get`](Self::get), one that is being deleted included.
    async fn find(
        &self,
        tenant: &str,
        checkpoint_id: &str,
        sandbox_id: &str,
    ) -> Result<CheckpointRecord, Refusal> {
        // What is no ID names none, and never reaches the store.
        if !sandbox_id::is_random(PREFIX, checkpoint_id) {
            return Err(Refusal::CheckpointNotFound);
        }
        let found = self.book.read(checkpoint_id).await?.ok_or(Refusal::CheckpointNotFound)?.0;
        let is_of = sandbox_id.is_empty() || shown(&found).sandbox_id == sandbox_id;
        if found.tenant == tenant && is_of { Ok(found) } else { Err(Refusal::CheckpointNotFound) }
    }

    /// A tenant's checkpoints, of `sandbox_id` if that is not empty, oldest first. Those that are being deleted are left
    /// out.
    pub async fn list(&self, tenant: &str, sandbox_id: &str) -> Vec<Arc<CheckpointRecord>> {
        self.book.caught_up(&self.records).await;
        let all = self.records.all().into_iter().map(|(_, record)| record);
        let is_wanted = |record: &CheckpointRecord| {
            record.tenant == tenant
                && !record.deleting
                && (sandbox_id.is_empty() || shown(record).sandbox_id == sandbox_id)
        };
        let mut records: Vec<_> = all.filter(|record| is_wanted(record)).collect();
        records.sort_by_key(|record| {
            let checkpoint = shown(record);
            let created = checkpoint.created_at.unwrap_or_default();
            (created.seconds, created.nanos, checkpoint.checkpoint_id)
        });
        records
    }

    /// A checkpoint as its users see it. Its parent is the nearest one before it that they see, too: one whose own is
    /// gone before that one's children were given away is shown as a root.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub async fn present(&self, record: &CheckpointRecord) -> Result<Checkpoint, Refusal> {
        let mut checkpoint = shown(record);
        while !checkpoint.parent_id.is_empty() {
            let parent = match self.records.get(&checkpoint.parent_id) {
                Some(parent) => parent,
                // Our copy may lag behind.
                None => match self.book.read(&checkpoint.parent_id).await? {
                    Some((parent, _)) => Arc::new(parent),
                    None => {
                        checkpoint.parent_id.clear();
                        break;
                    }
                },
            };
            if !parent.deleting {
                break;
            }
            // Each is older than its child: this ends.
            checkpoint.parent_id = shown(&parent).parent_id;
        }
        Ok(checkpoint)
    }

    /// Deletes a tenant's checkpoint.
    ///
    /// May be given up on: it is deleted all the same.
    ///
    /// # Errors
    ///
    /// [`Refusal::CheckpointNotFound`]; failures of the store before the mark.
    pub async fn delete(&self, tenant: &str, checkpoint_id: &str, sandbox_id: &str) -> Result<(), Refusal> {
        self.find(tenant, checkpoint_id, sandbox_id).await?;
        let (this, id) = (self.clone(), checkpoint_id.to_owned());
        let flow = async move { this.end(&id).await };
        self.sandboxes.flows.run(flow, async |_| ()).await.unwrap_or(Err(Refusal::Stopping))
    }

    /// Marks a checkpoint and deletes it. After the mark it will go, whatever happens.
    async fn end(&self, checkpoint_id: &str) -> Result<(), Refusal> {
        let _live = self.sandboxes.flows.enter(checkpoint_id);
        let mark = |record: &CheckpointRecord| CheckpointRecord { deleting: true, ..record.clone() };
        let Some(marked) = self.book.update(checkpoint_id, mark).await? else { return Ok(()) };
        fail::reached(fail::DELETE_MARKED);
        if let Err(error) = self.finish_delete(&marked).await {
            tracing::warn!(checkpoint_id, %error, "checkpoint is marked, its host removes it later");
        }
        Ok(())
    }

    /// Removes the snapshot of a marked checkpoint, and then its record.
    async fn finish_delete(&self, marked: &CheckpointRecord) -> Result<(), Refusal> {
        let checkpoint = shown(marked);
        let id = &checkpoint.checkpoint_id;
        self.remove_snapshot(marked).await?;
        fail::reached(fail::DELETE_REMOVED);
        self.hand_over(id, &checkpoint.parent_id).await?;
        fail::reached(fail::DELETE_HANDED_OVER);
        self.book.remove_if(id, |record| record.deleting).await?;
        fail::reached(fail::DELETE_FORGOTTEN);
        tracing::info!(checkpoint_id = id, "checkpoint deleted");
        Ok(())
    }

    /// Gives the children of a checkpoint that goes to its parent.
    async fn hand_over(&self, checkpoint_id: &str, parent_id: &str) -> Result<(), Refusal> {
        self.book.caught_up(&self.records).await;
        for (child, record) in self.records.all() {
            if shown(&record).parent_id == checkpoint_id {
                let adopt = |record: &CheckpointRecord| {
                    let mut record = record.clone();
                    if let Some(checkpoint) = &mut record.checkpoint {
                        checkpoint.parent_id = parent_id.to_owned();
                    }
                    record
                };
                self.book.update(&child, adopt).await?;
            }
        }
        for (sandbox_id, record) in self.sandboxes.records.all() {
            if record.checkpoint_id == checkpoint_id {
                // One that is over follows nothing.
                let ledger = &self.sandboxes.ledger;
                let _ = ledger
                    .update(&sandbox_id, |record| lifecycle::follow(record, checkpoint_id, parent_id))
                    .await;
            }
        }
        Ok(())
    }

    /// Has a host read all of a tenant's checkpoint. Returns how much that was on its own host, and in the object store,
    /// bytes.
    ///
    /// # Errors
    ///
    /// [`Refusal::CheckpointNotFound`]; that it is damaged, in its host's words.
    pub async fn verify(&self, tenant: &str, checkpoint_id: &str) -> Result<(i64, i64), Refusal> {
        let record = self.usable(tenant, checkpoint_id, "").await?;
        let host_id = self.host_for(&record)?;
        self.sandboxes.agents.verify_snapshot(&host_id, checkpoint_id).await.map_err(lost_or)
    }

    /// Puts a tenant's sandbox back to one of its checkpoints.
    ///
    /// May be given up on: it is put back all the same.
    ///
    /// # Errors
    ///
    /// [`Refusal::CheckpointNotFound`], [`Refusal::SandboxNotFound`]; that the sandbox is over, or busy with something
    /// else; the host's reason. Then it is as it was.
    pub async fn restore(
        &self,
        tenant: &str,
        sandbox_id: &str,
        checkpoint_id: &str,
    ) -> Result<oc_proto::mesh::SandboxRecord, Refusal> {
        let found = self.sandboxes.find(tenant, sandbox_id).await?.record;
        let record = self.usable(tenant, checkpoint_id, sandbox_id).await?;
        let checkpoint = shown(&record);
        if !self.can_restore(&record, &found.host_id) {
            return Err(AgentError::NotMember(checkpoint.worker_id).into());
        }
        let source = source_of(&checkpoint, false);
        let (this, id) = (self.sandboxes.clone(), found.sandbox_id);
        let flow = async move { this.restore(&id, source).await };
        let restored = self.sandboxes.flows.run(flow, async |_| ()).await;
        let restored = restored.unwrap_or(Err(Refusal::Stopping)).map_err(|refusal| match refusal {
            Refusal::Agent(error) => lost_or(error),
            refusal => refusal,
        });
        self.unless_deleted(tenant, checkpoint_id, restored).await
    }

    /// What became of something that was to be made of a checkpoint. If it was deleted meanwhile, that is why it failed,
    /// whatever its host found of it.
    async fn unless_deleted<T>(
        &self,
        tenant: &str,
        checkpoint_id: &str,
        made: Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        if let Err(Refusal::Agent(_) | Refusal::CheckpointLost) = made {
            self.get(tenant, checkpoint_id, "").await?;
        }
        made
    }

    /// Whether a host can be asked: not to promise on it what it may never do.
    fn member(&self, host_id: &str) -> Result<(), AgentError> {
        let found = self.sandboxes.agents.hosts().get(host_id);
        found.map(|_| ()).ok_or_else(|| AgentError::NotMember(host_id.into()))
    }

    /// A tenant's checkpoint of which something can be made.
    async fn usable(
        &self,
        tenant: &str,
        checkpoint_id: &str,
        sandbox_id: &str,
    ) -> Result<CheckpointRecord, Refusal> {
        let record = self.get(tenant, checkpoint_id, sandbox_id).await?;
        match shown(&record).state() {
            CheckpointState::Ready => Ok(record),
            CheckpointState::Failed => Err(Refusal::CheckpointLost),
            CheckpointState::Processing | CheckpointState::Unspecified => Err(Refusal::CheckpointNotReady),
        }
    }
}

/// What the public sees of it.
pub fn shown(record: &CheckpointRecord) -> Checkpoint {
    record.checkpoint.clone().unwrap_or_default()
}

/// What a host is to begin with to make something of a checkpoint.
fn source_of(checkpoint: &Checkpoint, is_cold: bool) -> SnapshotSource {
    let disk_only = is_cold || checkpoint.kind() == CheckpointKind::DiskOnly;
    SnapshotSource { snapshot_id: checkpoint.checkpoint_id.clone(), disk_only, wakes: false }
}

/// A host that does not have the snapshot of a checkpoint has lost it.
fn lost_or(error: AgentError) -> Refusal {
    match error {
        AgentError::Refused { reason: Reason::SnapshotNotFound, .. } => Refusal::CheckpointLost,
        error => error.into(),
    }
}

//! Taking a checkpoint.

use oc_mesh::error::Reason;
use oc_proto::{
    mesh::{CheckpointRecord, SandboxRecord, Snapshot, SnapshotSource},
    v1::{Checkpoint, CheckpointKind, CheckpointState, RetentionPolicy, SandboxState},
};

use super::{Checkpoints, PREFIX, elsewhere::uploaded, index, shown};
use crate::{
    agents::AgentError,
    fail, lifecycle,
    refusal::Refusal,
    sandbox_id,
    validate::{self, Invalid},
};

/// A checkpoint that may be asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    name: String,
    kind: CheckpointKind,
    policy: Option<RetentionPolicy>,
}

impl Order {
    /// Parses what is to be taken.
    ///
    /// # Errors
    ///
    /// [`Invalid`] for the first thing that is wrong.
    pub fn parse(name: String, kind: i32, policy: Option<RetentionPolicy>) -> Result<Self, Invalid> {
        validate::checkpoint_name(&name)?;
        let kind = match CheckpointKind::try_from(kind) {
            Ok(CheckpointKind::Unspecified) => CheckpointKind::Full,
            Ok(kind) => kind,
            Err(_) => return Err(Invalid::Enumeration("kind")),
        };
        if let Some(policy) = &policy {
            let max = index::limit(kind);
            if !usize::try_from(policy.max_count).is_ok_and(|count| count <= max) {
                return Err(Invalid::Retention { given: policy.max_count, max });
            }
            if oc_proto::v1::RetentionMode::try_from(policy.mode).is_err() {
                return Err(Invalid::Enumeration("retentionPolicy.mode"));
            }
        }
        Ok(Self { name, kind, policy })
    }
}

impl Checkpoints {
    /// Takes a checkpoint of a tenant's sandbox; one that is hibernated wakes for it.
    ///
    /// May be given up on: it is taken all the same.
    ///
    /// # Errors
    ///
    /// [`Refusal::Inadmissible`], [`Refusal::SandboxNotFound`]; that the sandbox is over or does not wake; the host's
    /// reason. Then there is none.
    pub async fn take(
        &self,
        tenant: &str,
        sandbox_id: &str,
        order: Order,
    ) -> Result<CheckpointRecord, Refusal> {
        let found = self.sandboxes.find(tenant, sandbox_id).await?.record;
        let this = self.clone();
        let flow = async move {
            let sandbox = this.awake(found).await?;
            this.take_of(&sandbox, order).await
        };
        self.sandboxes.flows.run(flow, async |_| ()).await.unwrap_or(Err(Refusal::Stopping))
    }

    async fn take_of(&self, sandbox: &SandboxRecord, order: Order) -> Result<CheckpointRecord, Refusal> {
        let id = sandbox_id::random(PREFIX).map_err(|error| Refusal::Internal(error.to_string()))?;
        // Before the record exists, so that reconciliation never sees one that nobody works on.
        let _live = self.sandboxes.flows.enter(&id);
        let disk_only = order.kind == CheckpointKind::DiskOnly;
        let drafted = self.draft(&id, sandbox, order);
        self.book.add(&drafted).await?;
        fail::reached(fail::TAKE_RECORDED);
        let source = SnapshotSource { snapshot_id: id.clone(), disk_only, wakes: false };
        match self.capture(sandbox, source, false).await {
            Ok(snapshot) => {
                fail::reached(fail::TAKE_CAPTURED);
                let finished = self.finish(&id, &snapshot).await;
                if matches!(finished, Err(Refusal::CheckpointNotFound)) {
                    // Deleted while it was taken. Best effort: what stays is a stray.
                    let _ = self.sandboxes.agents.delete_snapshot(&sandbox.host_id, &id).await;
                }
                finished
            }
            // Nobody knows what became of it. Reconciliation asks.
            Err(error @ AgentError::Unreachable { .. }) => Err(error.into()),
            Err(error) => {
                self.book.remove_if(&id, is_processing).await?;
                Err(error.into())
            }
        }
    }

    /// A sandbox that runs: as its record `found` says, or once it is woken. Should that be over when its host is asked,
    /// [`capture`](Self::capture) looks again.
    pub(super) async fn awake(&self, found: SandboxRecord) -> Result<SandboxRecord, Refusal> {
        let is_awake = found.state() == SandboxState::Running
            && !lifecycle::is_settling(&found)
            && !lifecycle::is_deleted(&found);
        if is_awake { Ok(found) } else { self.sandboxes.rouse(&found.sandbox_id).await }
    }

    /// Has the sandbox's host take its state down; once more, from where it is by then, if it was stored or put back
    /// between the look at its record and the call.
    pub(super) async fn capture(
        &self,
        sandbox: &SandboxRecord,
        source: SnapshotSource,
        is_ephemeral: bool,
    ) -> Result<Snapshot, AgentError> {
        let agents = &self.sandboxes.agents;
        let captured = agents.capture_vm(sandbox, source.clone(), is_ephemeral).await;
        let Err(AgentError::Refused { reason: Reason::SandboxNotReady | Reason::StaleEpoch, .. }) = &captured
        else {
            return captured;
        };
        match self.sandboxes.rouse(&sandbox.sandbox_id).await {
            Ok(roused) => agents.capture_vm(&roused, source, is_ephemeral).await,
            // Its own reason says more than that it was not ready.
            Err(Refusal::Agent(error)) => Err(error),
            Err(refusal) => {
                Err(AgentError::Refused { reason: refusal.reason(), message: refusal.to_string() })
            }
        }
    }

    fn draft(&self, id: &str, sandbox: &SandboxRecord, order: Order) -> CheckpointRecord {
        let size = sandbox.size.unwrap_or_default();
        let checkpoint = Checkpoint {
            checkpoint_id: id.into(),
            sandbox_id: sandbox.sandbox_id.clone(),
            name: order.name,
            kind: order.kind.into(),
            state: CheckpointState::Processing.into(),
            created_at: Some(self.sandboxes.clock.now().into()),
            parent_id: sandbox.checkpoint_id.clone(),
            template_id: sandbox.template_id.clone(),
            memory_mb: size.memory_mb,
            cpu_count: size.cpu_count,
            disk_mb: size.disk_mb,
            worker_id: sandbox.host_id.clone(),
            ..Default::default()
        };
        CheckpointRecord {
            checkpoint: Some(checkpoint),
            tenant: sandbox.tenant.clone(),
            envs: sandbox.envs.clone(),
            egress: sandbox.egress,
            preview_token_hash: sandbox.preview_token_hash.clone(),
            retention_policy: order.policy,
            ..Default::default()
        }
    }

    /// Its host has taken it: writes that it is ready, makes it the one that its sandbox goes on from, and does what its
    /// policy says. All of it may be repeated.
    pub(super) async fn finish(&self, id: &str, snapshot: &Snapshot) -> Result<CheckpointRecord, Refusal> {
        let written = self.book.update(id, |record| ready(record, snapshot)).await?;
        let record = written.ok_or(Refusal::CheckpointNotFound)?;
        let checkpoint = shown(&record);
        fail::reached(fail::TAKE_WRITTEN);
        // For the tree alone: that it fails is no failure of the checkpoint.
        let followed = self
            .sandboxes
            .ledger
            .update(&checkpoint.sandbox_id, |sandbox| lifecycle::follow(sandbox, &checkpoint.parent_id, id))
            .await;
        if let Err(error) = followed {
            tracing::debug!(checkpoint_id = id, %error, "its sandbox does not follow it");
        }
        fail::reached(fail::TAKE_FOLLOWED);
        tracing::info!(
            checkpoint_id = id,
            sandbox_id = checkpoint.sandbox_id,
            size_bytes = checkpoint.size_bytes,
            pause_us = checkpoint.pause_us,
            "checkpoint taken"
        );
        if let Err(error) = self.retire(&record).await {
            // It is taken all the same.
            tracing::warn!(checkpoint_id = id, %error, "its policy is carried out later");
        }
        Ok(record)
    }

    /// Deletes what the policy of a checkpoint that is ready leaves no room for.
    pub(super) async fn retire(&self, record: &CheckpointRecord) -> Result<(), Refusal> {
        if record.retention_policy.is_none() {
            return Ok(());
        }
        let checkpoint = shown(record);
        let known = self.book.index(&checkpoint.sandbox_id).await?;
        let policy = record.retention_policy.as_ref();
        for surplus in index::surplus(&known, &checkpoint.checkpoint_id, policy) {
            // Boxed: deleting one never retires another.
            Box::pin(self.end(&surplus)).await?;
        }
        // Done: who looks at it again finds nothing to do.
        let done = |record: &CheckpointRecord| CheckpointRecord { retention_policy: None, ..record.clone() };
        self.book.update(&checkpoint.checkpoint_id, done).await.map(drop)
    }
}

/// Whether it is being taken.
pub(super) fn is_processing(record: &CheckpointRecord) -> bool {
    shown(record).state() == CheckpointState::Processing
}

/// The record of a checkpoint that its host has taken as `snapshot`.
fn ready(record: &CheckpointRecord, snapshot: &Snapshot) -> CheckpointRecord {
    let checkpoint = Checkpoint {
        state: CheckpointState::Ready.into(),
        size_bytes: snapshot.size_bytes,
        memory_changed_bytes: snapshot.memory_changed_bytes,
        disk_changed_bytes: snapshot.disk_changed_bytes,
        is_quiesced: snapshot.is_quiesced,
        pause_us: snapshot.pause_us,
        freeze_us: snapshot.freeze_us,
        manifest_digest: snapshot.manifest_digest.clone(),
        failure: String::new(),
        ..shown(record)
    };
    let record = CheckpointRecord {
        checkpoint: Some(checkpoint),
        snapshot_key: snapshot.snapshot_key.clone(),
        base_digest: snapshot.base_digest.clone(),
        ..record.clone()
    };
    uploaded(&record, &snapshot.object_store_id)
}

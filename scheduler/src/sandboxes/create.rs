//! Creating a sandbox.
//!
//! ```text
//!   order ─► write CREATING ─► host makes the microVM ─► write RUNNING ─► answer
//!              │ quota, place     │ fails
//!              ▼                  ├─► another host takes it: write CREATING, higher epoch ─┐
//!            refuse               │                        ▲───────────────────────────────┘
//!                                 └─► none left: write DELETED, release its share, refuse
//! ```
//!
//! Two durable transactions when all goes well; all else comes from memory. The answer follows the second. A scheduler
//! that dies in between leaves `CREATING`, which [reconciliation](crate::reconcile) undoes: nobody was told of it.

use std::time::Duration;

use futures_util::future::{BoxFuture, Shared};
use oc_proto::mesh::{CreateVmResponse, SandboxRecord, Snapshot, SnapshotSource};
use tokio::time::Instant;

use super::Sandboxes;
use crate::{
    agents::{AgentError, CREATE_DEADLINE},
    fail,
    ledger::{Change, LedgerError, Next, Versioned},
    lifecycle::{self, Denied},
    placement::Like,
    refusal::Refusal,
    sandbox_id::SandboxId,
    telemetry,
    validate::Order,
};

/// Hosts that are tried at most.
const MAX_HOSTS: usize = 3;
/// How long all of them together may take.
const BUDGET: Duration = Duration::from_secs(120);
/// `CREATING` for longer than this, nobody works on it any more. Longer than [`BUDGET`] by far more than the two
/// transactions take.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(180);

/// What is told of a snapshot once it was taken, to all who wait for it.
pub(crate) type Captured = Shared<BoxFuture<'static, Result<Snapshot, AgentError>>>;

/// What a sandbox is made of, instead of a template.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// The host that has the snapshot.
    pub(crate) host_id: String,
    /// What another host must have to do as well, if the snapshot is in an object store: it is asked if that one is gone or
    /// has no room.
    pub(crate) elsewhere: Option<Like>,
    /// The snapshot.
    pub(crate) source: SnapshotSource,
    /// Completes when it was taken.
    pub(crate) captured: Captured,
    /// The checkpoint that it is of, if it is one's.
    pub(crate) from_checkpoint_id: String,
    /// The checkpoint that its sandbox went on from last.
    pub(crate) parent_id: String,
    /// The sandbox that it is of, if no checkpoint was made.
    pub(crate) forked_from: String,
}

impl Origin {
    /// The record of a sandbox that is made of it, on whichever host.
    fn apply(&self, draft: SandboxRecord) -> SandboxRecord {
        SandboxRecord {
            from_checkpoint_id: self.from_checkpoint_id.clone(),
            checkpoint_id: self.parent_id.clone(),
            forked_from: self.forked_from.clone(),
            ..draft
        }
    }
}

impl Sandboxes {
    /// Creates a sandbox and returns its record, running.
    ///
    /// May be given up on: what is not wanted any more when it runs is deleted.
    ///
    /// # Errors
    ///
    /// Quota, capacity, template; the host's reason.
    pub async fn create(&self, tenant: &str, order: Order) -> Result<Versioned, Refusal> {
        let id = SandboxId::generate().map_err(|error| Refusal::Internal(error.to_string()))?;
        let (this, caller) = (self.clone(), self.clone());
        let tenant = tenant.to_owned();
        let abandoned = move |result: Result<Versioned, Refusal>| async move {
            if let Ok(made) = result {
                this.unwanted(&made.record.sandbox_id).await;
            }
        };
        let flow = async move { caller.make_and_tell(&id, &tenant, order, None).await };
        self.flows.run(flow, abandoned).await.unwrap_or(Err(Refusal::Stopping))
    }

    /// Ends a sandbox whose creator has gone away, or does not want it without the others that were to be made with it.
    pub(crate) async fn unwanted(&self, sandbox_id: &str) {
        tracing::info!(sandbox_id, "nobody waits for it any more: deleting it");
        if let Err(error) = self.end(sandbox_id).await {
            tracing::warn!(sandbox_id, %error, "it stays until its idle timeout");
        }
    }

    /// Makes a sandbox, of what `origin` says if there is one, and counts and logs what became of it.
    pub(crate) async fn make_and_tell(
        &self,
        id: &SandboxId,
        tenant: &str,
        order: Order,
        origin: Option<Origin>,
    ) -> Result<Versioned, Refusal> {
        let begun = Instant::now();
        let result = self.make(id, tenant, order, origin).await;
        let outcome = result.as_ref().map_or_else(|refusal| refusal.reason().as_str(), |_| "ok");
        telemetry::created(outcome, begun.elapsed());
        match &result {
            Ok(made) => tracing::info!(
                sandbox_id = id.as_str(),
                tenant,
                host_id = made.record.host_id,
                start_path = made.record.start_path().as_str_name(),
                elapsed_ms = begun.elapsed().as_millis(),
                "sandbox created"
            ),
            Err(error) => tracing::info!(sandbox_id = id.as_str(), tenant, %error, "sandbox not created"),
        }
        result
    }

    async fn make(
        &self,
        id: &SandboxId,
        tenant: &str,
        order: Order,
        origin: Option<Origin>,
    ) -> Result<Versioned, Refusal> {
        // Before the record exists, so that reconciliation never sees one that nobody works on.
        let _live = self.flows.enter(id.as_str());
        let until = Instant::now() + BUDGET;
        let draft = lifecycle::draft(id, tenant, order, self.clock.now());
        let mut placed = self.place(id, draft, origin.as_ref()).await?;
        fail::reached(fail::CREATE_RECORDED);
        let mut snapshot = None;
        if let Some(Origin { captured, source, .. }) = &origin {
            // Its record was written while the snapshot was taken.
            if let Err(failure) = captured.clone().await {
                self.undo(placed).await;
                return Err(failure.into());
            }
            snapshot = Some(source.clone());
        }
        let mut tried = Vec::new();
        loop {
            let record = &placed.record;
            let remaining = until.saturating_duration_since(Instant::now());
            let deadline = CREATE_DEADLINE.min(remaining);
            let failure = match self.agents.create_vm(record, snapshot.clone(), deadline).await {
                Ok(made) => return self.run(placed, &made).await,
                Err(failure) => failure,
            };
            tracing::warn!(sandbox_id = %id, host_id = record.host_id, error = %failure, "host did not make it");
            self.clean_up(&placed, &failure);
            tried.push(record.host_id.clone());
            let like = origin.as_ref().and_then(|origin| origin.elsewhere.clone());
            // A snapshot may be on one host alone.
            let may_go_on = failure.is_of_this_host()
                && (origin.is_none() || like.is_some())
                && tried.len() < MAX_HOSTS
                && Instant::now() < until;
            let next = if may_go_on { self.place_again(id, &placed, &tried, like).await? } else { None };
            match next {
                Some(next) => placed = next,
                None => {
                    self.undo(placed).await;
                    return Err(failure.into());
                }
            }
        }
    }

    /// Writes its record down for the first time: on the host that has its snapshot, if it is of one and that host takes it.
    async fn place(
        &self,
        id: &SandboxId,
        draft: SandboxRecord,
        origin: Option<&Origin>,
    ) -> Result<Versioned, LedgerError> {
        let Some(origin) = origin else {
            return self.write(id, None, Next::Placed { record: draft, avoid: Vec::new(), like: None }).await;
        };
        let record = origin.apply(draft);
        let there = lifecycle::draft_on(record.clone(), &origin.host_id);
        match (self.write(id, None, Next::Reserved(there)).await, &origin.elsewhere) {
            (Err(LedgerError::Unplaceable(_)), Some(like)) => {
                let avoid = vec![origin.host_id.clone()];
                self.write(id, None, Next::Placed { record, avoid, like: Some(like.clone()) }).await
            }
            (placed, _) => placed,
        }
    }

    async fn write(
        &self,
        id: &SandboxId,
        from: Option<Versioned>,
        to: Next,
    ) -> Result<Versioned, LedgerError> {
        self.ledger.write(Change { sandbox_id: id.as_str().into(), from, to }).await
    }

    /// The microVM answers: so does the sandbox, as soon as that is durable.
    async fn run(&self, placed: Versioned, made: &CreateVmResponse) -> Result<Versioned, Refusal> {
        fail::reached(fail::CREATE_MADE);
        let now = self.clock.now();
        let written = self.ledger.step(placed, |record| lifecycle::run(record, made, now)).await;
        fail::reached(fail::CREATE_WRITTEN);
        match written {
            // Deleted while it was made; who deleted it ends the microVM, too.
            Err(LedgerError::Conflict) => Err(Denied::Deleted.into()),
            result => Ok(result?),
        }
    }

    /// Gives it to a host that was not tried yet; `None` if there is none.
    async fn place_again(
        &self,
        id: &SandboxId,
        placed: &Versioned,
        tried: &[String],
        like: Option<Like>,
    ) -> Result<Option<Versioned>, Refusal> {
        let to = Next::Placed { record: placed.record.clone(), avoid: tried.to_vec(), like };
        match self.write(id, Some(placed.clone()), to).await {
            Ok(next) => {
                telemetry::placed_again();
                Ok(Some(next))
            }
            Err(LedgerError::Unplaceable(_)) => Ok(None),
            Err(LedgerError::Conflict) => Err(Denied::Deleted.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends what a host may have made after it failed to say so. In the background, once: reconciliation does the rest.
    fn clean_up(&self, placed: &Versioned, failure: &AgentError) {
        if matches!(failure, AgentError::NotMember(_)) {
            return;
        }
        let (agents, record) = (self.agents.clone(), placed.record.clone());
        self.flows.spawn(async move {
            let ended = agents.delete_vm(&record.host_id, &record.sandbox_id, record.epoch, None);
            if let Err(error) = ended.await {
                tracing::info!(sandbox_id = record.sandbox_id, %error, "what may be left is reconciled later");
            }
        });
    }

    /// Writes that it was never made, and releases its share.
    async fn undo(&self, placed: Versioned) {
        let (sandbox_id, now) = (placed.record.sandbox_id.clone(), self.clock.now());
        match self.ledger.step(placed, |record| lifecycle::undo(record, now)).await {
            Ok(_) | Err(LedgerError::Conflict) => {}
            Err(error) => tracing::warn!(sandbox_id, %error, "its record is undone by reconciliation"),
        }
    }
}

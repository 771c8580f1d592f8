//! Storing a sandbox, and waking it.
//!
//! ```text
//!   mark hibernating ─► host hibernates the microVM ─► write HIBERNATED, release the share ─► answer
//!                          └─ refuses ─► unmark ─► refuse
//!   mark waking, count the share ─► host wakes it ─► write RUNNING ─► answer
//!                                      └─ refuses ─► unmark, release the share ─► refuse
//! ```
//!
//! A sandbox whose host is lost, and that is in an object store, is given another one as it is marked. That makes it of what
//! the store has, under a higher epoch; should the lost one come back, what it has is a stray.
//!
//! A host may answer before the microVM is stored: what that takes is learned when it is
//! [looked at](crate::reconcile) next.
//!
//! A host that does not answer leaves the mark: what became of it is found out by [reconciliation](crate::reconcile). Any
//! number may wake a sandbox at once: the first one marks it, and on its host all of them wait for the same restore.

use std::time::{Duration, SystemTime};

use oc_mesh::error::Reason;
use oc_proto::{
    mesh::{SandboxRecord, SandboxTransition, SnapshotSource, WakeVmResponse},
    v1::SandboxState,
};

use super::Sandboxes;
use crate::{
    agents::{AgentError, CREATE_DEADLINE},
    fail,
    ledger::{Change, LedgerError, Next, Versioned},
    lifecycle::{self, Denied},
    placement::{Like, Unplaceable},
    random,
    refusal::Refusal,
};

/// How long a wake waits for a hibernation that is under way, and for others that change the record.
const WAKE_WITHIN: Duration = Duration::from_secs(150);

impl Sandboxes {
    /// Stores a tenant's sandbox and returns its record. Fine if it is hibernated.
    ///
    /// May be given up on: it is stored all the same.
    ///
    /// # Errors
    ///
    /// [`Refusal::SandboxNotFound`], for another tenant's too; [`Denied`]; the host's reason.
    pub async fn hibernate(&self, tenant: &str, sandbox_id: &str) -> Result<SandboxRecord, Refusal> {
        let found = self.find(tenant, sandbox_id).await?;
        let (this, sandbox_id) = (self.clone(), found.record.sandbox_id);
        let flow = async move { this.store(&sandbox_id, None).await };
        self.flows.run(flow, async |_| ()).await.unwrap_or(Err(Refusal::Stopping))
    }

    /// Marks a sandbox and stores it; with `if_idle_since` only if it was not used since.
    pub(crate) async fn store(
        &self,
        sandbox_id: &str,
        if_idle_since: Option<SystemTime>,
    ) -> Result<SandboxRecord, Refusal> {
        // Before the mark, so that reconciliation does not take it for one that nobody works on.
        let _live = self.flows.enter(sandbox_id);
        let marked = match self.ledger.update(sandbox_id, lifecycle::mark_hibernating).await {
            Err(LedgerError::Denied(Denied::NotReady)) => {
                let found = self.ledger.read(sandbox_id).await?.ok_or(Refusal::SandboxNotFound)?.record;
                // A wake that is under way is younger than this.
                let is_stored = found.state() == SandboxState::Hibernated
                    && found.transition() == SandboxTransition::Unspecified;
                return if is_stored { Ok(found) } else { Err(Denied::NotReady.into()) };
            }
            marked => marked?,
        };
        fail::reached(fail::HIBERNATE_MARKED);
        match self.agents.hibernate_vm(&marked.record, if_idle_since).await {
            Ok(host) => {
                fail::reached(fail::HIBERNATE_STORED);
                let step = |record: &SandboxRecord| lifecycle::hibernate(record, &host);
                let stored = self.ledger.update(sandbox_id, step).await?.record;
                fail::reached(fail::HIBERNATE_WRITTEN);
                let (tier, is_idle) = (host.tier().as_str_name(), if_idle_since.is_some());
                tracing::info!(sandbox_id, host.stored_bytes, tier, is_idle, "sandbox hibernated");
                Ok(stored)
            }
            // Nobody knows what became of it. Reconciliation asks.
            Err(error @ (AgentError::Unreachable { .. } | AgentError::NotMember(_))) => Err(error.into()),
            Err(error) => {
                let now = self.clock.now();
                match self.ledger.update(sandbox_id, |record| lifecycle::spare(record, now)).await {
                    Ok(_) | Err(LedgerError::Denied(_)) => Err(error.into()),
                    Err(failed) => Err(failed.into()),
                }
            }
        }
    }

    /// Wakes a tenant's sandbox and returns its record, running, with the idle timeout `timeout` if there is one. Fine if
    /// it runs.
    ///
    /// May be given up on: it wakes all the same.
    ///
    /// # Errors
    ///
    /// [`Refusal::SandboxNotFound`], for another tenant's too; [`Denied`]; quota, capacity; the host's reason.
    pub async fn wake(
        &self,
        tenant: &str,
        sandbox_id: &str,
        timeout: Option<i32>,
    ) -> Result<SandboxRecord, Refusal> {
        let found = self.find(tenant, sandbox_id).await?;
        let (this, sandbox_id) = (self.clone(), found.record.sandbox_id);
        let flow = async move {
            if let Some(timeout) = timeout {
                this.set_timeout_of(&sandbox_id, timeout).await?;
            }
            let woken = tokio::time::timeout(WAKE_WITHIN, this.rouse(&sandbox_id)).await;
            woken.unwrap_or_else(|_| Err(Denied::NotReady.into()))
        };
        self.flows.run(flow, async |_| ()).await.unwrap_or(Err(Refusal::Stopping))
    }

    /// Wakes a sandbox, whatever others do with it meanwhile.
    pub(crate) async fn rouse(&self, sandbox_id: &str) -> Result<SandboxRecord, Refusal> {
        for attempt in 0.. {
            let found = self.ledger.read(sandbox_id).await?.ok_or(Refusal::SandboxNotFound)?;
            let record = &found.record;
            if lifecycle::is_deleted(record) {
                return Err(Denied::Deleted.into());
            }
            match (record.state(), record.transition()) {
                (SandboxState::Failed, _) => return Err(Denied::Failed.into()),
                // Whoever does that settles it, or reconciliation: it must not be kept from it here.
                (SandboxState::Running, SandboxTransition::Hibernating)
                | (_, SandboxTransition::Restoring) => {}
                (SandboxState::Running, _) => return Ok(found.record),
                (SandboxState::Hibernated, SandboxTransition::Waking) => {
                    let _live = self.flows.enter(sandbox_id);
                    return self.finish_wake(found).await;
                }
                (SandboxState::Hibernated, _) => {
                    // Before the mark, so that reconciliation does not take it for one that nobody works on.
                    let _live = self.flows.enter(sandbox_id);
                    let marked = match self.is_to_be_placed(record) {
                        true => self.place_anew(found).await,
                        false => {
                            let to = Next::Reserved(lifecycle::mark_waking(record)?);
                            let change = Change { sandbox_id: sandbox_id.into(), from: Some(found), to };
                            self.ledger.write(change).await
                        }
                    };
                    match marked {
                        Ok(marked) => return self.finish_wake(marked).await,
                        Err(LedgerError::Conflict) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                _ => return Err(Denied::NotReady.into()),
            }
            random::pause(Duration::from_millis(5), attempt).await;
        }
        Err(Denied::NotReady.into())
    }

    /// Wakes a marked sandbox.
    pub(crate) async fn finish_wake(&self, marked: Versioned) -> Result<SandboxRecord, Refusal> {
        let sandbox_id = marked.record.sandbox_id.as_str();
        fail::reached(fail::WAKE_MARKED);
        let woken = match marked.record.in_store_alone {
            true => self.make_of_store(&marked.record).await,
            false => self.agents.wake_vm(&marked.record).await,
        };
        match woken {
            Ok(woken) => {
                fail::reached(fail::WAKE_WOKEN);
                let now = self.clock.now();
                let step = |record: &SandboxRecord| match lifecycle::wake(record, &woken, now) {
                    // Another one who waited for the same restore was quicker.
                    Err(Denied::Passed) => Ok(record.clone()),
                    stepped => stepped,
                };
                let record = self.ledger.update(sandbox_id, step).await?.record;
                fail::reached(fail::WAKE_WRITTEN);
                let path = record.start_path().as_str_name();
                tracing::info!(sandbox_id, start_path = path, "sandbox woken");
                Ok(record)
            }
            // Nobody knows what became of it. Reconciliation asks.
            Err(error @ (AgentError::Unreachable { .. } | AgentError::NotMember(_))) => Err(error.into()),
            Err(error) => match self.ledger.update(sandbox_id, lifecycle::doze).await {
                Ok(_) | Err(LedgerError::Denied(_)) => Err(error.into()),
                Err(failed) => Err(failed.into()),
            },
        }
    }

    /// Whether a hibernated sandbox has to be given a host before it wakes: that which it had is lost, or has lost it.
    fn is_to_be_placed(&self, record: &SandboxRecord) -> bool {
        let is_lost = || self.agents.hosts().get(&record.host_id).is_none();
        record.in_store_alone || !record.stored_snapshot_id.is_empty() && is_lost()
    }

    /// Marks a sandbox that is to be given a host, and gives it one: one where its memory goes on, or else one where its disk
    /// boots.
    async fn place_anew(&self, found: Versioned) -> Result<Versioned, LedgerError> {
        let marked = lifecycle::mark_moving(&found.record)?;
        let place = async |like: Like| {
            let to = Next::Placed { record: marked.clone(), avoid: Vec::new(), like: Some(like) };
            let sandbox_id = marked.sandbox_id.clone();
            self.ledger.write(Change { sandbox_id, from: Some(found.clone()), to }).await
        };
        match place(like_of(&marked)).await {
            Err(LedgerError::Unplaceable(Unplaceable::NoHost)) => place(like_of(&marked).for_disk()).await,
            placed => placed,
        }
    }

    /// Has the host that a marked sandbox was given make it of what the object store has.
    async fn make_of_store(&self, record: &SandboxRecord) -> Result<WakeVmResponse, AgentError> {
        let snapshot_id = record.stored_snapshot_id.clone();
        let host = self.agents.hosts().get(&record.host_id);
        let disk_only = host.is_some_and(|host| !like_of(record).is_met_by(&host));
        let source = SnapshotSource { snapshot_id, disk_only, wakes: true };
        let made = match self.agents.create_vm(record, Some(source.clone()), CREATE_DEADLINE).await {
            // Its disk may be whole.
            Err(AgentError::Refused { reason: Reason::CheckpointDamaged, .. }) if !disk_only => {
                let source = SnapshotSource { disk_only: true, ..source };
                self.agents.create_vm(record, Some(source), CREATE_DEADLINE).await?
            }
            made => made?,
        };
        Ok(WakeVmResponse { accelerator: made.accelerator, start_path: made.start_path })
    }
}

/// Where the memory of a hibernated sandbox goes on.
fn like_of(record: &SandboxRecord) -> Like {
    Like {
        object_store_id: record.object_store_id.clone(),
        base_digest: record.stored_base_digest.clone(),
        snapshot_key: record.stored_snapshot_key.clone(),
    }
}

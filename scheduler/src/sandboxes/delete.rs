//! Deleting a sandbox.
//!
//! ```text
//!   write the mark ─► host ends the microVM ─► write DELETED, release the share ─► answer
//!                        │ does not answer, though it is a member
//!                        └─► answer; reconciliation goes on from the mark
//! ```
//!
//! After the mark nobody uses the sandbox, and nothing brings it back. Its share of the host is released when the host
//! has confirmed that nothing is left, or is no member: nobody can tell whether it ever comes back, and a tenant's quota
//! is not to hang on that. If it does, what it still has is older than the mark, and is ended as a stray.

use oc_proto::mesh::SandboxRecord;
use tokio::task::{JoinError, JoinSet};

use super::Sandboxes;
use crate::{
    agents::AgentError,
    ledger::{LedgerError, Versioned},
    lifecycle::{self, Denied},
    placement::Like,
    refusal::Refusal,
    telemetry,
};

/// Sandboxes of a host that are ended at the same time.
const ENDS_AT_ONCE: usize = 16;

impl Sandboxes {
    /// Deletes a tenant's sandbox. Fine if it is deleted.
    ///
    /// May be given up on: it is deleted all the same.
    ///
    /// # Errors
    ///
    /// [`Refusal::SandboxNotFound`], for another tenant's too; failures of the store before the mark.
    pub async fn delete(&self, tenant: &str, sandbox_id: &str) -> Result<(), Refusal> {
        let found = self.find(tenant, sandbox_id).await?;
        let (this, sandbox_id) = (self.clone(), found.record.sandbox_id);
        let flow = async move { this.end(&sandbox_id).await };
        self.flows.run(flow, async |_| ()).await.unwrap_or(Err(Refusal::Stopping))
    }

    /// Deletes every sandbox that is placed on a host, whoever's it is. Returns how many there were.
    ///
    /// May be given up on: they are deleted all the same.
    ///
    /// # Errors
    ///
    /// Failures of the store before a mark; the others are deleted all the same.
    pub async fn clear(&self, host_id: &str) -> Result<usize, Refusal> {
        let here = self.all_but_deleted(|record| record.host_id == host_id).await;
        let this = self.clone();
        let flow = async move {
            let mut ends = JoinSet::new();
            let mut outcome = Ok(here.len());
            for record in here {
                if ends.len() >= ENDS_AT_ONCE {
                    note(ends.join_next().await, &mut outcome);
                }
                let this = this.clone();
                ends.spawn(async move { this.end(&record.sandbox_id).await });
            }
            while let Some(ended) = ends.join_next().await {
                note(Some(ended), &mut outcome);
            }
            outcome
        };
        self.flows.run(flow, async |_| ()).await.unwrap_or(Err(Refusal::Stopping))
    }

    /// Marks a sandbox and ends it.
    pub(crate) async fn end(&self, sandbox_id: &str) -> Result<(), Refusal> {
        let marked = match self.ledger.update(sandbox_id, lifecycle::mark_deleting).await {
            Ok(marked) => marked,
            // Deleted, or even collected, meanwhile.
            Err(LedgerError::Denied(Denied::Deleted) | LedgerError::NotFound) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let _live = self.flows.enter(sandbox_id);
        let ended = self.finish_delete(marked).await;
        telemetry::deleted(ended.is_ok());
        match ended {
            Ok(()) => tracing::info!(sandbox_id, "sandbox deleted"),
            Err(error) => tracing::warn!(sandbox_id, %error, "sandbox is marked, its host ends it later"),
        }
        Ok(())
    }

    /// Ends the microVM of a marked sandbox, and buries it.
    pub(crate) async fn finish_delete(&self, marked: Versioned) -> Result<(), Refusal> {
        let record = &marked.record;
        match self.agents.delete_vm(&record.host_id, &record.sandbox_id, record.epoch, None).await {
            Ok(()) => {}
            Err(error @ AgentError::NotMember(_)) => {
                tracing::warn!(sandbox_id = record.sandbox_id, %error, "buried without its host");
            }
            Err(error @ AgentError::Refused { reason: oc_mesh::error::Reason::StaleEpoch, .. }) => {
                // Only a store that went back in time knows less than a host.
                tracing::error!(sandbox_id = record.sandbox_id, %error, "host holds a newer epoch than the record");
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
        self.remove_from_store(record).await;
        self.bury(&marked.record.sandbox_id).await
    }

    /// Removes what an object store has of a hibernated sandbox. What its host still has is removed when that is
    /// [looked at](crate::reconcile), from there, too; so this is for one whose host is lost, and tried once.
    async fn remove_from_store(&self, record: &SandboxRecord) {
        let id = record.stored_snapshot_id.as_str();
        if id.is_empty() {
            return;
        }
        let like = Like { object_store_id: record.object_store_id.clone(), ..Like::default() };
        let Some(host_id) = self.agents.any_host(|host| like.is_met_by(host)) else {
            tracing::warn!(id, "what the object store has of a deleted sandbox stays: no host reaches it");
            return;
        };
        if let Err(error) = self.agents.delete_snapshot(&host_id, id).await {
            tracing::warn!(id, %error, "what the object store has of a deleted sandbox stays");
        }
    }

    /// Writes that nothing is left of a sandbox.
    pub(crate) async fn bury(&self, sandbox_id: &str) -> Result<(), Refusal> {
        let now = self.clock.now();
        match self.ledger.update(sandbox_id, |record| lifecycle::bury(record, now)).await {
            Ok(_) | Err(LedgerError::Denied(Denied::Deleted) | LedgerError::NotFound) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Keeps the first error.
fn note(ended: Option<Result<Result<(), Refusal>, JoinError>>, outcome: &mut Result<usize, Refusal>) {
    let error = match ended {
        Some(Ok(Err(error))) => error,
        Some(Err(panic)) => Refusal::Internal(panic.to_string()),
        Some(Ok(Ok(()))) | None => return,
    };
    if outcome.is_ok() {
        *outcome = Err(error);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use oc_mesh::{
        clock::SystemClock,
        keys, record,
        store::{self, Txn},
        view::View,
    };
    use oc_proto::{
        mesh::{HostReservation, SandboxRecord, TenantUsage, VmSize},
        v1::SandboxState,
    };
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{quota::Quota, sandbox_id::SandboxId};

    #[tokio::test]
    async fn a_sandbox_whose_host_is_gone_is_buried_at_once_and_releases_its_share() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().join("store.db").display());
        let store = store::open(&url).await.unwrap();
        let id = SandboxId::generate().unwrap();
        let running = SandboxRecord {
            sandbox_id: id.as_str().into(),
            tenant: "acme".into(),
            state: SandboxState::Running.into(),
            size: Some(VmSize { cpu_count: 1, memory_mb: 1024, disk_mb: 20_480 }),
            host_id: "gone".into(),
            epoch: 1,
            reserved: true,
            ..Default::default()
        };
        let then = vec![
            record::put(keys::sandbox(id.as_str()), &running),
            record::put(keys::usage("acme"), &TenantUsage { sandboxes: 1, memory_mb: 1024 }),
            record::put(keys::reservation("gone"), &HostReservation { sandboxes: 1, memory_mb: 1024 }),
        ];
        store.txn(Txn { compare: Vec::new(), then }).await.unwrap();
        let views = CancellationToken::new();
        let hosts = View::start(store.clone(), keys::HOSTS, views.clone()).await.unwrap();
        let quota = Quota { max_sandboxes: 10, max_memory_mb: 10_240 };
        let opened = Sandboxes::open(store.clone(), hosts, quota, Arc::new(SystemClock), views.clone());
        let (sandboxes, writer) = opened.await.unwrap();
        tokio::spawn(writer);

        sandboxes.delete("acme", id.as_str()).await.unwrap();
        let buried = sandboxes.get("acme", id.as_str()).await.unwrap();
        assert_eq!((buried.state(), buried.reserved, buried.epoch), (SandboxState::Deleted, false, 2));
        let usage = record::get::<TenantUsage>(store.as_ref(), &keys::usage("acme")).await.unwrap();
        assert_eq!(usage.map_or(0, |(usage, _)| usage.sandboxes), 0);
        assert_eq!(sandboxes.clear("gone").await.unwrap(), 0);
        views.cancel();
    }
}

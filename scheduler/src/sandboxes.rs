//! What may be done with sandboxes, for callers that are known and requests that are parsed. Creating, deleting, storing
//! waking and putting back are flows of their own: [`create`], [`delete`], [`hibernate`], [`restore`].

use std::{sync::Arc, time::Duration};

use oc_mesh::{
    clock::SharedClock,
    keys,
    store::{SharedStore, StoreError},
    view::View,
};
use oc_proto::mesh::{HostRecord, SandboxRecord};
use tokio_util::sync::CancellationToken;

use crate::{
    activity::Activity,
    agents::Agents,
    flows::Flows,
    ledger::{Ledger, LedgerError, Versioned},
    lifecycle::{self, Denied},
    quota::Quota,
    random,
    refusal::Refusal,
    sandbox_id::SandboxId,
};

pub mod create;
pub mod delete;
pub mod hibernate;
pub mod restore;

/// How long a list waits for its copy of the records to show what this process has answered. A test fails by an old list,
/// and so waits for longer.
pub(crate) const CATCH_UP: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 1 });
/// How long a new timeout waits for the answer of a host that was asked to store the sandbox.
const SETTLE: Duration = Duration::from_secs(5);

/// Everything that sandboxes are managed with.
#[derive(Clone, Debug)]
pub struct Sandboxes {
    pub(crate) ledger: Ledger,
    pub(crate) agents: Arc<Agents>,
    pub(crate) flows: Flows,
    pub(crate) records: View<SandboxRecord>,
    pub(crate) activity: Activity,
    pub(crate) clock: SharedClock,
}

impl Sandboxes {
    /// Those of `store` on `hosts`, of whose records a copy is followed until `views` is cancelled; and what writes their
    /// changes, which is to be run.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub async fn open(
        store: SharedStore,
        hosts: View<HostRecord>,
        quota: Quota,
        clock: SharedClock,
        views: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), StoreError> {
        let records = View::start(store.clone(), keys::SANDBOXES, views).await?;
        let (ledger, writer) = Ledger::start(store, hosts.clone(), quota).await?;
        let agents = Arc::new(Agents::new(hosts));
        let (flows, activity) = (Flows::default(), Activity::default());
        Ok((Self { ledger, agents, flows, records, activity, clock }, writer))
    }

    /// One sandbox of a tenant, deleted ones included while they are remembered.
    ///
    /// Read from the store: a caller sees what it was told a moment ago, whichever scheduler told it.
    ///
    /// # Errors
    ///
    /// [`Refusal::SandboxNotFound`], for another tenant's too; failures of the store.
    pub async fn get(&self, tenant: &str, sandbox_id: &str) -> Result<SandboxRecord, Refusal> {
        Ok(self.find(tenant, sandbox_id).await?.record)
    }

    /// All sandboxes of a tenant that are not deleted, oldest first.
    pub async fn list(&self, tenant: &str) -> Vec<Arc<SandboxRecord>> {
        let mut records = self.all_but_deleted(|record| record.tenant == tenant).await;
        records.sort_by(|left, right| age(left).cmp(&age(right)));
        records
    }

    /// The sandboxes that are wanted and not deleted, in no order.
    async fn all_but_deleted(&self, is_wanted: impl Fn(&SandboxRecord) -> bool) -> Vec<Arc<SandboxRecord>> {
        // Not to be seen is worse than late: the copy shows what this process has written before it is read.
        let written = self.ledger.written();
        if tokio::time::timeout(CATCH_UP, self.records.reached(written)).await.is_err() {
            tracing::warn!("the list of sandboxes may be old: the store's changes do not arrive");
        }
        let all = self.records.all().into_iter().map(|(_, record)| record);
        all.filter(|record| is_wanted(record) && !lifecycle::is_deleted(record)).collect()
    }

    /// Sets a sandbox's idle timeout; its idle time starts anew.
    ///
    /// # Errors
    ///
    /// [`Refusal::SandboxNotFound`]; [`Denied`] if it neither runs nor is hibernated.
    pub async fn set_timeout(&self, tenant: &str, sandbox_id: &str, timeout: i32) -> Result<(), Refusal> {
        self.find(tenant, sandbox_id).await?;
        self.set_timeout_of(sandbox_id, timeout).await
    }

    async fn set_timeout_of(&self, sandbox_id: &str, timeout: i32) -> Result<(), Refusal> {
        let step = |record: &SandboxRecord| lifecycle::set_timeout(record, timeout, self.clock.now());
        let settled = async {
            for attempt in 0.. {
                match self.ledger.update(sandbox_id, step).await {
                    // Its host has just been asked to store it, or to put it back. Only the host knows which came first.
                    Err(LedgerError::Denied(Denied::NotReady)) if self.is_settling(sandbox_id).await => {
                        random::pause(Duration::from_millis(10), attempt).await;
                    }
                    settled => return settled.map(|_| ()),
                }
            }
            Ok(())
        };
        let settled = tokio::time::timeout(SETTLE, settled).await;
        Ok(settled.unwrap_or_else(|_| Err(Denied::NotReady.into()))?)
    }

    async fn is_settling(&self, sandbox_id: &str) -> bool {
        let is_settling =
            |record: &SandboxRecord| lifecycle::is_hibernating(record) || lifecycle::is_restoring(record);
        let found = self.ledger.read(sandbox_id).await;
        found.is_ok_and(|found| found.is_some_and(|found| is_settling(&found.record)))
    }

    /// The record of a tenant's sandbox.
    pub(crate) async fn find(&self, tenant: &str, sandbox_id: &str) -> Result<Versioned, Refusal> {
        // What is no ID names no sandbox, and never reaches the store.
        let id: SandboxId = sandbox_id.parse().map_err(|_| Refusal::SandboxNotFound)?;
        let found = self.ledger.read(id.as_str()).await?.ok_or(Refusal::SandboxNotFound)?;
        if found.record.tenant == tenant { Ok(found) } else { Err(Refusal::SandboxNotFound) }
    }
}

/// What a list is ordered by.
pub fn age(record: &SandboxRecord) -> (i64, i32, &str) {
    let created = record.created_at.unwrap_or_default();
    (created.seconds, created.nanos, &record.sandbox_id)
}

//! A scheduler's inside with a store and one host, which survives the scheduler.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use oc_mesh::{
    clock::ManualClock,
    endpoint::Endpoint,
    keys, record,
    store::{self, SharedStore, Txn},
    view::View,
};
use oc_proto::{
    mesh::{CheckpointRecord, HostRecord, SandboxRecord, TenantUsage},
    v1::CheckpointKind,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::host::FakeHost;
use crate::{
    checkpoints::{Checkpoints, fork::Wanted, take::Order},
    previews::Previews,
    quota::Quota,
    reconcile::{Pace, Reconciler},
    refusal::Refusal,
    sandboxes::Sandboxes,
    validate,
};

pub(super) const TENANT: &str = "acme";
pub(super) const HOST: &str = "host-a";
/// Its object store.
pub(super) const STORE: &str = "store-a";
/// The memories that go on there.
pub(super) const KEY: &str = "key-a";
/// Its base image.
pub(super) const BASE: &str = "base-a";

pub(super) struct Mesh {
    pub(super) sandboxes: Sandboxes,
    pub(super) checkpoints: Checkpoints,
    pub(super) reconciler: Reconciler,
    pub(super) host: FakeHost,
    pub(super) store: SharedStore,
    clock: ManualClock,
    /// Ends the copies of the store's records.
    views: CancellationToken,
    /// Ends the host.
    stop: CancellationToken,
    directory: Arc<TempDir>,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.views.cancel();
        if Arc::strong_count(&self.directory) == 1 {
            self.stop.cancel();
        }
    }
}

impl Mesh {
    pub(super) async fn start() -> Self {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let url = format!("file://{}", directory.path().join("store.db").display());
        let store = store::open(&url).await.unwrap();
        let clock = ManualClock::new(SystemTime::now());
        let stop = CancellationToken::new();
        let endpoint = Endpoint::Unix(directory.path().join("agent.sock"));
        let host = FakeHost::serve(endpoint.clone(), Arc::new(clock.clone()), stop.clone()).await;
        let record = HostRecord { endpoint: endpoint.to_string(), ..member(HOST, STORE, KEY) };
        let then = vec![record::put(keys::host(HOST), &record)];
        store.txn(Txn { compare: vec![], then }).await.unwrap();
        Self::around(store, host, clock, stop, directory).await
    }

    async fn around(
        store: SharedStore,
        host: FakeHost,
        clock: ManualClock,
        stop: CancellationToken,
        directory: Arc<TempDir>,
    ) -> Self {
        let views = CancellationToken::new();
        let hosts = View::start(store.clone(), keys::HOSTS, views.clone()).await.unwrap();
        let schedulers = View::start(store.clone(), keys::SCHEDULERS, views.clone()).await.unwrap();
        let quota = Quota { max_sandboxes: 100, max_memory_mb: 1 << 20 };
        let opened = Sandboxes::open(store.clone(), hosts, quota, Arc::new(clock.clone()), views.clone());
        let (sandboxes, writer) = opened.await.unwrap();
        tokio::spawn(writer);
        let checkpoints = Checkpoints::new(sandboxes.clone(), store.clone(), views.clone()).await.unwrap();
        let reconciler = Reconciler {
            sandboxes: sandboxes.clone(),
            checkpoints: checkpoints.clone(),
            previews: Previews::new(sandboxes.clone(), store.clone(), views.clone()).await.unwrap(),
            store: store.clone(),
            schedulers,
            scheduler_id: "only".into(),
            pace: Pace::default(),
        };
        Self { sandboxes, checkpoints, reconciler, host, store, clock, views, stop, directory }
    }

    /// The scheduler dies amid whatever it is doing; another one comes up.
    pub(super) async fn die_and_start_again(self) -> Self {
        self.sandboxes.flows.finish(Duration::ZERO).await;
        let (store, host, clock) = (self.store.clone(), self.host.clone(), self.clock.clone());
        let (stop, directory) = (self.stop.clone(), Arc::clone(&self.directory));
        drop(self);
        Self::around(store, host, clock, stop, directory).await
    }

    /// Looks at the host and at the records once, when the time of whoever else may be at it is over. Idle times are far
    /// longer.
    pub(super) async fn reconcile(&self) {
        self.clock.advance(Duration::from_secs(20));
        self.glance().await;
    }

    /// Looks at once.
    pub(super) async fn glance(&self) {
        until("the copies are current", async || {
            self.reconciler.schedulers.is_current() && self.checkpoints.records.is_current()
        })
        .await;
        self.sandboxes.list(TENANT).await;
        self.checkpoints.list(TENANT, "").await;
        self.reconciler.look_at_host(HOST).await;
        self.reconciler.look_at_records().await;
    }

    /// Another host joins, with the object store `object_store_id`.
    pub(super) async fn join(&self, host_id: &str, object_store_id: &str) -> FakeHost {
        self.join_as(host_id, object_store_id, KEY).await
    }

    /// As [`Mesh::join`], where other memories go on.
    pub(super) async fn join_as(&self, host_id: &str, object_store_id: &str, key: &str) -> FakeHost {
        self.join_with(member(host_id, object_store_id, key)).await
    }

    /// As [`Mesh::join`], with this record.
    pub(super) async fn join_with(&self, record: HostRecord) -> FakeHost {
        let endpoint = Endpoint::Unix(self.directory.path().join(&record.host_id));
        let host = FakeHost::serve(endpoint.clone(), Arc::new(self.clock.clone()), self.stop.clone()).await;
        let record = HostRecord { endpoint: endpoint.to_string(), ..record };
        let then = vec![record::put(keys::host(&record.host_id), &record)];
        self.store.txn(Txn { compare: vec![], then }).await.unwrap();
        until("it has joined", async || self.sandboxes.agents.hosts().get(&record.host_id).is_some()).await;
        host
    }

    /// Both hosts' object store has what the first one has, and that is known.
    pub(super) async fn upload(&self, other: &FakeHost) {
        let all = self.host.with(|state| {
            for snapshot in state.snapshots.values_mut() {
                snapshot.object_store_id = STORE.into();
            }
            state.store = state.snapshots.clone();
            state.store.clone()
        });
        other.with(|state| state.store = all);
        self.glance().await;
    }

    /// The host leaves the membership.
    pub(super) async fn lose_host(&self) {
        let then = vec![store::Op::Delete { key: keys::host(HOST) }];
        self.store.txn(Txn { compare: vec![], then }).await.unwrap();
        until("it has left", async || self.sandboxes.agents.hosts().get(HOST).is_none()).await;
    }

    /// It comes back.
    pub(super) async fn find_host(&self) {
        let endpoint = Endpoint::Unix(self.directory.path().join("agent.sock"));
        let record = HostRecord { endpoint: endpoint.to_string(), ..member(HOST, STORE, KEY) };
        let then = vec![record::put(keys::host(HOST), &record)];
        self.store.txn(Txn { compare: vec![], then }).await.unwrap();
        until("it is back", async || self.sandboxes.agents.hosts().get(HOST).is_some()).await;
    }

    /// A new sandbox.
    pub(super) async fn sandbox(&self) -> SandboxRecord {
        let mut order = validate::order(Default::default()).unwrap();
        order.envs = [("A".into(), "old".into())].into();
        order.timeout = 3600;
        self.sandboxes.create(TENANT, order).await.unwrap().record
    }

    /// A sandbox as it is stored.
    pub(super) async fn look(&self, id: &str) -> SandboxRecord {
        self.sandboxes.get(TENANT, id).await.unwrap()
    }

    pub(super) async fn take(&self, sandbox_id: &str, name: &str) -> Result<CheckpointRecord, Refusal> {
        self.take_as(sandbox_id, order(name, CheckpointKind::Full)).await
    }

    /// Takes a checkpoint, a while after the one before.
    pub(super) async fn take_as(&self, sandbox_id: &str, order: Order) -> Result<CheckpointRecord, Refusal> {
        self.clock.advance(Duration::from_millis(1));
        self.checkpoints.take(TENANT, sandbox_id, order).await
    }

    /// The names of the tenant's checkpoints.
    pub(super) async fn names(&self) -> Vec<String> {
        let listed = self.checkpoints.list(TENANT, "").await;
        listed.iter().map(|record| crate::checkpoints::shown(record).name).collect()
    }

    /// How many sandboxes are counted as the tenant's.
    pub(super) async fn counted(&self) -> i32 {
        let usage = record::get::<TenantUsage>(self.store.as_ref(), &keys::usage(TENANT)).await.unwrap();
        usage.map_or(0, |(usage, _)| usage.sandboxes)
    }

    /// How many microVMs the host has.
    pub(super) fn vms(&self) -> usize {
        self.host.with(|state| state.vms.len())
    }
}

/// The record of a host.
pub(super) fn member(host_id: &str, object_store_id: &str, key: &str) -> HostRecord {
    HostRecord {
        host_id: host_id.into(),
        templates: vec!["base".into()],
        max_sandboxes: 8,
        memory_capacity_mb: 65_536,
        disk_free_mb: 100_000,
        object_store_id: object_store_id.into(),
        snapshot_keys: vec![key.into()],
        base_digests: vec![BASE.into()],
        ..Default::default()
    }
}

pub(super) fn order(name: &str, kind: CheckpointKind) -> Order {
    Order::parse(name.into(), kind.into(), None).unwrap()
}

pub(super) fn wanted(count: usize, is_cold: bool) -> Wanted {
    let envs = [("A".into(), "new".into())].into();
    Wanted { count, is_cold, timeout: None, envs, metadata: Default::default() }
}

/// Waits for something to come true.
pub(super) async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let waits = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), waits).await.is_ok(), "not in time: {what}");
}

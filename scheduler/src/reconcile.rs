//! Makes what does exist agree with what should. Records say what should be, hosts what is; wherever a crash, a broken
//! connection or a lost machine left the two apart, looking at both again and again brings them together. Nothing here
//! remembers anything: it works the same after a restart.
//!
//! - Each host is asked what it has, every [`Pace::host`], and at once when it appears. A host is asked again only when
//!   the actions of the look before are done, and one that does not answer holds up no other.
//! - Records that need no host are looked at in the same rhythm: creates that nobody works on, deletes whose host is
//!   gone, old tombstones.
//! - Counts that disagree with the records are repaired, at start and every [`Pace::counts`].
//!
//! Records of a host that is gone stay as they are unless they are marked: it may come back with its sandboxes.
//! Several schedulers may reconcile at once: every action is idempotent or a compare-and-set.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use oc_mesh::{store::SharedStore, view::View};
use oc_proto::mesh::{SandboxRecord, SchedulerRecord, Vm};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    checkpoints::Checkpoints,
    ledger::drift,
    previews::Previews,
    reconcile::{
        act::Seen,
        plan::{Moment, judge_record, plan},
    },
    sandboxes::Sandboxes,
    telemetry,
};

mod act;
pub mod plan;

/// Actions that run at once for one host.
const AT_ONCE: usize = 8;

/// How often to look.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// At each host, and at the records.
    pub host: Duration,
    /// At the counts.
    pub counts: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { host: Duration::from_secs(2), counts: Duration::from_secs(30) }
    }
}

/// What reconciles.
#[derive(Clone, Debug)]
pub struct Reconciler {
    /// The sandboxes.
    pub sandboxes: Sandboxes,
    /// The checkpoints.
    pub checkpoints: Checkpoints,
    /// The previews.
    pub previews: Previews,
    /// The store, for the counts.
    pub store: SharedStore,
    /// The schedulers that are members.
    pub schedulers: View<SchedulerRecord>,
    /// Which of them this one is.
    pub scheduler_id: String,
    /// How often to look.
    pub pace: Pace,
}

impl Reconciler {
    /// Reconciles until `cancel`.
    pub async fn run(self, cancel: CancellationToken) {
        let mut looks: JoinSet<Option<String>> = JoinSet::new();
        // Which hosts are being looked at; `None` stands for the records.
        let mut busy: BTreeSet<Option<String>> = BTreeSet::new();
        let mut known: BTreeSet<String> = BTreeSet::new();
        let (mut tick, mut counts) = (interval(self.pace.host), interval(self.pace.counts));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        counts.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let hosts = self.sandboxes.agents.hosts().clone();
        let mut changes = hosts.changes();
        loop {
            let mut due: Vec<Option<String>> = Vec::new();
            tokio::select! {
                () = cancel.cancelled() => break,
                Some(done) = looks.join_next() => {
                    // A look that panicked frees its host, too: nothing else would.
                    match done {
                        Ok(host_id) => { busy.remove(&host_id); }
                        Err(error) => {
                            tracing::error!(%error, "a look ended badly");
                            if looks.is_empty() { busy.clear(); }
                        }
                    }
                    continue;
                }
                _ = counts.tick() => {
                    self.repair_counts().await;
                    continue;
                }
                _ = tick.tick() => {
                    due.push(None);
                    due.extend(hosts.all().into_iter().map(|(host_id, _)| Some(host_id)));
                    self.sandboxes.agents.forget_gone();
                }
                () = changes.next() => {
                    due.extend(hosts.all().into_iter().map(|(id, _)| id).filter(|id| !known.contains(id)).map(Some));
                }
            }
            known = hosts.all().into_iter().map(|(host_id, _)| host_id).collect();
            for host_id in due {
                if busy.insert(host_id.clone()) {
                    let this = self.clone();
                    looks.spawn(async move {
                        match &host_id {
                            Some(host_id) => this.look_at_host(host_id).await,
                            None => this.look_at_records().await,
                        }
                        host_id
                    });
                }
            }
        }
        // Each action is a compare-and-set or repeatable: cutting them off does no harm.
        looks.shutdown().await;
    }

    /// Compares one host with the records, once.
    pub async fn look_at_host(&self, host_id: &str) {
        // Before the host is asked: see [`plan`].
        let moment = self.moment();
        let records: BTreeMap<String, Arc<SandboxRecord>> =
            self.sandboxes.records.all().into_iter().collect();
        let checkpoints = self.checkpoints.of_host(host_id);
        let (vms, snapshots) = match self.sandboxes.agents.list_vms(host_id).await {
            Ok(listed) => listed,
            Err(error) => {
                telemetry::host_unreachable();
                tracing::warn!(host_id, %error, "host cannot be looked at");
                return;
            }
        };
        self.sandboxes.activity.note(&vms);
        let listed: BTreeMap<&str, &Vm> = vms.iter().map(|vm| (vm.sandbox_id.as_str(), vm)).collect();
        let actions = plan(host_id, &records, &vms, moment);
        stream::iter(actions)
            .for_each_concurrent(AT_ONCE, |(sandbox_id, action)| {
                let before = records.get(&sandbox_id).map(AsRef::as_ref);
                let seen = Seen { host_id, vm: listed.get(sandbox_id.as_str()).copied(), before };
                async move { self.sandboxes.reconcile_vm(&sandbox_id, action, seen, moment).await }
            })
            .await;
        self.checkpoints.look_at_host(host_id, &checkpoints, &snapshots, moment).await;
    }

    /// Looks at what follows from the records alone, once.
    pub async fn look_at_records(&self) {
        let moment = self.moment();
        let records = self.sandboxes.records.all();
        telemetry::sandboxes(records.iter().map(|(_, record)| record.state()));
        self.sandboxes.activity.retain(|sandbox_id| self.sandboxes.records.get(sandbox_id).is_some());
        let due = records.into_iter().filter_map(|(sandbox_id, record)| {
            let around = self.sandboxes.around(&sandbox_id, &record);
            Some((judge_record(&record, around, moment)?, sandbox_id))
        });
        stream::iter(due)
            .for_each_concurrent(AT_ONCE, |(action, sandbox_id)| async move {
                self.sandboxes.reconcile_record(&sandbox_id, action, moment).await;
            })
            .await;
        self.checkpoints.look_at_records(moment).await;
        self.previews.sweep().await;
    }

    /// Repairs counts that disagree with the records.
    pub async fn repair_counts(&self) {
        let records = self.sandboxes.records.all();
        let repaired = async {
            let records = records.iter().map(|(_, record)| record.as_ref());
            if !drift::is_suspected(self.store.as_ref(), records).await? {
                return Ok(0);
            }
            drift::repair(self.store.as_ref()).await
        };
        match repaired.await {
            Ok(repaired) => telemetry::counts_repaired(repaired),
            Err(error) => {
                let error: oc_mesh::store::StoreError = error;
                tracing::warn!(%error, "counts could not be compared");
            }
        }
    }

    fn moment(&self) -> Moment {
        let others = self.schedulers.all();
        let is_alone = self.schedulers.is_current() && others.iter().all(|(id, _)| *id == self.scheduler_id);
        Moment { now: self.sandboxes.clock.now(), is_alone }
    }
}

//! Making sandboxes of a state of another: all that are wanted, or none.
//!
//! ```text
//!   host takes the snapshot ──────┐
//!                                 ├─► host makes each microVM of it ─► write RUNNING ─► answer
//!   write each record, reserved ──┘                                       └─ one fails ─► end the others ─► refuse
//! ```
//!
//! Each is created as any other sandbox is, on the host that has the snapshot, or on another one that uses the object store
//! which has it, too. That of a sandbox that is forked is for use
//! at once, and removed when all have it.

use std::{collections::HashMap, time::Duration};

use futures_util::FutureExt as _;
use oc_proto::{
    mesh::{SandboxRecord, Snapshot, SnapshotSource},
    v1::{CheckpointKind, ForkMode},
};
use tokio::task::JoinSet;

use super::{Checkpoints, elsewhere::like_of, shown, source_of};
use crate::{
    fail, random,
    refusal::Refusal,
    sandbox_id::{self, SandboxId},
    sandboxes::{Sandboxes, create::Origin},
    validate::{self, Invalid, Order},
};

/// What the IDs of snapshots that are for use at once begin with.
const PREFIX: &str = "fk-";
/// How long a fork waits for a checkpoint that is being taken.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Sandboxes that may be asked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// How many.
    pub count: usize,
    /// Whether they boot from the disk.
    pub is_cold: bool,
    /// Their idle timeout, seconds; `None` for what is usual.
    pub timeout: Option<i32>,
    /// What their environment has beside that of their origin.
    pub envs: HashMap<String, String>,
    /// Attached to them.
    pub metadata: HashMap<String, String>,
}

impl Wanted {
    /// Parses what is to be made.
    ///
    /// # Errors
    ///
    /// [`Invalid`] for the first thing that is wrong.
    pub fn parse(
        count: Option<i32>,
        mode: i32,
        timeout: Option<i32>,
        envs: HashMap<String, String>,
        metadata: HashMap<String, String>,
    ) -> Result<Self, Invalid> {
        let is_cold = match ForkMode::try_from(mode) {
            Ok(ForkMode::Live) => false,
            Ok(ForkMode::Cold | ForkMode::Unspecified) => true,
            Err(_) => return Err(Invalid::Enumeration("mode")),
        };
        Ok(Self { count: validate::count(count)?, is_cold, timeout, envs, metadata })
    }
}

impl Checkpoints {
    /// Makes sandboxes of a tenant's checkpoint. Waits a while for one that is being taken.
    ///
    /// May be given up on: then they are deleted.
    ///
    /// # Errors
    ///
    /// [`Refusal::CheckpointNotFound`], [`Refusal::CheckpointNotReady`], [`Refusal::CheckpointHasNoMemory`]; quota,
    /// capacity; the host's reason. Then there is none of them.
    pub async fn fork(
        &self,
        tenant: &str,
        checkpoint_id: &str,
        wanted: Wanted,
    ) -> Result<Vec<SandboxRecord>, Refusal> {
        let record = self.ready(tenant, checkpoint_id).await?;
        let checkpoint = shown(&record);
        if !wanted.is_cold && checkpoint.kind() == CheckpointKind::DiskOnly {
            return Err(Refusal::CheckpointHasNoMemory);
        }
        let of = Order {
            template_id: checkpoint.template_id.clone(),
            size: oc_proto::mesh::VmSize {
                cpu_count: checkpoint.cpu_count,
                memory_mb: checkpoint.memory_mb,
                disk_mb: checkpoint.disk_mb,
            },
            timeout: validate::DEFAULT_TIMEOUT,
            envs: record.envs.clone(),
            metadata: Default::default(),
            egress: record.egress(),
            preview_token_hash: record.preview_token_hash.clone(),
        };
        let order = validate::fork_order(of, wanted.timeout, wanted.envs, wanted.metadata)?;
        let elsewhere = like_of(&record, wanted.is_cold);
        if elsewhere.is_none() {
            self.member(&checkpoint.worker_id)?;
        }
        let origin = Origin {
            host_id: checkpoint.worker_id.clone(),
            elsewhere,
            source: source_of(&checkpoint, wanted.is_cold),
            captured: futures_util::future::ready(Ok(Snapshot::default())).boxed().shared(),
            from_checkpoint_id: checkpoint.checkpoint_id.clone(),
            parent_id: checkpoint.checkpoint_id,
            forked_from: String::new(),
        };
        let (this, owner) = (self.clone(), tenant.to_owned());
        let flow = async move { this.make_all(&owner, wanted.count, order, origin).await };
        let sandboxes = self.sandboxes.clone();
        let abandoned = async move |made: Result<Vec<SandboxRecord>, Refusal>| {
            end_all(&sandboxes, made.unwrap_or_default()).await;
        };
        let made = self.sandboxes.flows.run(flow, abandoned).await.unwrap_or(Err(Refusal::Stopping));
        self.unless_deleted(tenant, checkpoint_id, made).await
    }

    /// Makes sandboxes of a tenant's sandbox as it is now; one that is hibernated wakes for it. Also returns what its host
    /// says of the snapshot that they are made of.
    ///
    /// May be given up on: then they are deleted.
    ///
    /// # Errors
    ///
    /// [`Refusal::SandboxNotFound`]; that it is over or does not wake; quota, capacity; the host's reason. Then there is
    /// none of them.
    pub async fn fork_sandbox(
        &self,
        tenant: &str,
        sandbox_id: &str,
        wanted: Wanted,
    ) -> Result<(Vec<SandboxRecord>, Snapshot), Refusal> {
        let found = self.sandboxes.find(tenant, sandbox_id).await?.record;
        let this = self.clone();
        // As a whole: what is taken down is removed, too, if its caller has gone away.
        let flow = async move { this.fork_found(found, wanted).await };
        let sandboxes = self.sandboxes.clone();
        let abandoned = async move |made: Result<(Vec<SandboxRecord>, Snapshot), Refusal>| {
            end_all(&sandboxes, made.map(|(made, _)| made).unwrap_or_default()).await;
        };
        self.sandboxes.flows.run(flow, abandoned).await.unwrap_or(Err(Refusal::Stopping))
    }

    async fn fork_found(
        &self,
        found: SandboxRecord,
        wanted: Wanted,
    ) -> Result<(Vec<SandboxRecord>, Snapshot), Refusal> {
        let sandbox = self.awake(found).await?;
        let of = Order {
            template_id: sandbox.template_id.clone(),
            size: sandbox.size.unwrap_or_default(),
            timeout: sandbox.timeout,
            envs: sandbox.envs.clone(),
            metadata: Default::default(),
            egress: sandbox.egress(),
            preview_token_hash: sandbox.preview_token_hash.clone(),
        };
        let order = validate::fork_order(of, wanted.timeout, wanted.envs, wanted.metadata)?;
        let snapshot_id = sandbox_id::random(PREFIX).map_err(|error| Refusal::Internal(error.to_string()))?;
        // Reconciliation takes it for one that nobody wants, else.
        let live = self.sandboxes.flows.enter(&snapshot_id);
        let source =
            SnapshotSource { snapshot_id: snapshot_id.clone(), disk_only: wanted.is_cold, wakes: false };
        let (this, of) = (self.clone(), source.clone());
        let host_id = sandbox.host_id.clone();
        let tenant = sandbox.tenant.clone();
        let forked_from = sandbox.sandbox_id.clone();
        let parent_id = sandbox.checkpoint_id.clone();
        let captured = async move {
            let captured = this.capture(&sandbox, of, true).await;
            fail::reached(fail::FORK_CAPTURED);
            captured
        };
        let captured = captured.boxed().shared();
        let origin = Origin {
            host_id: host_id.clone(),
            // It is for use at once, and in no store.
            elsewhere: None,
            source,
            captured: captured.clone(),
            from_checkpoint_id: String::new(),
            parent_id,
            forked_from,
        };
        // Begun before the first record is written, and not by whoever waits for it first.
        let (made, taken) = tokio::join!(self.make_all(&tenant, wanted.count, order, origin), captured);
        fail::reached(fail::FORK_MADE);
        let agents = self.sandboxes.agents.clone();
        self.sandboxes.flows.spawn(async move {
            let _live = live;
            if let Err(error) = agents.delete_snapshot(&host_id, &snapshot_id).await {
                tracing::info!(snapshot_id, %error, "what a fork was made of is reconciled later");
            }
            fail::reached(fail::FORK_REMOVED);
        });
        Ok((made?, taken?))
    }

    /// Makes `count` sandboxes of `origin`, or none.
    async fn make_all(
        &self,
        tenant: &str,
        count: usize,
        order: Order,
        origin: Origin,
    ) -> Result<Vec<SandboxRecord>, Refusal> {
        let mut makes = JoinSet::new();
        for _ in 0..count {
            let id = SandboxId::generate().map_err(|error| Refusal::Internal(error.to_string()))?;
            let (sandboxes, tenant) = (self.sandboxes.clone(), tenant.to_owned());
            let (order, origin) = (order.clone(), origin.clone());
            makes.spawn(async move { sandboxes.make_and_tell(&id, &tenant, order, Some(origin)).await });
        }
        let (mut made, mut failure) = (Vec::with_capacity(count), None);
        while let Some(ended) = makes.join_next().await {
            match ended {
                Ok(Ok(versioned)) => made.push(versioned.record),
                Ok(Err(refusal)) => failure = failure.or(Some(refusal)),
                Err(panic) => failure = Some(Refusal::Internal(panic.to_string())),
            }
        }
        match failure {
            None => Ok(made),
            Some(refusal) => {
                end_all(&self.sandboxes, made).await;
                Err(match refusal {
                    Refusal::Agent(error) => super::lost_or(error),
                    refusal => refusal,
                })
            }
        }
    }

    /// A tenant's checkpoint, once it is ready.
    async fn ready(
        &self,
        tenant: &str,
        checkpoint_id: &str,
    ) -> Result<oc_proto::mesh::CheckpointRecord, Refusal> {
        let waits = async {
            for attempt in 0.. {
                match self.usable(tenant, checkpoint_id, "").await {
                    Err(Refusal::CheckpointNotReady) => {
                        random::pause(Duration::from_millis(10), attempt).await;
                    }
                    settled => return settled,
                }
            }
            Err(Refusal::CheckpointNotReady)
        };
        let ready = tokio::time::timeout(READY_WITHIN, waits).await;
        ready.unwrap_or(Err(Refusal::CheckpointNotReady))
    }
}

/// Ends those of a fork that were made, if the others were not, or nobody waits for them.
async fn end_all(sandboxes: &Sandboxes, made: Vec<SandboxRecord>) {
    let ends = made.iter().map(|record| sandboxes.unwanted(&record.sandbox_id));
    futures_util::future::join_all(ends).await;
}

//! How the VM of a sandbox comes to run: from the pool, else by a restore, else by a boot; or from a snapshot.
//!
//! Each attempt has a deadline, and what it made is removed before the next one. Whatever exists at any moment
//! lies in the caller's `slot`, so a start may be dropped at any await.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::timeout;
use tracing::{info, warn};

use crate::{
    backend::Scion,
    capacity::Full,
    fail,
    journal::{Owner, Stage, StartPath},
    microvm::{Identity, Kind, MakeError, MicroVm},
    network::Egress,
    pool::{Pool, PutOff},
    telemetry,
    vm::tier::Paused,
    workshop::Workshop,
};

/// A guest of an adopted VM may be busy; only then is it given up.
const ADOPTION_DEADLINE: Duration = Duration::from_secs(60);
/// From the claim of a waiting clone to its guest's answer: milliseconds at rest.
const CLAIM_DEADLINE: Duration = Duration::from_secs(10);
/// A restore takes a fifth of a second at rest.
const CLONE_DEADLINE: Duration = Duration::from_secs(20);
/// A boot takes a few seconds under emulation at rest.
const BOOT_DEADLINE: Duration = Duration::from_secs(65);
/// The first use of a kind boots it, readies it and takes its snapshot: seconds. Together with a boot it must take less
/// than a caller waits.
const GOLDEN_DEADLINE: Duration = Duration::from_secs(45);
/// From a snapshot: as a clone, and its memory is read at the disk's pace.
const RESTORE_DEADLINE: Duration = Duration::from_secs(50);
/// Restores that are tried before the VM is booted instead.
const CLONE_ATTEMPTS: usize = 2;

/// What a create asks for.
#[derive(Clone, Debug)]
pub struct Order {
    /// Template and size.
    pub kind: Kind,
    /// Writable disk, MiB.
    pub disk_mb: u32,
    /// Environment of every command.
    pub envs: HashMap<String, String>,
    /// What it may reach.
    pub egress: Egress,
    /// The snapshot that it begins with, if any.
    pub source: Option<Source>,
}

/// A snapshot to begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// What it is called.
    pub snapshot_id: String,
    /// Whether only its disk is taken, which is booted.
    pub disk_only: bool,
    /// Whether it is the sandbox's own, taken while that was hibernated: it stays who it was.
    pub wakes: bool,
}

impl Source {
    /// How what is made of it was started.
    fn path(&self) -> StartPath {
        match (self.wakes, self.disk_only) {
            (false, false) => StartPath::Restored,
            (false, true) => StartPath::RestoredDisk,
            (true, false) => StartPath::Memory,
            (true, true) => StartPath::Disk,
        }
    }
}

impl Order {
    /// What the guest of `owner` is told.
    pub fn identity(&self, owner: &Owner) -> Identity {
        Identity { sandbox_id: owner.sandbox.to_string(), envs: self.envs.clone(), disk_mb: self.disk_mb }
    }
}

/// Where the VM of a sandbox comes from.
#[derive(Debug)]
pub enum Origin {
    /// A create; if it replaces the VM of an earlier epoch, that one goes first, or last if it begins with a snapshot:
    /// until it runs, the earlier one stays as it is.
    Create {
        /// What is asked for.
        order: Order,
        /// The VM that it replaces.
        predecessor: Option<super::handle::Vm>,
    },
    /// An earlier agent left it running.
    Adopt {
        /// Its home.
        microvm: MicroVm,
        /// How it was started.
        path: StartPath,
    },
    /// An earlier agent left it in the first tier of hibernation.
    Paused {
        /// Its home.
        microvm: MicroVm,
        /// How it was started.
        path: StartPath,
        /// What is known of it there.
        paused: Paused,
    },
    /// An earlier agent stored it.
    Stored {
        /// Its home.
        microvm: MicroVm,
        /// How it was started.
        path: StartPath,
        /// What its memory and devices take, bytes.
        stored_bytes: u64,
    },
    /// An earlier agent saw it fail.
    Failed {
        /// Its home.
        microvm: MicroVm,
        /// Why it failed.
        reason: String,
    },
}

impl Origin {
    /// What an earlier agent left, if that is where it comes from.
    pub fn microvm(&self) -> Option<&MicroVm> {
        match self {
            Self::Adopt { microvm, .. }
            | Self::Paused { microvm, .. }
            | Self::Stored { microvm, .. }
            | Self::Failed { microvm, .. } => Some(microvm),
            Self::Create { .. } => None,
        }
    }

    /// As [`Origin::microvm`], by value.
    pub fn into_microvm(self) -> Option<MicroVm> {
        match self {
            Self::Adopt { microvm, .. }
            | Self::Paused { microvm, .. }
            | Self::Stored { microvm, .. }
            | Self::Failed { microvm, .. } => Some(microvm),
            Self::Create { .. } => None,
        }
    }
}

/// Why a VM does not run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StartError {
    /// The host has no room.
    #[error(transparent)]
    Full(#[from] Full),
    /// There is no such template here.
    #[error("there is no template {0:?} on this host")]
    NoTemplate(String),
    /// There is no such snapshot here.
    #[error("there is no snapshot {0:?} on this host")]
    NoSnapshot(String),
    /// The snapshot holds no memory.
    #[error("snapshot {0:?} holds a disk alone")]
    NoMemory(String),
    /// The snapshot is no good.
    #[error("the snapshot cannot be used: {0}")]
    Unusable(String),
    /// Every way of starting it failed.
    #[error("the microVM could not be started: {0}")]
    Failed(String),
    /// A VM that an earlier agent left running does not any more.
    #[error("{0}")]
    Lost(String),
    /// The agent ends.
    #[error("the host's agent is shutting down")]
    Leaving,
}

/// Starts VMs.
#[derive(Debug)]
pub struct Starter {
    workshop: Arc<Workshop>,
    pool: Pool,
}

impl Starter {
    /// Starts VMs that `workshop` makes and `pool` keeps.
    pub fn new(workshop: Arc<Workshop>, pool: Pool) -> Self {
        Self { workshop, pool }
    }

    /// Holds back what the pool would do beside a start, until the guard is dropped.
    pub fn put_off_refill(&self) -> PutOff {
        self.pool.put_off_refill()
    }

    /// Takes over the VM in `slot` that an earlier agent left running.
    ///
    /// # Errors
    ///
    /// [`StartError::Lost`] says why it does not run any more; it is still in `slot` then.
    pub async fn adopt(&self, path: StartPath, slot: &mut Option<MicroVm>) -> Result<StartPath, StartError> {
        let Some(microvm) = slot else { return Err(StartError::Lost("it left nothing".into())) };
        match timeout(ADOPTION_DEADLINE, self.workshop.adopt(microvm)).await {
            Ok(Ok(())) => {
                info!(vm = microvm.id(), "adopted");
                Ok(path)
            }
            Ok(Err(error)) => Err(StartError::Lost(error.to_string())),
            Err(_) => Err(StartError::Lost("its guest does not answer the restarted agent".into())),
        }
    }

    /// Starts a VM for `owner`; when it returns `Ok`, its guest has answered and the journal says that it runs.
    ///
    /// # Errors
    ///
    /// [`StartError`]; what was made is still in `slot` then.
    pub async fn create(
        &self,
        owner: &Owner,
        order: &Order,
        slot: &mut Option<MicroVm>,
    ) -> Result<StartPath, StartError> {
        let _first = self.pool.put_off_refill();
        let watch = telemetry::Create::begin();
        let result = self.first_that_works(owner, order, slot).await;
        watch.end(&result);
        result
    }

    async fn first_that_works(
        &self,
        owner: &Owner,
        order: &Order,
        slot: &mut Option<MicroVm>,
    ) -> Result<StartPath, StartError> {
        let mut failures = Vec::new();
        if let Some(source) = &order.source {
            return self.start_of_snapshot(owner, order, source, slot, &mut failures).await;
        }
        if let Some(microvm) = self.pool.take(&order.kind) {
            let microvm = slot.insert(microvm);
            let claim = async {
                microvm.enter(Stage::Claimed(owner.clone()))?;
                microvm.instance().restrict(order.egress).await?;
                microvm.resume().await?;
                self.hand_over(owner, order, microvm, StartPath::Warm).await
            };
            let outcome = timeout(CLAIM_DEADLINE, claim).await;
            if self.settle(StartPath::Warm, outcome, slot, &mut failures).await? {
                return Ok(StartPath::Warm);
            }
        }
        let golden = timeout(GOLDEN_DEADLINE, self.workshop.golden(&order.kind)).await;
        let is_off = matches!(golden, Ok(Err(MakeError::SnapshotsOff)));
        if !is_off && self.settle(StartPath::Clone, golden, slot, &mut failures).await? {
            for _ in 0..CLONE_ATTEMPTS {
                let restore = async {
                    let microvm = self.workshop.create(Stage::Claimed(owner.clone()), slot).await?;
                    microvm.instance().restrict(order.egress).await?;
                    self.workshop.restore(&order.kind, microvm).await?;
                    microvm.resume().await?;
                    self.hand_over(owner, order, microvm, StartPath::Clone).await
                };
                let outcome = timeout(CLONE_DEADLINE, restore).await;
                if self.settle(StartPath::Clone, outcome, slot, &mut failures).await? {
                    return Ok(StartPath::Clone);
                }
            }
        }
        let boot = async {
            let microvm = self.workshop.create(Stage::Claimed(owner.clone()), slot).await?;
            microvm.instance().restrict(order.egress).await?;
            self.workshop.boot(&order.kind, microvm).await?;
            self.hand_over(owner, order, microvm, StartPath::Cold).await
        };
        let outcome = timeout(BOOT_DEADLINE, boot).await;
        if self.settle(StartPath::Cold, outcome, slot, &mut failures).await? {
            return Ok(StartPath::Cold);
        }
        Err(StartError::Failed(failures.join("; ")))
    }

    /// Starts a VM from a snapshot, as it says or not at all.
    async fn start_of_snapshot(
        &self,
        owner: &Owner,
        order: &Order,
        source: &Source,
        slot: &mut Option<MicroVm>,
        failures: &mut Vec<String>,
    ) -> Result<StartPath, StartError> {
        let path = source.path();
        let deadline = if source.disk_only { BOOT_DEADLINE } else { RESTORE_DEADLINE };
        if let Some(microvm) = self.clone_for_snapshot(source, &order.kind) {
            let microvm = slot.insert(microvm);
            let graft = async {
                microvm.enter(Stage::Claimed(owner.clone()))?;
                microvm.instance().restrict(order.egress).await?;
                microvm.instance().graft(Scion::Snapshot(&source.snapshot_id), &order.kind).await?;
                fail::pass(fail::CREATE_GRAFTED, microvm.id())?;
                microvm.resume().await?;
                self.hand_over(owner, order, microvm, path).await
            };
            let outcome = timeout(CLONE_DEADLINE, graft).await;
            if self.settle(path, outcome, slot, failures).await? {
                return Ok(path);
            }
        }
        for _ in 0..CLONE_ATTEMPTS {
            let start = async {
                let microvm = self.workshop.create(Stage::Claimed(owner.clone()), slot).await?;
                microvm.instance().restrict(order.egress).await?;
                let id = &source.snapshot_id;
                if source.disk_only {
                    telemetry::step("boot", microvm.instance().boot_snapshot(id, &order.kind)).await?;
                } else {
                    telemetry::step("restore", microvm.instance().restore_snapshot(id, &order.kind)).await?;
                    microvm.resume().await?;
                }
                self.hand_over(owner, order, microvm, path).await
            };
            let outcome = timeout(deadline, start).await;
            if self.settle(path, outcome, slot, failures).await? {
                return Ok(path);
            }
        }
        Err(StartError::Failed(failures.join("; ")))
    }

    fn clone_for_snapshot(&self, source: &Source, kind: &Kind) -> Option<MicroVm> {
        if source.disk_only {
            return None;
        }
        self.clone_for(Scion::Snapshot(&source.snapshot_id), kind)
    }

    /// A clone that waits, if one is better than a new VM for a state.
    pub fn clone_for(&self, scion: Scion<'_>, kind: &Kind) -> Option<MicroVm> {
        self.workshop.backend().grafts(scion, kind).then(|| self.pool.take(kind)).flatten()
    }

    /// Tells the guest whose it is, unless it knows, and then the journal that it runs.
    async fn hand_over(
        &self,
        owner: &Owner,
        order: &Order,
        microvm: &MicroVm,
        path: StartPath,
    ) -> Result<(), MakeError> {
        fail::pass(fail::CREATE_RESUMED, microvm.id())?;
        match &order.source {
            Some(Source { wakes: true, disk_only: false, .. }) => microvm.wake_guest().await?,
            _ => microvm.activate(order.identity(owner)).await?,
        }
        fail::pass(fail::CREATE_ACTIVATED, microvm.id())?;
        microvm.enter(Stage::Running { owner: owner.clone(), path })?;
        fail::reached(fail::CREATE_JOURNALLED, microvm.id());
        Ok(())
    }

    /// Whether an attempt worked. If not, removes what it made and notes why; an error that no other attempt
    /// could mend ends the start.
    async fn settle<T>(
        &self,
        path: StartPath,
        outcome: Result<Result<T, MakeError>, tokio::time::error::Elapsed>,
        slot: &mut Option<MicroVm>,
        failures: &mut Vec<String>,
    ) -> Result<bool, StartError> {
        let error = match outcome {
            Ok(Ok(_)) => return Ok(true),
            Ok(Err(MakeError::NoTemplate(name))) => return Err(StartError::NoTemplate(name)),
            Ok(Err(MakeError::NoSnapshot(id))) => return Err(StartError::NoSnapshot(id)),
            Ok(Err(MakeError::NoMemory(id))) => return Err(StartError::NoMemory(id)),
            Ok(Err(MakeError::Unusable(reason))) => return Err(StartError::Unusable(reason)),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "not done in time".to_owned(),
        };
        if let Some(microvm) = slot.take() {
            warn!(path = path.as_str(), %error, vm = microvm.id(), console = microvm.console_tail(), "start failed");
            // Back into the slot until it is gone, so that dropping this future here leaves it with the caller.
            slot.insert(microvm).destroy().await;
            *slot = None;
        } else {
            warn!(path = path.as_str(), %error, "start failed");
        }
        telemetry::attempt_failed(path);
        failures.push(format!("{}: {error}", path.as_str()));
        Ok(false)
    }
}

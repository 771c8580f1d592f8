//! All sandboxes of this host: who they are, and how they come, go, and survive the agent.
//!
//! The registry maps each sandbox to the one task that owns its VM. A create for a sandbox that is there joins
//! what is under way; one of a later epoch replaces it; one of an earlier epoch, or of one that was deleted here,
//! is refused. All of that is decided under one lock that is never held over an await.

pub mod paused;
pub mod recovery;

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    backend::{Captured, Wanted, Whole},
    capacity::{self, Full, Limits, Room},
    identity::{Epoch, SandboxId},
    journal::{Owner, StartPath},
    microvm::MakeError,
    pool::Pool,
    tombstones::{self, Tombstones},
    vm::{
        decide::{Denied, Phase},
        handle::{Hibernated, Vm, VmError},
        shelves::Shelves,
        start::{Order, Origin, StartError, Starter},
        task::Surroundings,
        tier::Policy,
    },
    workshop::Workshop,
};

/// VMs of the first tier that are captured at once: they share the disk with those that run.
const CAPTURES_AT_ONCE: usize = 2;

/// The sandboxes of this host. Clones of this handle are the same host.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    workshop: Arc<Workshop>,
    surroundings: Surroundings,
    limits: Limits,
    vms: Mutex<HashMap<SandboxId, Vm>>,
}

/// What is known of one sandbox's VM.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Whose it is.
    pub owner: Owner,
    /// Where it is in its life.
    pub phase: Phase,
    /// Why it is lost.
    pub failure: Option<Arc<str>>,
    /// When it was last used.
    pub active_at: SystemTime,
    /// What its memory and devices take while it is stored, bytes.
    pub stored_bytes: u64,
    /// The snapshot of it while it sleeps, if there is to be one.
    pub shelved: Option<Arc<str>>,
}

impl Host {
    /// A host without sandboxes yet; [`Host::recover`] finds those that an earlier agent left.
    ///
    /// # Errors
    ///
    /// If the tombstones cannot be read.
    pub fn open(workshop: Arc<Workshop>, pool: Pool, limits: Limits, policy: Policy) -> io::Result<Self> {
        let tombstones = Tombstones::open(workshop.data_dir().join(tombstones::FILE))?;
        let surroundings = Surroundings {
            starter: Arc::new(Starter::new(workshop.clone(), pool)),
            tombstones: Arc::new(Mutex::new(tombstones)),
            policy,
            captures: Arc::new(Semaphore::new(CAPTURES_AT_ONCE)),
            shelves: policy.uploads.then(|| Shelves::new(workshop.clone(), limits)),
            leave: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        Ok(Self(Arc::new(Inner { workshop, surroundings, limits, vms: Mutex::default() })))
    }

    /// Makes the sandbox's VM and waits until its guest has answered. If the caller goes away, it is made all
    /// the same, or undone if that fails; not, if a snapshot is still being fetched for it.
    ///
    /// # Errors
    ///
    /// [`VmError`]; after a failed start the same epoch may be tried again.
    pub async fn create(&self, owner: Owner, order: Order) -> Result<StartPath, VmError> {
        let epoch = owner.epoch;
        self.provide(&owner, &order).await?;
        let vm = loop {
            match self.find_or_begin(owner.clone(), order.clone()) {
                Err(VmError::Start(StartError::Full(Full::Memory { .. })))
                    if self.end_oldest_paused().await => {}
                found => break found?,
            }
        };
        vm.join(epoch).await
    }

    /// Sees that the snapshot is here that a VM is to be made of which is not there yet.
    async fn provide(&self, owner: &Owner, order: &Order) -> Result<(), StartError> {
        let is_there = || self.find(&owner.sandbox).is_some_and(|vm| vm.owner().epoch >= owner.epoch);
        let Some(source) = order.source.as_ref().filter(|_| !is_there()) else { return Ok(()) };
        let provided = self.0.workshop.backend().provide_snapshot(&source.snapshot_id).await;
        provided.map_err(|error| match error {
            MakeError::NoSnapshot(id) => StartError::NoSnapshot(id),
            MakeError::Unusable(reason) => StartError::Unusable(reason),
            error => {
                warn!(%error, snapshot_id = source.snapshot_id, "cannot fetch a snapshot");
                StartError::Failed(error.to_string())
            }
        })
    }

    fn find_or_begin(&self, owner: Owner, order: Order) -> Result<Vm, VmError> {
        let mut vms = self.0.vms.lock();
        let predecessor = match vms.get(&owner.sandbox) {
            Some(vm) if vm.owner().epoch >= owner.epoch => return Ok(vm.clone()),
            Some(vm) => Some(vm.clone()),
            None => {
                let buried = self.0.surroundings.tombstones.lock().get(&owner.sandbox);
                if let Some(held) = buried
                    && owner.epoch <= held
                {
                    return Err(Denied::StaleEpoch { given: owner.epoch, held }.into());
                }
                self.admit(awake(&vms))?;
                None
            }
        };
        if !self.0.workshop.has_template(&order.kind.template) {
            return Err(StartError::NoTemplate(order.kind.template).into());
        }
        let vm = self.begin(owner.clone(), Origin::Create { order, predecessor });
        vms.insert(owner.sandbox, vm.clone());
        Ok(vm)
    }

    fn admit(&self, sandboxes: usize) -> Result<(), StartError> {
        match self.measure() {
            Some(room) => Ok(self.0.limits.admit(sandboxes, room)?),
            None => Ok(()),
        }
    }

    /// What the host has. One that cannot be measured is not known to be short of anything.
    fn measure(&self) -> Option<Room> {
        let measured = capacity::measure(self.0.workshop.data_dir());
        measured.inspect_err(|error| warn!(%error, "cannot measure the host; going on all the same")).ok()
    }

    /// Begins the task of a VM. The caller puts it into the registry, under the lock that it holds.
    fn begin(&self, owner: Owner, origin: Origin) -> Vm {
        let host = self.clone();
        Vm::spawn(&self.0.surroundings, owner, origin, move |vm, reinstated| {
            let mut vms = host.0.vms.lock();
            if vms.get(&vm.owner().sandbox).is_some_and(|listed| listed.is(vm)) {
                vms.remove(&vm.owner().sandbox);
                // One that has ended by itself meanwhile has been here to leave, in vain.
                if let Some(earlier) = reinstated.filter(|earlier| earlier.status().phase != Phase::Gone) {
                    vms.insert(earlier.owner().sandbox.clone(), earlier);
                }
            }
        })
    }

    /// Ends a sandbox's VM and waits until nothing of it is left. Fine if there is none.
    ///
    /// # Errors
    ///
    /// [`Denied`]: the epoch is too old, or the sandbox was used after `idle_since`.
    pub async fn delete(
        &self,
        sandbox: &SandboxId,
        epoch: Epoch,
        idle_since: Option<SystemTime>,
    ) -> Result<(), VmError> {
        // A task that ended by itself just then has not heard of the deletion, so look until there is none.
        let mut deleted = false;
        while let Some(vm) = self.find_or_bury(sandbox, epoch) {
            match vm.delete(epoch, idle_since).await {
                Ok(()) => {
                    self.bury(sandbox, epoch);
                    deleted = true;
                }
                // What the caller meant is gone, and somebody has made a later one since.
                Err(VmError::Denied(Denied::StaleEpoch { .. })) if deleted => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Puts a sandbox's VM to sleep, in the first tier if the host can spare the memory, and waits until it sleeps for good.
    /// `None` if there is no such VM.
    ///
    /// # Errors
    ///
    /// [`VmError`] says why it runs on.
    pub async fn hibernate(
        &self,
        sandbox: &SandboxId,
        epoch: Epoch,
        idle_since: Option<SystemTime>,
    ) -> Result<Option<Hibernated>, VmError> {
        let Some(vm) = self.find(sandbox) else { return Ok(None) };
        let room = self.measure();
        if vm.status().phase == Phase::Running {
            self.admit_to_disk(room)?;
        }
        let tier = self.0.surroundings.policy.tier(&self.0.limits, self.processes(), room);
        vm.hibernate(epoch, idle_since, tier).await.map(Some)
    }

    /// Takes the state of a sandbox's VM down as a snapshot. One of that name is returned as it is. `None` if there is no
    /// such VM.
    ///
    /// # Errors
    ///
    /// [`VmError`]: there is no snapshot.
    pub async fn capture(
        &self,
        sandbox: &SandboxId,
        epoch: Epoch,
        wanted: Wanted,
    ) -> Result<Option<Captured>, VmError> {
        let id = &wanted.snapshot_id;
        if let Some(there) = self.snapshots().into_iter().find(|captured| captured.snapshot_id == *id) {
            return Ok(Some(there));
        }
        let Some(vm) = self.find(sandbox) else { return Ok(None) };
        self.admit_to_disk(self.measure())?;
        vm.capture(epoch, wanted).await.map(Some)
    }

    /// The snapshots that are whole.
    pub fn snapshots(&self) -> Vec<Captured> {
        self.0.workshop.backend().snapshots()
    }

    /// Removes a snapshot. Fine if there is none.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if it resists.
    pub async fn delete_snapshot(&self, snapshot_id: &str) -> Result<(), MakeError> {
        self.0.workshop.backend().delete_snapshot(snapshot_id).await
    }

    /// Reads all of a snapshot, wherever it is, and compares it with its digests.
    ///
    /// # Errors
    ///
    /// [`MakeError`] says what is damaged.
    pub async fn verify_snapshot(&self, snapshot_id: &str) -> Result<Whole, MakeError> {
        self.0.workshop.backend().verify_snapshot(snapshot_id).await
    }

    /// Makes a sandbox's stored VM run again and waits until its guest has answered. `None` if there is no such VM.
    ///
    /// # Errors
    ///
    /// [`VmError`] says why it does not run.
    pub async fn wake(
        &self,
        sandbox: &SandboxId,
        epoch: Epoch,
        order: &Order,
    ) -> Result<Option<StartPath>, VmError> {
        let Some(vm) = self.find(sandbox) else { return Ok(None) };
        while vm.status().phase == Phase::Hibernated {
            let awake = awake(&self.0.vms.lock());
            // One of the first tier has its memory.
            let admitted = match vm.candidate() {
                Some(_) => self.0.limits.admit_beside(awake).map_err(StartError::from),
                None => self.admit(awake),
            };
            match admitted {
                Err(StartError::Full(Full::Memory { .. })) if self.end_oldest_paused().await => {}
                admitted => {
                    admitted?;
                    break;
                }
            }
        }
        vm.wake(epoch, order).await.map(Some)
    }

    fn admit_to_disk(&self, room: Option<Room>) -> Result<(), StartError> {
        match room {
            Some(room) => Ok(self.0.limits.admit_to_disk(room)?),
            None => Ok(()),
        }
    }

    fn find_or_bury(&self, sandbox: &SandboxId, epoch: Epoch) -> Option<Vm> {
        let vms = self.0.vms.lock();
        let vm = vms.get(sandbox).cloned();
        if vm.is_none() {
            // Under the lock, so that no delayed create slips in between.
            self.bury(sandbox, epoch);
        }
        vm
    }

    /// Remembers a deletion.
    fn bury(&self, sandbox: &SandboxId, epoch: Epoch) {
        if let Err(error) = self.0.surroundings.tombstones.lock().add(sandbox, epoch) {
            warn!(%error, "cannot write down the deletion");
        }
    }

    /// The sandbox's VM.
    pub fn find(&self, sandbox: &SandboxId) -> Option<Vm> {
        self.0.vms.lock().get(sandbox).cloned()
    }

    /// Every sandbox's VM, in no order.
    pub fn list(&self, now: SystemTime) -> Vec<Listed> {
        let vms: Vec<Vm> = self.0.vms.lock().values().cloned().collect();
        vms.into_iter()
            .map(|vm| {
                let status = vm.status();
                Listed {
                    owner: vm.owner().clone(),
                    phase: status.phase,
                    failure: status.failure,
                    active_at: vm.last_used(now),
                    stored_bytes: status.stored_bytes,
                    shelved: status.shelved,
                }
            })
            .filter(|listed| listed.phase != Phase::Gone)
            .collect()
    }

    /// Lets go of every VM: those that run go on, starts are undone, deletions are finished. Waits `patience`.
    pub async fn leave(&self, patience: Duration) {
        self.0.surroundings.leave.cancel();
        self.0.surroundings.tasks.close();
        if timeout(patience, self.0.surroundings.tasks.wait()).await.is_err() {
            warn!("some VMs are not settled; the next start will finish that");
        } else {
            info!("let go of every VM");
        }
    }
}

/// VMs that take more of the host than disk.
fn awake(vms: &HashMap<SandboxId, Vm>) -> usize {
    vms.values().filter(|vm| vm.status().phase != Phase::Hibernated).count()
}

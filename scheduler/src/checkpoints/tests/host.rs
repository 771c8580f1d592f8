//! A host that runs nothing: it keeps what it was asked to make, and fails as it is told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use oc_mesh::{
    clock::SharedClock,
    endpoint::Endpoint,
    error::{Reason, status},
    serve::Serve,
};
use oc_proto::mesh::{
    agent_service_server::{AgentService, AgentServiceServer},
    *,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

use super::mesh::{BASE, KEY};

/// How the host does what it is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Mood {
    /// It does it.
    #[default]
    Willing,
    /// It refuses.
    Refusing(Reason),
    /// It does not do it, and does not answer either.
    Hanging,
    /// It does it and does not answer.
    Mute,
    /// It does it once it is [told to go on](FakeHost::go_on).
    Late,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) vms: BTreeMap<String, Vm>,
    pub(super) snapshots: BTreeMap<String, Snapshot>,
    /// What its object store has.
    pub(super) store: BTreeMap<String, Snapshot>,
    pub(super) damaged: BTreeSet<String>,
    pub(super) capture: Mood,
    pub(super) create: Mood,
    /// Whether it refuses to remove snapshots.
    pub(super) delete: Mood,
    /// How many more it makes before it refuses; any number where absent.
    pub(super) creates_left: Option<usize>,
    /// The snapshots that were for use at once.
    pub(super) ephemeral: Vec<String>,
    /// What it made something of, and whether of the disk alone.
    pub(super) used: Vec<SnapshotSource>,
}

/// The host.
#[derive(Clone, Debug)]
pub(super) struct FakeHost {
    state: Arc<Mutex<State>>,
    silent: Arc<Notify>,
    may_go_on: watch::Sender<bool>,
    clock: SharedClock,
}

impl FakeHost {
    /// Serves it at `listen` until `stop`.
    pub(super) async fn serve(listen: Endpoint, clock: SharedClock, stop: CancellationToken) -> Self {
        let this = Self {
            state: Arc::default(),
            silent: Arc::default(),
            may_go_on: watch::Sender::new(false),
            clock,
        };
        let serve = Serve {
            listen,
            routes: Routes::new(AgentServiceServer::new(this.clone())),
            max_concurrent: 1000,
            max_deadline: Duration::from_secs(60),
            shutdown: stop,
        };
        let bound = serve.bind().await.unwrap();
        tokio::spawn(async move { bound.run().await.unwrap() });
        this
    }

    /// Looks at it, or changes it.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock())
    }

    /// Waits until it keeps somebody waiting.
    pub(super) async fn has_gone_silent(&self) {
        tokio::time::timeout(Duration::from_secs(20), self.silent.notified()).await.unwrap();
    }

    /// Lets it do what it is late with.
    pub(super) fn go_on(&self) {
        self.may_go_on.send_replace(true);
    }

    /// Does `work` as `mood` says.
    async fn perform<T>(
        &self,
        mood: Mood,
        work: impl FnOnce(&mut State) -> Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        let done = match mood {
            Mood::Refusing(reason) => return Err(status(reason, "as told")),
            Mood::Hanging => None,
            Mood::Late => {
                self.silent.notify_one();
                self.may_go_on
                    .subscribe()
                    .wait_for(|may| *may)
                    .await
                    .map_err(|_| Status::cancelled("gone"))?;
                return self.with(work).map(Response::new);
            }
            Mood::Willing | Mood::Mute => Some(self.with(work)?),
        };
        match done {
            Some(done) if mood == Mood::Willing => Ok(Response::new(done)),
            _ => {
                self.silent.notify_one();
                std::future::pending().await
            }
        }
    }
}

#[tonic::async_trait]
impl AgentService for FakeHost {
    async fn create_vm(
        &self,
        request: Request<CreateVmRequest>,
    ) -> Result<Response<CreateVmResponse>, Status> {
        let request = request.into_inner();
        let mood = self.with(|state| state.create);
        self.perform(mood, |state| {
            let held = state.vms.get(&request.sandbox_id).map(|vm| vm.epoch);
            if held < Some(request.epoch) {
                if let Some(left) = &mut state.creates_left {
                    *left = left.checked_sub(1).ok_or_else(|| status(Reason::StartFailed, "enough"))?;
                }
                if let Some(source) = &request.snapshot {
                    if let Some(put) = state.store.get(&source.snapshot_id) {
                        state.snapshots.entry(source.snapshot_id.clone()).or_insert_with(|| put.clone());
                    }
                    if !state.snapshots.contains_key(&source.snapshot_id) {
                        return Err(status(Reason::SnapshotNotFound, "there is no such snapshot"));
                    }
                    state.used.push(source.clone());
                }
                let vm = Vm {
                    sandbox_id: request.sandbox_id.clone(),
                    epoch: request.epoch,
                    state: VmState::Running.into(),
                    active_at: Some(self.clock.now().into()),
                    ..Default::default()
                };
                state.vms.insert(request.sandbox_id, vm);
            }
            let start_path = match request.snapshot {
                None => StartPath::Cold,
                Some(source) if source.disk_only => StartPath::RestoredDisk,
                Some(_) => StartPath::Restored,
            };
            Ok(CreateVmResponse { start_path: start_path.into(), ..Default::default() })
        })
        .await
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let request = request.into_inner();
        self.with(|state| {
            if state.vms.get(&request.sandbox_id).is_some_and(|vm| vm.epoch <= request.epoch) {
                state.vms.remove(&request.sandbox_id);
            }
        });
        Ok(Response::new(DeleteVmResponse::default()))
    }

    async fn hibernate_vm(
        &self,
        request: Request<HibernateVmRequest>,
    ) -> Result<Response<HibernateVmResponse>, Status> {
        self.with(|state| {
            let vm = state.vms.get_mut(&request.get_ref().sandbox_id).unwrap();
            vm.state = VmState::Hibernated.into();
        });
        Ok(Response::new(HibernateVmResponse { stored_bytes: 7, ..Default::default() }))
    }

    async fn wake_vm(&self, request: Request<WakeVmRequest>) -> Result<Response<WakeVmResponse>, Status> {
        self.with(|state| {
            let vm = state.vms.get_mut(&request.get_ref().sandbox_id).unwrap();
            vm.state = VmState::Running.into();
        });
        Ok(Response::new(WakeVmResponse::default()))
    }

    async fn capture_vm(
        &self,
        request: Request<CaptureVmRequest>,
    ) -> Result<Response<CaptureVmResponse>, Status> {
        let request = request.into_inner();
        let mood = self.with(|state| state.capture);
        self.perform(mood, |state| {
            let vm = state.vms.get(&request.sandbox_id);
            let vm = vm.ok_or_else(|| status(Reason::SandboxNotFound, "there is no such microVM"))?;
            if vm.epoch != request.epoch {
                return Err(status(Reason::StaleEpoch, "of another epoch"));
            }
            if vm.state() != VmState::Running {
                return Err(status(Reason::SandboxNotReady, "it does not run"));
            }
            let snapshot = Snapshot {
                snapshot_id: request.snapshot_id.clone(),
                has_memory: !request.disk_only,
                is_quiesced: true,
                size_bytes: 4096,
                pause_us: 1500,
                freeze_us: 20,
                manifest_digest: "d1".into(),
                created_at: Some(self.clock.now().into()),
                snapshot_key: KEY.into(),
                base_digest: BASE.into(),
                ..Default::default()
            };
            state.snapshots.insert(request.snapshot_id.clone(), snapshot.clone());
            if request.is_ephemeral {
                state.ephemeral.push(request.snapshot_id);
            }
            Ok(CaptureVmResponse { snapshot: Some(snapshot) })
        })
        .await
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let id = request.into_inner().snapshot_id;
        self.with(|state| {
            if let Mood::Refusing(reason) = state.delete {
                return Err(status(reason, "as told"));
            }
            state.snapshots.remove(&id);
            state.store.remove(&id);
            Ok(())
        })?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn verify_snapshot(
        &self,
        request: Request<VerifySnapshotRequest>,
    ) -> Result<Response<VerifySnapshotResponse>, Status> {
        let id = request.into_inner().snapshot_id;
        self.with(|state| {
            let is_put = state.store.contains_key(&id);
            if !is_put && !state.snapshots.contains_key(&id) {
                return Err(status(Reason::SnapshotNotFound, "there is no such snapshot"));
            }
            if state.damaged.contains(&id) {
                return Err(status(Reason::CheckpointDamaged, "memory.img differs"));
            }
            Ok(Response::new(VerifySnapshotResponse {
                verified_bytes: if state.snapshots.contains_key(&id) { 4096 } else { 0 },
                uploaded_bytes: if is_put { 4096 } else { 0 },
            }))
        })
    }

    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        Ok(Response::new(self.with(|state| ListVmsResponse {
            vms: state.vms.values().cloned().collect(),
            snapshots: state.snapshots.values().cloned().collect(),
        })))
    }
}

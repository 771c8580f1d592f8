//! A host without any VMM: its "processes" and "homes" live in memory, outlive every agent that the tests start
//! and drop, and can be told to fail, to wait, or to stop the agent at any step.

#![allow(clippy::expect_used)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use oc_proto::{
    mesh::{
        ActivateRequest, ActivateResponse, QuiesceRequest, QuiesceResponse, WakeRequest, WakeResponse,
        guest_service_server::{GuestService, GuestServiceServer},
    },
    v1::{
        exec_service_server::{ExecService, ExecServiceServer},
        *,
    },
};
use oc_vmm_agent::{
    backend::{
        Backend, Captured, Circumstances, Condition, Guest, Instance, Scion, Startable, Wanted, Whole,
    },
    capacity::Limits,
    host::Host,
    identity::{Epoch, SandboxId},
    journal::Owner,
    microvm::{Kind, MakeError},
    network::Egress,
    pool::{Pool, Settings},
    vm::{start::Order, tier::Policy},
    workshop::Workshop,
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tower::{ServiceExt as _, util::BoxCloneSyncService};

pub const DEADLINE: Duration = Duration::from_secs(20);

/// The host that outlives its agents.
#[derive(Debug, Default)]
pub struct World {
    pub vms: Mutex<HashMap<String, FakeVm>>,
    /// Steps taken so far, and the one at which the agent is stopped for good.
    steps: AtomicUsize,
    crash_at: AtomicUsize,
    pub crashed: Notify,
    /// How many of the next restores and boots fail.
    pub failing_restores: AtomicUsize,
    pub failing_boots: AtomicUsize,
    pub failing_goldens: AtomicBool,
    /// How many of the next attempts to store a VM fail, and how many stored memories are found damaged.
    pub failing_stores: AtomicUsize,
    pub damaged_memories: AtomicUsize,
    /// How often storing a VM was begun, and whether it waits then.
    pub stores: AtomicUsize,
    pub store_waits: AtomicBool,
    /// How many of the next guests do not answer when they are woken.
    pub failing_wakes: AtomicUsize,
    /// How many of the next guests do not stand still when they are told to.
    pub restless: AtomicUsize,
    /// What was taken of VMs, by name.
    pub snapshots: Mutex<BTreeMap<String, Captured>>,
    /// What other hosts have put into the object store; one that is damaged there is `None`.
    pub store: Mutex<BTreeMap<String, Option<Captured>>>,
    /// How many of the next captures fail, and how many snapshots are found damaged.
    pub failing_captures: AtomicUsize,
    pub damaged_snapshots: AtomicUsize,
    /// Clones that took a snapshot on, and how many of the next ones fail to.
    pub grafts: AtomicUsize,
    pub failing_grafts: AtomicUsize,
    /// While true, goldens are waited for.
    pub golden_waits: AtomicBool,
    pub released: Notify,
    /// Every activation: (vm, request).
    pub activations: Mutex<Vec<(String, ActivateRequest)>>,
    pub made: AtomicUsize,
    /// What no guest reaches.
    pub secluded: watch::Sender<BTreeSet<SocketAddr>>,
}

#[derive(Debug, Default)]
pub struct FakeVm {
    pub process: Option<Process>,
    /// What it may reach.
    pub egress: Egress,
    /// Grows whenever its guest may have written to it.
    disk: Arc<AtomicUsize>,
    /// What is stored of its memory: its sandbox, and the disk that it was stored with.
    stored: Option<(String, usize)>,
}

#[derive(Clone, Debug)]
pub struct Process {
    pub exit: CancellationToken,
    pub paused: Arc<AtomicBool>,
    pub sandbox: Arc<Mutex<String>>,
    pub deaf: Arc<AtomicBool>,
}

impl World {
    pub fn new() -> Arc<Self> {
        let world = Self::default();
        world.crash_at.store(usize::MAX, Ordering::SeqCst);
        Arc::new(world)
    }

    /// The agent makes no further step after `steps` more.
    pub fn crash_after(&self, steps: usize) {
        self.steps.store(0, Ordering::SeqCst);
        self.crash_at.store(steps, Ordering::SeqCst);
    }

    pub fn never_crash(&self) {
        self.crash_at.store(usize::MAX, Ordering::SeqCst);
    }

    /// The machine fails: every process is gone. The agent is, too.
    pub fn power_off(&self) {
        for process in self.vms.lock().values().filter_map(|vm| vm.process.as_ref()) {
            process.exit.cancel();
        }
    }

    /// One thing that the agent does to the host: before it and after it are instants at which it may die.
    async fn step(&self) {
        if self.steps.fetch_add(1, Ordering::SeqCst) >= self.crash_at.load(Ordering::SeqCst) {
            self.crashed.notify_one();
            std::future::pending::<()>().await;
        }
        tokio::task::yield_now().await;
    }

    /// Sandboxes whose guests run, by what they were last told.
    pub fn sandboxes(&self) -> BTreeSet<String> {
        let vms = self.vms.lock();
        let named =
            vms.values().filter_map(|vm| vm.process.as_ref()).filter(|process| !process.exit.is_cancelled());
        named.map(|process| process.sandbox.lock().clone()).filter(|name| !name.is_empty()).collect()
    }

    pub fn vm_of(&self, sandbox: &str) -> Process {
        let vms = self.vms.lock();
        let mut named = vms.values().filter_map(|vm| vm.process.clone());
        named.find(|process| *process.sandbox.lock() == sandbox).expect("a VM of that sandbox")
    }

    /// Whether anything is stored of a sandbox's memory.
    pub fn has_stored(&self, sandbox: &str) -> bool {
        self.vms.lock().values().any(|vm| vm.stored.as_ref().is_some_and(|(of, _)| of == sandbox))
    }

    fn process(&self, vm: &str) -> Result<Process, MakeError> {
        let vms = self.vms.lock();
        let process = vms.get(vm).and_then(|vm| vm.process.clone());
        process.filter(|p| !p.exit.is_cancelled()).ok_or_else(|| MakeError::Backend("no process".into()))
    }

    fn change<T>(&self, vm: &str, change: impl FnOnce(&mut FakeVm) -> T) -> Result<T, MakeError> {
        let mut vms = self.vms.lock();
        vms.get_mut(vm).map(change).ok_or_else(|| MakeError::Backend("no home".into()))
    }

    fn start(&self, vm: &str, paused: bool) -> Result<(), MakeError> {
        self.made.fetch_add(1, Ordering::SeqCst);
        let mut vms = self.vms.lock();
        let vm = vms.get_mut(vm).ok_or_else(|| MakeError::Backend("no home".into()))?;
        vm.process = Some(Process {
            exit: CancellationToken::new(),
            paused: Arc::new(AtomicBool::new(paused)),
            sandbox: Arc::default(),
            deaf: Arc::default(),
        });
        Ok(())
    }
}

fn take_one(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

/// The backend of one agent.
#[derive(Debug)]
pub struct FakeBackend(pub Arc<World>);

#[derive(Debug)]
struct FakeInstance {
    world: Arc<World>,
    id: String,
    wanted: Option<Wanted>,
}

impl FakeInstance {
    fn start_of_snapshot(&self, snapshot_id: &str, paused: bool) -> Result<(), MakeError> {
        let captured = self.world.snapshots.lock().get(snapshot_id).cloned();
        let captured = captured.ok_or_else(|| MakeError::NoSnapshot(snapshot_id.into()))?;
        if take_one(&self.world.damaged_snapshots) {
            return Err(MakeError::Unusable("its digest is another".into()));
        }
        if paused && !captured.has_memory {
            return Err(MakeError::NoMemory(snapshot_id.into()));
        }
        self.world.start(&self.id, paused)
    }
}

#[tonic::async_trait]
impl Backend for FakeBackend {
    fn accelerator(&self) -> &'static str {
        "tcg"
    }

    fn vmm(&self) -> String {
        "fake 1".into()
    }

    fn templates(&self) -> Vec<String> {
        vec!["base".into()]
    }

    fn startable(&self) -> Startable {
        Startable { snapshot_keys: vec!["fake".into()], base_digests: vec!["base".into()] }
    }

    async fn golden(&self, _: &Kind) -> Result<(), MakeError> {
        self.0.step().await;
        loop {
            let released = self.0.released.notified();
            if !self.0.golden_waits.load(Ordering::SeqCst) {
                break;
            }
            released.await;
        }
        if self.0.failing_goldens.load(Ordering::SeqCst) {
            return Err(MakeError::Backend("no golden snapshot".into()));
        }
        Ok(())
    }

    async fn existing(&self) -> Result<Vec<String>, MakeError> {
        Ok(self.0.vms.lock().keys().cloned().collect())
    }

    fn open(&self, vm: &str) -> Box<dyn Instance> {
        Box::new(FakeInstance { world: self.0.clone(), id: vm.into(), wanted: None })
    }

    fn grafts(&self, scion: Scion<'_>, _: &Kind) -> bool {
        match scion {
            Scion::Snapshot(id) => {
                self.0.snapshots.lock().get(id).is_some_and(|captured| captured.has_memory)
            }
            Scion::Stored(vm) => self.0.vms.lock().get(vm).is_some_and(|vm| vm.stored.is_some()),
        }
    }

    fn snapshots(&self) -> Vec<Captured> {
        self.0.snapshots.lock().values().cloned().collect()
    }

    async fn delete_snapshot(&self, snapshot_id: &str) -> Result<(), MakeError> {
        self.0.step().await;
        self.0.snapshots.lock().remove(snapshot_id);
        Ok(())
    }

    fn object_store_id(&self) -> watch::Receiver<Option<Arc<str>>> {
        watch::Sender::new(None).subscribe()
    }

    async fn provide_snapshot(&self, snapshot_id: &str) -> Result<(), MakeError> {
        if self.0.snapshots.lock().contains_key(snapshot_id) {
            return Ok(());
        }
        self.0.step().await;
        match self.0.store.lock().get(snapshot_id).cloned() {
            Some(Some(captured)) => drop(self.0.snapshots.lock().insert(snapshot_id.into(), captured)),
            Some(None) => return Err(MakeError::Unusable("the object store's copy is damaged".into())),
            None => return Err(MakeError::NoSnapshot(snapshot_id.into())),
        }
        Ok(())
    }

    async fn verify_snapshot(&self, snapshot_id: &str) -> Result<Whole, MakeError> {
        match self.0.snapshots.lock().get(snapshot_id) {
            Some(captured) => Ok(Whole { here: captured.bytes, uploaded: 0 }),
            None => Err(MakeError::NoSnapshot(snapshot_id.into())),
        }
    }

    async fn seclude(&self, parts: &BTreeSet<SocketAddr>) -> io::Result<()> {
        self.0.secluded.send_replace(parts.clone());
        Ok(())
    }

    async fn clean_up(&self) -> Result<(), MakeError> {
        Ok(())
    }
}

#[tonic::async_trait]
impl Instance for FakeInstance {
    async fn create(&mut self) -> Result<(), MakeError> {
        self.world.step().await;
        self.world.vms.lock().insert(self.id.clone(), FakeVm::default());
        self.world.step().await;
        Ok(())
    }

    async fn restrict(&mut self, egress: Egress) -> Result<(), MakeError> {
        self.world.step().await;
        if let Some(vm) = self.world.vms.lock().get_mut(&self.id) {
            vm.egress = egress;
        }
        Ok(())
    }

    async fn restore(&mut self, _: &Kind) -> Result<(), MakeError> {
        self.world.step().await;
        if take_one(&self.world.failing_restores) {
            return Err(MakeError::Backend("the snapshot is torn".into()));
        }
        self.world.start(&self.id, true)?;
        self.world.step().await;
        Ok(())
    }

    async fn boot(&mut self, _: &Kind) -> Result<(), MakeError> {
        self.world.step().await;
        if take_one(&self.world.failing_boots) {
            return Err(MakeError::Backend("the kernel panics".into()));
        }
        self.world.start(&self.id, false)?;
        self.world.step().await;
        Ok(())
    }

    async fn halt(&mut self) -> Result<(), MakeError> {
        self.forget_stored().await?;
        self.pause().await
    }

    async fn store(&mut self, _: bool) -> Result<u64, MakeError> {
        self.world.step().await;
        self.world.stores.fetch_add(1, Ordering::SeqCst);
        loop {
            let released = self.world.released.notified();
            if !self.world.store_waits.load(Ordering::SeqCst) {
                break;
            }
            released.await;
        }
        if take_one(&self.world.failing_stores) {
            return Err(MakeError::Backend("the disk is full".into()));
        }
        let process = self.world.process(&self.id)?;
        assert!(process.paused.load(Ordering::SeqCst), "it is stored while it stands still");
        let sandbox = process.sandbox.lock().clone();
        self.world.change(&self.id, |vm| vm.stored = Some((sandbox, vm.disk.load(Ordering::SeqCst))))?;
        self.world.step().await;
        Ok(4096)
    }

    async fn capture(&mut self, what: &Wanted) -> Result<Duration, MakeError> {
        self.pause().await?;
        let fails = take_one(&self.world.failing_captures);
        self.resume().await?;
        if fails {
            return Err(MakeError::Backend("the disk is full".into()));
        }
        self.wanted = Some(what.clone());
        Ok(Duration::from_millis(1))
    }

    async fn keep_capture(&mut self, circumstances: Circumstances) -> Result<Captured, MakeError> {
        self.world.step().await;
        let wanted = self.wanted.take().expect("it was captured");
        let captured = Captured {
            snapshot_id: wanted.snapshot_id.clone(),
            has_memory: !wanted.disk_only,
            circumstances,
            bytes: 4096,
            memory_changed_bytes: 0,
            disk_bytes: 0,
            manifest_digest: String::new(),
            snapshot_key: "fake".into(),
            base_digest: "base".into(),
            object_store_id: None,
        };
        self.world.snapshots.lock().insert(wanted.snapshot_id, captured.clone());
        self.world.step().await;
        Ok(captured)
    }

    async fn restore_snapshot(&mut self, snapshot_id: &str, _: &Kind) -> Result<(), MakeError> {
        self.world.step().await;
        self.start_of_snapshot(snapshot_id, true)?;
        self.world.step().await;
        Ok(())
    }

    async fn graft(&mut self, scion: Scion<'_>, _: &Kind) -> Result<(), MakeError> {
        self.world.step().await;
        let process = self.world.process(&self.id)?;
        assert!(process.paused.load(Ordering::SeqCst));
        if let Scion::Stored(other) = scion {
            if self.world.damaged_memories.load(Ordering::SeqCst) > 0 {
                return Err(MakeError::Unusable("its digest is another".into()));
            }
            let (stored, disk) = self.world.change(other, |vm| (vm.stored.clone(), vm.disk.clone()))?;
            let (sandbox, stored_with) = stored.ok_or_else(|| MakeError::Unusable("there is none".into()))?;
            assert_eq!(disk.load(Ordering::SeqCst), stored_with, "its memory is not of its disk");
            self.world.change(&self.id, |vm| vm.disk = disk)?;
            *process.sandbox.lock() = sandbox;
        }
        if take_one(&self.world.failing_grafts) {
            return Err(MakeError::Backend("the CPU was busy".into()));
        }
        self.world.grafts.fetch_add(1, Ordering::SeqCst);
        self.world.step().await;
        Ok(())
    }

    async fn boot_snapshot(&mut self, snapshot_id: &str, _: &Kind) -> Result<(), MakeError> {
        self.world.step().await;
        self.start_of_snapshot(snapshot_id, false)?;
        self.world.step().await;
        Ok(())
    }

    async fn release(&mut self) -> Result<(), MakeError> {
        self.kill().await
    }

    async fn restore_stored(&mut self, _: &Kind) -> Result<(), MakeError> {
        self.world.step().await;
        if take_one(&self.world.damaged_memories) {
            return Err(MakeError::Unusable("its digest is another".into()));
        }
        let (stored, disk) =
            self.world.change(&self.id, |vm| (vm.stored.clone(), vm.disk.load(Ordering::SeqCst)))?;
        let Some((sandbox, stored_with)) = stored else {
            return Err(MakeError::Unusable("there is none".into()));
        };
        assert_eq!(disk, stored_with, "its memory is not of its disk");
        self.world.start(&self.id, true)?;
        *self.world.process(&self.id)?.sandbox.lock() = sandbox;
        self.world.step().await;
        Ok(())
    }

    async fn boot_stored(&mut self, kind: &Kind) -> Result<(), MakeError> {
        self.boot(kind).await?;
        self.world.change(&self.id, |vm| vm.disk.fetch_add(1, Ordering::SeqCst)).map(drop)
    }

    async fn shelf_id(&self, _: &SandboxId) -> Result<Option<String>, MakeError> {
        Ok(None)
    }

    async fn shelve(&self, _: &str, _: u64, _: Arc<AtomicBool>) -> Result<(), MakeError> {
        Ok(())
    }

    fn forget_stored(&self) -> BoxFuture<'static, Result<(), MakeError>> {
        let (world, id) = (self.world.clone(), self.id.clone());
        Box::pin(async move {
            world.step().await;
            world.change(&id, |vm| vm.stored = None)?;
            world.step().await;
            Ok(())
        })
    }

    async fn adopt(&mut self) -> Result<bool, MakeError> {
        Ok(self.world.process(&self.id).is_ok())
    }

    async fn resume(&self) -> Result<(), MakeError> {
        self.world.step().await;
        self.world.process(&self.id)?.paused.store(false, Ordering::SeqCst);
        self.world.change(&self.id, |vm| vm.disk.fetch_add(1, Ordering::SeqCst))?;
        self.world.step().await;
        Ok(())
    }

    async fn condition(&self) -> Result<Condition, MakeError> {
        self.world.process(&self.id).map(|_| Condition::Runs)
    }

    async fn grow_disk(&self, _: u32) -> Result<(), MakeError> {
        self.world.step().await;
        Ok(())
    }

    async fn pause(&self) -> Result<(), MakeError> {
        self.world.step().await;
        self.world.process(&self.id)?.paused.store(true, Ordering::SeqCst);
        self.world.step().await;
        Ok(())
    }

    fn guest(&self) -> Option<Guest> {
        let process = self.world.process(&self.id).ok()?;
        let guest = FakeGuest { world: self.world.clone(), vm: self.id.clone(), process };
        let routes = tonic::service::Routes::new(GuestServiceServer::new(guest.clone()))
            .add_service(ExecServiceServer::new(guest.clone()))
            .add_service(file_service_server::FileServiceServer::new(files::Root));
        let deaf = guest.process.deaf;
        let service = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
            let (routes, deaf) = (routes.clone(), deaf.clone());
            async move {
                if deaf.load(Ordering::SeqCst) {
                    std::future::pending::<()>().await;
                }
                let Ok(response) = routes.oneshot(request).await;
                Ok::<_, Status>(response.map(tonic::body::Body::new))
            }
        });
        Some(BoxCloneSyncService::new(service))
    }

    fn exit(&self) -> BoxFuture<'static, ()> {
        let process = self.world.vms.lock().get(&self.id).and_then(|vm| vm.process.clone());
        Box::pin(async move {
            match process {
                Some(process) => process.exit.cancelled_owned().await,
                None => std::future::pending().await,
            }
        })
    }

    async fn kill(&mut self) -> Result<(), MakeError> {
        self.world.step().await;
        if let Ok(process) = self.world.process(&self.id) {
            process.exit.cancel();
        }
        Ok(())
    }

    async fn destroy(&mut self) -> Result<(), MakeError> {
        self.world.step().await;
        if let Ok(process) = self.world.process(&self.id) {
            process.exit.cancel();
        }
        self.world.step().await;
        self.world.vms.lock().remove(&self.id);
        self.world.step().await;
        Ok(())
    }

    fn console_tail(&self) -> String {
        String::new()
    }
}

#[derive(Clone)]
struct FakeGuest {
    world: Arc<World>,
    vm: String,
    process: Process,
}

#[tonic::async_trait]
impl GuestService for FakeGuest {
    async fn activate(
        &self,
        request: Request<ActivateRequest>,
    ) -> Result<Response<ActivateResponse>, Status> {
        self.world.step().await;
        if self.process.paused.load(Ordering::SeqCst) || self.process.exit.is_cancelled() {
            return Err(Status::unavailable("paused or dead"));
        }
        let request = request.into_inner();
        *self.process.sandbox.lock() = request.sandbox_id.clone();
        self.world.activations.lock().push((self.vm.clone(), request));
        self.world.step().await;
        Ok(Response::new(ActivateResponse::default()))
    }

    async fn wake(&self, request: Request<WakeRequest>) -> Result<Response<WakeResponse>, Status> {
        self.world.step().await;
        if self.process.paused.load(Ordering::SeqCst) || self.process.exit.is_cancelled() {
            return Err(Status::unavailable("paused or dead"));
        }
        assert_eq!(request.get_ref().entropy.len(), 64);
        if take_one(&self.world.failing_wakes) {
            return Err(Status::unavailable("it hangs"));
        }
        Ok(Response::new(WakeResponse::default()))
    }

    async fn quiesce(&self, _: Request<QuiesceRequest>) -> Result<Response<QuiesceResponse>, Status> {
        if take_one(&self.world.restless) {
            return Err(Status::deadline_exceeded("somebody writes"));
        }
        Ok(Response::new(QuiesceResponse::default()))
    }
}

#[tonic::async_trait]
impl ExecService for FakeGuest {
    /// `wait` runs until the VM dies; everything else echoes the sandbox.
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        if request.get_ref().cmd == "wait" {
            self.process.exit.cancelled().await;
            return Err(Status::unavailable("the link broke"));
        }
        let stdout = self.process.sandbox.lock().clone().into_bytes().into();
        Ok(Response::new(RunResponse { stdout, ..Default::default() }))
    }

    async fn run_async(&self, _: Request<RunAsyncRequest>) -> Result<Response<RunAsyncResponse>, Status> {
        Err(Status::unimplemented("run_async"))
    }

    async fn start_exec(&self, _: Request<StartExecRequest>) -> Result<Response<StartExecResponse>, Status> {
        Err(Status::unimplemented("start_exec"))
    }

    async fn start_terminal(
        &self,
        _: Request<StartTerminalRequest>,
    ) -> Result<Response<StartTerminalResponse>, Status> {
        Err(Status::unimplemented("start_terminal"))
    }

    async fn list_execs(&self, _: Request<ListExecsRequest>) -> Result<Response<ListExecsResponse>, Status> {
        Err(Status::unimplemented("list_execs"))
    }

    async fn get_exec(&self, _: Request<GetExecRequest>) -> Result<Response<GetExecResponse>, Status> {
        Err(Status::unimplemented("get_exec"))
    }

    async fn get_exec_result(
        &self,
        _: Request<GetExecResultRequest>,
    ) -> Result<Response<GetExecResultResponse>, Status> {
        Err(Status::unimplemented("get_exec_result"))
    }

    async fn kill_exec(&self, _: Request<KillExecRequest>) -> Result<Response<KillExecResponse>, Status> {
        Err(Status::unimplemented("kill_exec"))
    }

    async fn resize_terminal(
        &self,
        _: Request<ResizeTerminalRequest>,
    ) -> Result<Response<ResizeTerminalResponse>, Status> {
        Err(Status::unimplemented("resize_terminal"))
    }

    type AttachExecStream = tokio_stream::Empty<Result<AttachExecResponse, Status>>;

    async fn attach_exec(
        &self,
        _: Request<Streaming<AttachExecRequest>>,
    ) -> Result<Response<Self::AttachExecStream>, Status> {
        Err(Status::unimplemented("attach_exec"))
    }
}

/// Only what an adoption asks.
mod files {
    use std::pin::Pin;

    use oc_proto::v1::{file_service_server::FileService, *};
    use tokio_stream::Stream;
    use tonic::{Request, Response, Status, Streaming};

    pub struct Root;

    macro_rules! unimplemented_calls {
        ($($name:ident: $request:ty => $response:ty;)*) => {
            #[tonic::async_trait]
            impl FileService for Root {
                type ReadFileStream = Pin<Box<dyn Stream<Item = Result<ReadFileResponse, Status>> + Send>>;

                async fn stat_file(&self, _: Request<StatFileRequest>) -> Result<Response<StatFileResponse>, Status> {
                    Ok(Response::new(StatFileResponse::default()))
                }

                async fn read_file(&self, _: Request<ReadFileRequest>) -> Result<Response<Self::ReadFileStream>, Status> {
                    Err(Status::unimplemented(""))
                }

                $(async fn $name(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                    Err(Status::unimplemented(""))
                })*

    type WatchDirectoryStream = Pin<Box<dyn Stream<Item = Result<WatchDirectoryResponse, Status>> + Send>>;

    /// Says that it has begun, and then nothing for ever.
    async fn watch_directory(
        &self,
        _: Request<WatchDirectoryRequest>,
    ) -> Result<Response<Self::WatchDirectoryStream>, Status> {
        use tokio_stream::StreamExt as _;
        let begun = tokio_stream::once(Ok(WatchDirectoryResponse::default()));
        Ok(Response::new(Box::pin(begun.chain(tokio_stream::pending()))))
    }

    type ReadArchiveStream = tokio_stream::Empty<Result<ReadArchiveResponse, Status>>;

    async fn read_archive(
        &self,
        _: Request<ReadArchiveRequest>,
    ) -> Result<Response<Self::ReadArchiveStream>, Status> {
        Err(Status::unimplemented("read_archive"))
    }

    async fn write_archive(
        &self,
        _: Request<Streaming<WriteArchiveRequest>>,
    ) -> Result<Response<WriteArchiveResponse>, Status> {
        Err(Status::unimplemented("write_archive"))
    }
}
        };
    }

    unimplemented_calls! {
        write_file: Streaming<WriteFileRequest> => WriteFileResponse;
        list_directory: ListDirectoryRequest => ListDirectoryResponse;
        make_directory: MakeDirectoryRequest => MakeDirectoryResponse;
        remove_file: RemoveFileRequest => RemoveFileResponse;
        rename_file: RenameFileRequest => RenameFileResponse;
    }
}

pub fn kind() -> Kind {
    Kind { template: "base".into(), cpu_count: 1, memory_mb: 1024 }
}

pub fn order() -> Order {
    Order {
        kind: kind(),
        disk_mb: 20480,
        envs: HashMap::from([("A".into(), "b".into())]),
        egress: Egress::Open,
        source: None,
    }
}

pub fn owner(sandbox: &str, epoch: u64) -> Owner {
    Owner { sandbox: id(sandbox), epoch: Epoch(epoch) }
}

pub fn id(sandbox: &str) -> SandboxId {
    SandboxId::parse(sandbox).unwrap()
}

/// Room for all that any test makes.
pub const LIMITS: Limits = Limits { max_sandboxes: 100, memory_reserve_mb: 0, disk_reserve_mb: 0 };

/// One agent of the host.
pub struct Agent {
    pub host: Host,
    pub pool: Pool,
    cancel: CancellationToken,
    tasks: [JoinHandle<()>; 2],
}

impl Agent {
    /// Starts an agent over what `data_dir` and `world` hold, on the boot called `boot`. What hibernates is stored at once.
    pub async fn start_on(boot: &str, world: &Arc<World>, data_dir: &Path, pool_size: usize) -> Self {
        Self::start_with(boot, world, data_dir, pool_size, (LIMITS, Duration::ZERO)).await
    }

    /// As above, with these limits, and VMs that are paused for so long.
    pub async fn start_with(
        boot: &str,
        world: &Arc<World>,
        data_dir: &Path,
        pool_size: usize,
        (limits, paused_for): (Limits, Duration),
    ) -> Self {
        let backend = Arc::new(FakeBackend(world.clone()));
        let workshop = Arc::new(Workshop::open(backend, data_dir, boot.into()).unwrap());
        let settings = Settings {
            shelves: vec![(kind(), pool_size)],
            parallel: 2,
            memory_reserve_mb: 0,
            clone_mb: 1,
            disk_reserve_mb: 0,
            data_dir: data_dir.into(),
        };
        let pool = Pool::new(workshop.clone(), settings);
        let policy = Policy { paused_for, headroom_mb: 0, uploads: false };
        let host = Host::open(workshop, pool.clone(), limits, policy).unwrap();
        host.recover().await.unwrap();
        let cancel = CancellationToken::new();
        let filling = tokio::spawn(pool.clone().run(cancel.clone()));
        let relieving = tokio::spawn(host.clone().relieve(cancel.clone()));
        Self { host, pool, cancel, tasks: [filling, relieving] }
    }

    pub async fn start(world: &Arc<World>, data_dir: &Path, pool_size: usize) -> Self {
        Self::start_on("boot", world, data_dir, pool_size).await
    }

    /// Waits until so many clones wait.
    pub async fn pool_holds(&self, ready: usize) {
        let mut watch = self.pool.ready();
        let full = watch.wait_for(|n| *n == ready);
        tokio::time::timeout(DEADLINE, full).await.expect("the pool fills in time").unwrap();
    }

    /// Ends the agent as a signal does: sandboxes go on.
    pub async fn stop(self) {
        self.cancel.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        self.host.leave(DEADLINE).await;
    }
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("{what}"));
}

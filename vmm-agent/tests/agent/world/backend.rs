//! The agent's backend over the world: homes, processes, stored memories and snapshots, without a VMM.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use oc_proto::{
    mesh::guest_service_server::GuestServiceServer,
    v1::{exec_service_server::ExecServiceServer, file_service_server},
};
use oc_vmm_agent::{
    backend::{
        Backend, Captured, Circumstances, Condition, Guest, Instance, Scion, Startable, Wanted, Whole,
    },
    identity::SandboxId,
    microvm::{Kind, MakeError},
    network::Egress,
};
use tokio::sync::watch;
use tonic::Status;
use tower::{ServiceExt as _, util::BoxCloneSyncService};

use super::{
    FakeVm, World,
    guest::{FakeGuest, files},
    take_one,
};

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

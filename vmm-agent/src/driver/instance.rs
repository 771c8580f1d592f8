//! One VM of this host, as the lifecycle sees it.

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime},
};

use futures_util::future::BoxFuture;
use tower::util::BoxCloneSyncService;
use tracing::debug;

use super::{
    capture::Capture,
    cgroup::Cgroup,
    durable,
    golden::Goldens,
    home::Home,
    interfaces::Interfaces,
    outlet::Outlet,
    parts::{Bootable, Parts},
    previous,
    running::{self, CloneError, Running},
    snapshot::{Manifest, Origin, Place, shelved},
    stored::Stored,
    vmm::Memory,
};
use crate::{
    backend::{Captured, Circumstances, Condition, Guest, Instance, Scion, Wanted},
    fail,
    identity::SandboxId,
    microvm::{Kind, MakeError},
    network::Egress,
    telemetry,
};

/// A handle to a VM: its name leads to its home and its group, whatever is there of them.
#[derive(Debug)]
pub struct Vm {
    home: Home,
    cgroup: Cgroup,
    interfaces: Interfaces,
    /// What can make it run; absent where VMs are only removed.
    source: Option<(Arc<Parts>, Arc<Goldens>)>,
    running: Option<Running>,
    stored: Stored,
    /// What was taken of it and is not kept yet.
    capture: Option<(String, Capture)>,
}

impl Vm {
    /// The VM in `home`, with the group `cgroup` and one of the `interfaces`.
    pub fn new(
        home: Home,
        cgroup: Cgroup,
        interfaces: Interfaces,
        source: Option<(Arc<Parts>, Arc<Goldens>)>,
    ) -> Self {
        let stored = Stored::of(home.clone());
        Self { home, cgroup, interfaces, source, running: None, stored, capture: None }
    }

    fn source(&self) -> Result<(Arc<Parts>, Arc<Goldens>), MakeError> {
        self.source.clone().ok_or_else(|| MakeError::Backend("this agent only removes VMs".into()))
    }

    async fn boot_with(&mut self, parts: &Parts, of: (&Bootable, &Kind)) -> Result<(), MakeError> {
        self.running = Some(Running::boot(parts, &self.home, &self.cgroup, of, Memory::Anonymous).await?);
        Ok(())
    }

    /// Memory that it was started with, MiB.
    async fn memory_mb(&self) -> Result<u32, MakeError> {
        Ok(running::on_disk(&self.home, Origin::read).await?.memory_mb)
    }

    /// Puts a copy of a snapshot's disk into the home, by `put`, which says whether it shares its blocks.
    async fn take_layer(
        &self,
        parts: &Arc<Parts>,
        snapshot_id: &str,
        put: impl FnOnce(&Home, &Path) -> io::Result<bool> + Send + 'static,
    ) -> Result<Manifest, MakeError> {
        let (place, known) = (parts.places.snapshot(snapshot_id), parts.clone());
        let work = move |home: &Home| {
            let Some(manifest) = place.read()? else { return Ok(None) };
            place.verify_layer(&manifest, &known.verified)?;
            // What it goes on to share need not be read for its first capture.
            if put(home, &place.layer())?
                && let Err(error) = previous::keep_disk(home, &place.layer())
            {
                debug!(%error, "the first capture reads all of the disk");
            }
            fail::pass(fail::CREATE_LAYER, home.vm())?;
            Ok(Some(manifest))
        };
        let taken = telemetry::step("layer", running::unless_damaged(&self.home, work)).await?;
        taken.ok_or_else(|| MakeError::NoSnapshot(snapshot_id.to_owned()))
    }

    fn running(&self) -> Result<&Running, MakeError> {
        self.running.as_ref().ok_or_else(|| MakeError::Backend("it does not run".into()))
    }
}

/// What boots a disk that is laid over the base image of `origin`.
fn base_of<'a>(parts: &'a Parts, origin: &Origin) -> Result<&'a Bootable, MakeError> {
    let found = parts.bootable_with_base_of(origin);
    found.ok_or_else(|| MakeError::Unusable("the base image of its disk is not on this host any more".into()))
}

#[tonic::async_trait]
impl Instance for Vm {
    async fn create(&mut self) -> Result<(), MakeError> {
        running::on_disk(&self.home, Home::create).await
    }

    async fn restrict(&mut self, egress: Egress) -> Result<(), MakeError> {
        self.interfaces.restrict(&self.home, egress).await
    }

    async fn restore(&mut self, kind: &Kind) -> Result<(), MakeError> {
        let (parts, goldens) = self.source()?;
        let golden = goldens.get(kind).await?;
        running::add_layer(&self.home, golden.layer()).await?;
        match Running::clone_of(&golden, &parts, &self.home, &self.cgroup, kind).await {
            Ok(vm) => self.running = Some(vm),
            Err(CloneError::Other(error)) => return Err(error),
            Err(error @ CloneError::Snapshot(_)) => {
                goldens.discard(kind, &golden);
                return Err(MakeError::Backend(error.to_string()));
            }
        }
        Ok(())
    }

    async fn boot(&mut self, kind: &Kind) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        let layer = parts.empty_layer().await?.to_owned();
        running::add_layer(&self.home, layer).await?;
        let bootable = parts.bootable(&kind.template)?;
        self.boot_with(&parts, (bootable, kind)).await
    }

    async fn halt(&mut self) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        self.capture = None;
        self.stored.forget().await?;
        // Should the machine fail before it is stored, it boots from its disk.
        running::on_disk(&self.home, move |home| parts.pin(&Origin::read(home)?)).await?;
        let running = self.running()?;
        // In this order: a VMM that is hung up on while its guest speaks does not hear it ever again.
        running.machine.pause().await?;
        // Else it would find half a conversation when it wakes.
        running.link.hang_up().await;
        Ok(())
    }

    async fn store(&mut self, is_quiet: bool) -> Result<u64, MakeError> {
        let (parts, _) = self.source()?;
        let running = self.running()?;
        let memory = running.source(&parts, self.memory_mb().await?).await?;
        let paused_at = Instant::now();
        let writing = self.stored.write().await;
        let place = self.stored.place();
        let capture = Capture::begin(place, &self.home, Some(memory), false, writing).await?;
        fail::pass(fail::HIBERNATE_DRAFTED, self.home.vm())?;
        let capture = capture.take(running.machine.as_ref()).await?;
        let circumstances = Circumstances {
            taken_at: SystemTime::now(),
            is_quiet,
            pause: paused_at.elapsed(),
            freeze: Duration::ZERO,
            is_ephemeral: false,
        };
        Ok(capture.publish(parts, circumstances).await?.bytes())
    }

    async fn capture(&mut self, what: &Wanted) -> Result<Duration, MakeError> {
        let (parts, _) = self.source()?;
        self.capture = None;
        // One that was given up as the VM was woken uses the same files.
        let writing = self.stored.write().await;
        let running = self.running()?;
        let memory = match what.disk_only {
            true => None,
            false => Some(running.source(&parts, self.memory_mb().await?).await?),
        };
        let place = parts.places.snapshot(&what.snapshot_id);
        let capture = Capture::begin(place, &self.home, memory, true, writing).await?;
        fail::pass(fail::CAPTURE_DRAFTED, self.home.vm())?;
        let begun = Instant::now();
        running.machine.pause().await?;
        fail::pass(fail::CAPTURE_PAUSED, self.home.vm())?;
        let taken = capture.take(running.machine.as_ref()).await;
        // Whatever became of it.
        running.machine.resume().await?;
        let pause = begun.elapsed();
        fail::pass(fail::CAPTURE_RESUMED, self.home.vm())?;
        self.capture = Some((what.snapshot_id.clone(), taken?));
        Ok(pause)
    }

    async fn keep_capture(&mut self, circumstances: Circumstances) -> Result<Captured, MakeError> {
        let (parts, _) = self.source()?;
        let captured = self.capture.take();
        let (id, capture) = captured.ok_or_else(|| MakeError::Backend("nothing is captured".into()))?;
        capture.publish(parts.clone(), circumstances).await?;
        running::on_disk(&self.home, move |_| parts.shelf.add(&id)).await
    }

    async fn restore_snapshot(&mut self, snapshot_id: &str, kind: &Kind) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        let place = parts.places.snapshot(snapshot_id);
        let manifest = self.take_layer(&parts, snapshot_id, Home::add_layer).await?;
        if !manifest.has_memory() {
            return Err(MakeError::NoMemory(snapshot_id.to_owned()));
        }
        self.running = Some(Running::of_snapshot(&parts, &place, &self.home, &self.cgroup, kind).await?);
        Ok(())
    }

    async fn graft(&mut self, scion: Scion<'_>, kind: &Kind) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        let (place, manifest) = match scion {
            Scion::Snapshot(id) => {
                let put = |home: &Home, layer: &Path| {
                    home.remove_layer()?;
                    home.add_layer(layer)
                };
                (parts.places.snapshot(id), self.take_layer(&parts, id, put).await?)
            }
            Scion::Stored(vm) => {
                let stored = parts.home(vm);
                let egress = running::on_disk(&stored, Home::egress).await?;
                self.interfaces.restrict(&self.home, egress).await?;
                let place = Place::stored(&stored);
                let from = place.clone();
                let take = move |home: &Home| {
                    let manifest = from.read()?;
                    home.remove_layer()?;
                    home.share_layer(&stored)?;
                    Ok(manifest)
                };
                let manifest = running::unless_damaged(&self.home, take).await?;
                (place, manifest.ok_or_else(|| MakeError::Unusable("there is none".into()))?)
            }
        };
        let bootable = parts.bootable(&kind.template)?;
        if parts.origin(bootable, kind) != manifest.origin {
            return Err(MakeError::Backend("it is of another VMM, CPU, kernel or base image".into()));
        }
        self.running()?.graft(&self.home, place, manifest, kind).await
    }

    async fn boot_snapshot(&mut self, snapshot_id: &str, kind: &Kind) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        let manifest = self.take_layer(&parts, snapshot_id, Home::add_layer).await?;
        self.boot_with(&parts, (base_of(&parts, &manifest.origin)?, kind)).await
    }

    async fn release(&mut self) -> Result<(), MakeError> {
        self.kill().await?;
        self.cgroup
            .destroy()
            .await
            .map_err(|error| MakeError::Backend(format!("cannot end its processes: {error}")))?;
        self.running = None;
        self.interfaces.unplug(&self.home).await?;
        fail::pass(fail::HIBERNATE_RELEASED, self.home.vm())?;
        // A capture of it that was given up ends.
        let _nobody_writes = self.stored.write().await;
        running::on_disk(&self.home, |home| {
            home.forget_previous()?;
            home.remove_sockets()
        })
        .await
    }

    async fn restore_stored(&mut self, kind: &Kind) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        running::on_disk(&self.home, Home::own_layer).await?;
        let place = Place::stored(&self.home);
        self.running = Some(Running::of_snapshot(&parts, &place, &self.home, &self.cgroup, kind).await?);
        Ok(())
    }

    async fn boot_stored(&mut self, kind: &Kind) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        let origin = running::on_disk(&self.home, Origin::read).await?;
        let bootable = base_of(&parts, &origin)?;
        // It is no clone any more.
        running::on_disk(&self.home, |home| {
            home.own_layer()?;
            home.forget_base()
        })
        .await?;
        self.boot_with(&parts, (bootable, kind)).await
    }

    async fn shelf_id(&self, sandbox: &SandboxId) -> Result<Option<String>, MakeError> {
        let (sandbox, place) = (sandbox.clone(), self.stored.place());
        running::unless_damaged(&self.home, move |_| shelved::id_of(&sandbox, &place)).await
    }

    async fn shelve(
        &self,
        snapshot_id: &str,
        spare_bytes: u64,
        sleeps: Arc<AtomicBool>,
    ) -> Result<(), MakeError> {
        let (parts, _) = self.source()?;
        let id = snapshot_id.to_owned();
        let work = move |home: &Home| {
            if parts.shelf.has(&id) {
                return Ok(());
            }
            let place = parts.places.snapshot(&id);
            // What nothing shares, if the filesystem cannot. st_blocks is in units of 512 bytes (stat(2)).
            if home.layer().metadata()?.blocks() * 512 > spare_bytes {
                return Err(io::ErrorKind::StorageFull.into());
            }
            parts.pin(&Origin::read(home)?)?;
            shelved::make(home, &place, &parts.verified, &sleeps)?;
            parts.shelf.add(&id).map(drop)
        };
        running::unless_damaged(&self.home, work).await
    }

    fn forget_stored(&self) -> BoxFuture<'static, Result<(), MakeError>> {
        self.stored.forget()
    }

    async fn adopt(&mut self) -> Result<bool, MakeError> {
        let (parts, _) = self.source()?;
        self.running = Running::adopt(&parts, &self.home, &self.cgroup).await?;
        Ok(self.running.is_some())
    }

    async fn resume(&self) -> Result<(), MakeError> {
        Ok(self.running()?.machine.resume().await?)
    }

    async fn pause(&self) -> Result<(), MakeError> {
        Ok(self.running()?.machine.pause().await?)
    }

    async fn condition(&self) -> Result<Condition, MakeError> {
        Ok(self.running()?.machine.condition().await?)
    }

    async fn grow_disk(&self, disk_mb: u32) -> Result<(), MakeError> {
        let wanted = u64::from(disk_mb) << 20;
        let layer = self.home.layer();
        let size = running::on_disk(&self.home, move |_| Ok(layer.metadata()?.len())).await?;
        if wanted > size {
            self.running()?.machine.grow_layer(wanted).await?;
        }
        Ok(())
    }

    fn guest(&self) -> Option<Guest> {
        let running = self.running.as_ref()?;
        let (link, ports) = (running.link.clone(), running.ports.clone());
        let outlet = Outlet::new(link, ports, self.home.clone(), self.interfaces.clone());
        Some(BoxCloneSyncService::new(outlet))
    }

    fn exit(&self) -> BoxFuture<'static, ()> {
        match &self.running {
            Some(running) => running.process.exit(),
            None => Box::pin(std::future::pending()),
        }
    }

    async fn kill(&mut self) -> Result<(), MakeError> {
        match &self.running {
            Some(running) => {
                running.process.kill().await.map_err(|error| MakeError::Backend(error.to_string()))
            }
            // One that could not be taken over may run all the same.
            None => self.cgroup.kill().await.map_err(|error| MakeError::Backend(error.to_string())),
        }
    }

    async fn destroy(&mut self) -> Result<(), MakeError> {
        // Its child is reaped by whoever holds it; the group has what else there may be.
        self.kill().await?;
        self.cgroup
            .destroy()
            .await
            .map_err(|error| MakeError::Backend(format!("cannot end its processes: {error}")))?;
        self.interfaces.unplug(&self.home).await?;
        self.capture = None;
        let _nobody_writes = self.stored.write().await;
        running::on_disk(&self.home, |home| durable::remove(home.dir())).await?;
        self.running = None;
        Ok(())
    }

    fn console_tail(&self) -> String {
        let console = self.running.as_ref().and_then(|running| running.console.as_ref());
        console.map(super::console::Console::tail).unwrap_or_default()
    }
}

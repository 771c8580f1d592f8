//! Drives VMMs: everything that a VM is made of on this host, and nothing of what it is for.
//!
//! - [`vmm`]: the seam to a VMM; [`qemu`] and [`firecracker`] are behind it, [`accelerator`] says how it runs.
//! - [`child`], [`command_line`]: what both have of it in common.
//! - [`template`], [`initramfs`], [`layer`], [`pins`]: what a guest boots from, and how long it is kept.
//! - [`parts`], [`running`], [`golden`]: what all VMs share, a VM that runs, the snapshots that VMs are clones of.
//! - [`home`], [`cgroup`], [`process`], [`console`], [`interfaces`]: what one VM has of this host.
//! - [`guest_link`], [`ports`], [`outlet`]: the ways to a guest; [`graft`]: a snapshot's state in a VM that runs already.
//! - [`pages`], [`runs`], [`held`], [`digests`], [`snapshot`]: what a VM changed of its memory, and its state at one moment,
//!   on disk; [`capture`] takes it, [`shelf`] keeps those of sandboxes, [`stored`] that of one that hibernates.
//! - [`writes`], [`userfaultfd`], [`pagemap_scan`], [`extents`], [`previous`]: what has changed since the capture before.
//! - [`objects`]: the object store, a second place for those that are to outlive this host.
//! - [`instance`]: all of it as the lifecycle uses it.
//! - [`durable`]: files that are whole or not there.
//!
//! A VM's processes, group and home are all called by the VM's name, and can be found and removed knowing nothing else.

pub mod accelerator;
pub mod capture;
pub mod cgroup;
mod child;
mod command_line;
pub mod console;
pub mod digests;
pub mod durable;
pub mod extents;
pub mod firecracker;
pub mod golden;
pub mod graft;
pub mod guest_link;
pub mod held;
pub mod home;
pub mod initramfs;
pub mod instance;
pub mod interfaces;
pub mod layer;
#[cfg(test)]
mod mapped;
pub mod objects;
pub mod outlet;
pub mod pagemap_scan;
pub mod pages;
pub mod parts;
pub mod pins;
pub mod ports;
pub mod previous;
pub mod process;
pub mod qemu;
pub mod running;
pub mod runs;
pub mod shelf;
pub mod snapshot;
pub mod stored;
pub mod template;
pub mod userfaultfd;
pub mod vmm;
pub mod writes;

use std::{collections::BTreeSet, fs, io, net::SocketAddr, path::Path, sync::Arc};

use oc_mesh::{
    clock::SystemClock,
    handoff::{self, Handoffs},
};
use sha2::{Digest as _, Sha256};
use tokio::{sync::watch, task::spawn_blocking};
use tracing::info;

use self::{
    cgroup::Cgroups,
    firecracker::Firecracker,
    golden::Goldens,
    instance::Vm,
    interfaces::Interfaces,
    objects::{Objects, depot::Depot},
    parts::{Parts, Places},
    qemu::Qemu,
    snapshot::Place,
    vmm::Vmm,
};
use crate::{
    backend::{Backend, Captured, Instance, Scion, Startable, Whole},
    config::{Config, VmmChoice},
    microvm::{Kind, MakeError},
    network::plan::Names,
};

/// The VMs of one host.
#[derive(Debug)]
pub struct Driver {
    places: Places,
    cgroups: Cgroups,
    names: Names,
    interfaces: Interfaces,
    source: Option<(Arc<Parts>, Arc<Goldens>)>,
    depot: Option<Arc<Depot>>,
    snapshots: bool,
}

impl Driver {
    /// Finds out what this host can do, and readies it.
    ///
    /// # Errors
    ///
    /// If there is no VMM, no control group, or no disk to write to.
    pub async fn open(config: &Config) -> io::Result<Self> {
        let templates = template::find(&config.image_dir)?;
        let kernel = templates.first().map(template::Template::kernel);
        let vmm = choose(config, kernel.as_deref()).await?;
        let mut driver = Self::for_removal(&config.host_id, &config.data_dir)?;
        let handoffs = match handoff::socket_of(&config.listen) {
            Some(path) if config.network.is_some() => Some(Handoffs::open(&path).await?),
            _ => None,
        };
        let (names, homes) = (driver.names.clone(), &driver.places.homes);
        let interfaces = Interfaces::open(names, homes, config.network.clone(), handoffs).await;
        driver.interfaces = interfaces.map_err(|error| {
            let remedy = "as root, with nftables, or without a network by --network off";
            io::Error::new(
                error.kind(),
                format!("cannot make the VMs' network: {error} (run the agent {remedy})"),
            )
        })?;
        let (places, cgroups) = (driver.places.clone(), driver.cgroups.clone());
        let parts = Arc::new(Parts::ready(
            vmm,
            places,
            cgroups,
            driver.interfaces.clone(),
            &config.image_dir,
            templates,
            &config.guest_binary,
        )?);
        let goldens = Arc::new(Goldens::open(parts.clone())?);
        if let Some(url) = &config.object_store {
            let objects = Objects::open(url, Arc::new(SystemClock)).map_err(io::Error::other)?;
            let depot = Depot::open(parts.clone(), objects, config.limits.disk_reserve_mb)?;
            depot.start();
            driver.depot = Some(depot);
        }
        driver.source = Some((parts, goldens));
        driver.snapshots = config.snapshots;
        Ok(driver)
    }

    /// A driver that can find and remove VMs, and needs nothing of the host for it.
    ///
    /// # Errors
    ///
    /// If the host has no control groups.
    pub fn for_removal(host_id: &str, data_dir: &Path) -> io::Result<Self> {
        // Hosts of the same name may share a machine, if each has a directory of its own.
        let place = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        let digest = Sha256::digest(place.as_os_str().as_encoded_bytes());
        let tag = hex::encode(&digest[..4]);
        let cgroups = Cgroups::find(&format!("{host_id}-{tag}"))?;
        let names = Names::new(&tag);
        let interfaces = Interfaces::for_removal(names.clone());
        Ok(Self {
            places: Places::of(data_dir),
            cgroups,
            names,
            interfaces,
            source: None,
            depot: None,
            snapshots: false,
        })
    }

    /// Gives up what is being made in the background.
    pub async fn close(&self) {
        if let Some((_, goldens)) = &self.source {
            goldens.close().await;
        }
        if let Some(depot) = &self.depot {
            depot.close().await;
        }
        self.interfaces.close().await;
    }

    /// What a call for a snapshot needs. An ID that cannot be one names none.
    fn of_snapshot(&self, id: &str) -> Result<(Arc<Parts>, String), MakeError> {
        match &self.source {
            Some((parts, _)) if shelf::is_id(id) => Ok((parts.clone(), id.to_owned())),
            _ => Err(MakeError::NoSnapshot(id.to_owned())),
        }
    }

    fn parts(&self) -> Option<&Parts> {
        self.source.as_ref().map(|(parts, _)| parts.as_ref())
    }
}

/// Decides which VMM runs the VMs, and says why in the log. `kernel` is one to try it with.
async fn choose(config: &Config, kernel: Option<&Path>) -> io::Result<Arc<dyn Vmm>> {
    let has_network = config.network.is_some();
    if config.vmm != VmmChoice::Qemu {
        let settings = &config.firecracker;
        let found = Firecracker::find(settings.clone(), has_network).await;
        let found = found.and_then(|firecracker| firecracker.fits(&config.data_dir).map(|()| firecracker));
        match (found, config.vmm) {
            (Ok(firecracker), VmmChoice::Firecracker) => {
                info!(vmm = firecracker.version(), reason = "chosen by configuration", "VMM");
                return Ok(Arc::new(firecracker));
            }
            (Err(reason), VmmChoice::Firecracker) => return Err(io::Error::other(reason)),
            (Ok(firecracker), _) => match firecracker::probe::boots(settings, kernel).await {
                Ok(()) => {
                    info!(vmm = firecracker.version(), reason = "a kernel booted under it", "VMM");
                    return Ok(Arc::new(firecracker));
                }
                Err(reason) => info!(vmm = "QEMU", reason, "VMM"),
            },
            (Err(reason), _) => info!(vmm = "QEMU", reason, "VMM"),
        }
    }
    let accelerator = accelerator::choose(config.accelerator, kernel).await?;
    Ok(Arc::new(Qemu::find(accelerator, has_network).await?))
}

#[tonic::async_trait]
impl Backend for Driver {
    fn accelerator(&self) -> &'static str {
        self.parts().map_or("none", |parts| parts.vmm.accelerator())
    }

    fn vmm(&self) -> String {
        self.parts().map(|parts| parts.vmm.version().to_owned()).unwrap_or_default()
    }

    fn templates(&self) -> Vec<String> {
        self.parts().map(Parts::templates).unwrap_or_default()
    }

    fn startable(&self) -> Startable {
        self.parts().map(Parts::startable).unwrap_or_default()
    }

    async fn golden(&self, kind: &Kind) -> Result<(), MakeError> {
        let Some((parts, goldens)) = &self.source else {
            return Err(MakeError::NoTemplate(kind.template.clone()));
        };
        parts.bootable(&kind.template)?;
        if !self.snapshots {
            return Err(MakeError::SnapshotsOff);
        }
        goldens.get(kind).await.map(drop)
    }

    async fn existing(&self) -> Result<Vec<String>, MakeError> {
        let failed = |error: io::Error| MakeError::Backend(format!("cannot look for VMs: {error}"));
        let mut names: BTreeSet<String> = self.cgroups.existing().map_err(failed)?.into_iter().collect();
        match fs::read_dir(&self.places.homes) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            entries => {
                for entry in entries.map_err(failed)? {
                    names.insert(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
                }
            }
        }
        Ok(names.into_iter().collect())
    }

    fn open(&self, vm: &str) -> Box<dyn Instance> {
        let home = home::Home::of(&self.places.homes, vm);
        Box::new(Vm::new(home, self.cgroups.of(vm), self.interfaces.clone(), self.source.clone()))
    }

    fn grafts(&self, scion: Scion<'_>, kind: &Kind) -> bool {
        let Some((parts, goldens)) = self.source.as_ref().filter(|(parts, _)| parts.vmm.grafts()) else {
            return false;
        };
        let Some(golden) = goldens.peek(kind) else { return false };
        let place = match scion {
            Scion::Snapshot(id) if shelf::is_id(id) => parts.places.snapshot(id),
            Scion::Snapshot(_) => return false,
            Scion::Stored(vm) => Place::stored(&parts.home(vm)),
        };
        let why_not = place.read().and_then(|manifest| match manifest {
            Some(manifest) => graft::why_not(&place, &manifest, &golden.memory()),
            None => Ok(Some("it is not here".into())),
        });
        // What is wrong with it is told to whoever restores it.
        let why_not = why_not.unwrap_or_else(|error| Some(error.to_string()));
        if let Some(reason) = &why_not {
            info!(?scion, reason, "goes on in a VMM of its own");
        }
        why_not.is_none()
    }

    fn snapshots(&self) -> Vec<Captured> {
        let mut snapshots = self.parts().map(|parts| parts.shelf.all()).unwrap_or_default();
        if let Some(depot) = &self.depot {
            for captured in &mut snapshots {
                captured.object_store_id = depot.store_with(&captured.snapshot_id);
            }
        }
        snapshots
    }

    fn object_store_id(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.depot.as_ref().map_or_else(|| watch::Sender::new(None).subscribe(), |depot| depot.store_id())
    }

    async fn provide_snapshot(&self, snapshot_id: &str) -> Result<(), MakeError> {
        let (parts, id) = self.of_snapshot(snapshot_id)?;
        match &self.depot {
            _ if parts.shelf.has(&id) => Ok(()),
            Some(depot) => depot.provide(&id).await,
            // Who uses it says what is wrong with it.
            None => Ok(()),
        }
    }

    async fn delete_snapshot(&self, snapshot_id: &str) -> Result<(), MakeError> {
        let (parts, id) = self.of_snapshot(snapshot_id)?;
        let is_ephemeral = parts.shelf.get(&id).is_some_and(|captured| captured.circumstances.is_ephemeral);
        // Here first: what is not here cannot be put into the store again.
        let removed = spawn_blocking(move || parts.shelf.remove(&id)).await;
        let removed = removed.map_err(|panic| MakeError::Backend(panic.to_string()))?;
        removed.map_err(|error| MakeError::Backend(format!("cannot remove a snapshot: {error}")))?;
        match &self.depot {
            Some(depot) if !is_ephemeral => depot.remove(snapshot_id).await,
            _ => Ok(()),
        }
    }

    async fn verify_snapshot(&self, snapshot_id: &str) -> Result<Whole, MakeError> {
        let (parts, id) = self.of_snapshot(snapshot_id)?;
        let is_here = parts.shelf.has(&id);
        let uploaded = match &self.depot {
            Some(depot) => depot.verify(&id).await?,
            None => None,
        };
        if !is_here {
            let uploaded = uploaded.ok_or(MakeError::NoSnapshot(id))?;
            return Ok(Whole { here: 0, uploaded });
        }
        let verified = spawn_blocking(move || parts.places.snapshot(&id).verify_all()).await;
        let verified = verified.map_err(|panic| MakeError::Backend(panic.to_string()))?;
        let here = verified.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => MakeError::Unusable(error.to_string()),
            _ => MakeError::Backend(error.to_string()),
        })?;
        Ok(Whole { here, uploaded: uploaded.unwrap_or_default() })
    }

    async fn seclude(&self, parts: &BTreeSet<SocketAddr>) -> io::Result<()> {
        self.interfaces.seclude(parts).await
    }

    async fn clean_up(&self) -> Result<(), MakeError> {
        let unpinned = self.parts().map_or(Ok(()), Parts::unpin_all);
        let unlinked = self.interfaces.remove_all().await;
        let removed =
            unpinned.and(unlinked).and_then(|()| self.places.remove()).and_then(|()| self.cgroups.clean_up());
        removed.map_err(|error| MakeError::Backend(format!("cannot clean up: {error}")))
    }
}

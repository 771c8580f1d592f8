//! What all VMs of a host are made of.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use fs_err as fs;
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;
use tracing::warn;

use super::{
    cgroup::{Cgroup, Cgroups, Limits},
    digests::Verified,
    durable,
    home::Home,
    initramfs::{self, Initramfs},
    interfaces::Interfaces,
    layer,
    pins::Pins,
    shelf::Shelf,
    snapshot::Origin,
    template::Template,
    vmm::Vmm,
};
use crate::{
    backend::Startable,
    microvm::{Kind, MakeError},
};

/// Threads of a VMM: its CPUs, and up to 64 of its block layer.
const MAX_THREADS: u32 = 128;
/// CPU time for a VMM's devices beside its CPUs, thousandths of one CPU.
const DEVICE_MILLIS: u64 = 500;

/// The directories of a host's driver.
#[derive(Clone, Debug)]
pub struct Places {
    /// The VMs' homes.
    pub homes: PathBuf,
    /// Golden snapshots.
    pub goldens: PathBuf,
    /// Snapshots of sandboxes' VMs.
    pub snapshots: PathBuf,
    /// What the images of snapshots are made of in the object store.
    pub chunk_lists: PathBuf,
    /// What can be made again.
    pub cache: PathBuf,
}

impl Places {
    /// Below `data_dir`.
    pub fn of(data_dir: &Path) -> Self {
        Self {
            homes: data_dir.join("vms"),
            goldens: data_dir.join("golden"),
            snapshots: data_dir.join("snapshots"),
            chunk_lists: data_dir.join("chunk-lists"),
            cache: data_dir.join("cache"),
        }
    }

    /// Makes them, passable for the VMs' users.
    ///
    /// # Errors
    ///
    /// If they cannot be made.
    pub fn create(&self) -> io::Result<()> {
        for dir in [&self.homes, &self.goldens, &self.cache] {
            DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
            fs::set_permissions(dir, Permissions::from_mode(0o711))?;
        }
        // What is in them is their sandboxes' own: no VM's user comes in.
        for dir in [&self.snapshots, &self.chunk_lists] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            fs::set_permissions(dir, Permissions::from_mode(0o700))?;
        }
        Ok(())
    }

    /// Removes them, with all that is in them.
    ///
    /// # Errors
    ///
    /// If something resists.
    pub fn remove(&self) -> io::Result<()> {
        [&self.goldens, &self.cache, &self.chunk_lists, &self.snapshots, &self.homes]
            .into_iter()
            .try_for_each(|dir| durable::remove(dir))
    }
}

/// A template with what it takes to start it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootable {
    /// The template.
    pub template: Template,
    /// Its initramfs, with our guest binary.
    pub initramfs: Initramfs,
    /// Digest of everything that a snapshot of it depends on.
    pub snapshot_key: String,
}

/// What all VMs of a host are made of.
#[derive(Debug)]
pub struct Parts {
    /// The VMM.
    pub vmm: Arc<dyn Vmm>,
    /// Where things lie.
    pub places: Places,
    /// The VMs' groups.
    pub cgroups: Cgroups,
    /// The VMs' networks.
    pub interfaces: Interfaces,
    /// The snapshots of sandboxes' VMs.
    pub shelf: Shelf,
    /// Files of snapshots that were found whole.
    pub verified: Verified,
    /// What new VMs are made of, by template.
    bootables: BTreeMap<String, Bootable>,
    /// What is not the newest any more, and kept for what was made of it.
    kept: Vec<Bootable>,
    empty_layer: OnceCell<PathBuf>,
    processor: String,
    pins: Pins,
}

impl Parts {
    /// Readies the parts: makes the initramfs of each template.
    ///
    /// # Errors
    ///
    /// If the disk or the host's control groups do not permit.
    pub fn ready(
        vmm: Arc<dyn Vmm>,
        places: Places,
        cgroups: Cgroups,
        interfaces: Interfaces,
        image_dir: &Path,
        templates: Vec<Template>,
        guest_binary: &Path,
    ) -> io::Result<Self> {
        places.create()?;
        cgroups.prepare()?;
        let processor = processor()?;
        let mut bootables = BTreeMap::new();
        let brought = |template: Template| match vmm.links_files() {
            true => template.on_filesystem_of(&places.cache),
            false => Ok(template),
        };
        for template in templates {
            let template = brought(template)?;
            let initramfs = initramfs::ensure(&places.cache, &template, guest_binary)?;
            let snapshot_key = snapshot_key(&template, &initramfs, vmm.as_ref(), &processor);
            bootables.insert(template.name.clone(), Bootable { template, initramfs, snapshot_key });
        }
        let (shelf, verified) = (Shelf::open(&places)?, Verified::default());
        let needed = origins(&places, &shelf)?;
        let mut kept = Vec::new();
        for origin in &needed {
            let is_there = |kept: &Bootable| kept.is_of(origin);
            if bootables.values().any(is_there) || kept.iter().any(is_there) {
                continue;
            }
            let Some(template) = Template::of(image_dir, &origin.template, &origin.template_digest) else {
                warn!(
                    template = origin.template,
                    digest = origin.template_digest,
                    "a base image that is needed is gone"
                );
                continue;
            };
            let Some(initramfs) = initramfs::find(&places.cache, &origin.initramfs_digest) else { continue };
            let template = brought(template)?;
            let snapshot_key = snapshot_key(&template, &initramfs, vmm.as_ref(), &processor);
            kept.push(Bootable { template, initramfs, snapshot_key });
        }
        let pins = Pins::of(&places);
        let images = bootables.values().chain(&kept).map(|bootable| &bootable.template);
        pins.keep_only(images, |template| {
            needed.iter().any(|origin| origin.template_digest == template.digest)
        })?;
        let empty_layer = OnceCell::new();
        let parts = Self {
            vmm,
            places,
            cgroups,
            interfaces,
            shelf,
            verified,
            bootables,
            kept,
            empty_layer,
            processor,
            pins,
        };
        parts.sweep_cache(&needed)?;
        Ok(parts)
    }

    /// What a VM was started with that is of `origin`, if this host still has it.
    pub fn bootable_of(&self, origin: &Origin) -> Option<&Bootable> {
        self.bootables.values().chain(&self.kept).find(|bootable| bootable.is_of(origin))
    }

    /// What boots a disk whose base image is that of `origin`, if this host still has it: by the newest first process that
    /// there is.
    pub fn bootable_with_base_of(&self, origin: &Origin) -> Option<&Bootable> {
        let is_base = |bootable: &&Bootable| {
            (&bootable.template.name, &bootable.template.digest)
                == (&origin.template, &origin.template_digest)
        };
        self.bootables.values().chain(&self.kept).find(is_base)
    }

    /// Sees that the base image of `origin` stays for as long as something is made of it: called before that is told.
    ///
    /// # Errors
    ///
    /// If it cannot be written down.
    pub fn pin(&self, origin: &Origin) -> io::Result<()> {
        self.bootable_with_base_of(origin).map_or(Ok(()), |bootable| self.pins.add(&bootable.template))
    }

    /// Lets go of all base images: for a host that ends for good.
    ///
    /// # Errors
    ///
    /// If a pin resists.
    pub fn unpin_all(&self) -> io::Result<()> {
        self.pins
            .keep_only(self.bootables.values().chain(&self.kept).map(|bootable| &bootable.template), |_| {
                false
            })
    }

    /// The names of the templates.
    pub fn templates(&self) -> Vec<String> {
        self.bootables.keys().cloned().collect()
    }

    /// The snapshots that can be started.
    pub fn startable(&self) -> Startable {
        let all = || self.bootables.values().chain(&self.kept);
        let once = |digests: BTreeSet<&String>| digests.into_iter().cloned().collect();
        Startable {
            snapshot_keys: once(all().map(|bootable| &bootable.snapshot_key).collect()),
            base_digests: once(all().map(|bootable| &bootable.template.digest).collect()),
        }
    }

    /// All templates.
    pub fn bootables(&self) -> impl Iterator<Item = &Bootable> {
        self.bootables.values()
    }

    /// The template called `name`.
    ///
    /// # Errors
    ///
    /// [`MakeError::NoTemplate`].
    pub fn bootable(&self, name: &str) -> Result<&Bootable, MakeError> {
        self.bootables.get(name).ok_or_else(|| MakeError::NoTemplate(name.to_owned()))
    }

    /// What a VM of `kind` is of that is started with `bootable`.
    pub fn origin(&self, bootable: &Bootable, kind: &Kind) -> Origin {
        Origin::of(bootable, kind, self.vmm.as_ref(), &self.processor)
    }

    /// The home of the VM called `vm`.
    pub fn home(&self, vm: &str) -> Home {
        Home::of(&self.places.homes, vm)
    }

    /// Makes a group for a VM of `kind`.
    ///
    /// # Errors
    ///
    /// [`MakeError::Backend`] if the host does not permit.
    pub fn create_group(&self, cgroup: &Cgroup, kind: &Kind) -> Result<(), MakeError> {
        let limits = Limits {
            memory_bytes: (u64::from(kind.memory_mb) << 20) + self.vmm.overhead_bytes(),
            cpu_millis: u64::from(kind.cpu_count) * 1000 + DEVICE_MILLIS,
            pids: MAX_THREADS + kind.cpu_count,
        };
        cgroup
            .create(limits)
            .map_err(|error| MakeError::Backend(format!("cannot make a control group: {error}")))
    }

    /// An empty writable layer, made once.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub async fn empty_layer(&self) -> Result<&Path, MakeError> {
        let make = || async {
            let path = self.places.cache.join("layer.img");
            let target = path.clone();
            let made = tokio::task::spawn_blocking(move || {
                if target.try_exists()? {
                    return Ok(());
                }
                let draft = durable::draft_of(&target);
                durable::remove(&draft)?;
                layer::format(&draft)?;
                fs::File::open(&draft)?.sync_all()?;
                durable::rename(&draft, &target)
            });
            let made: io::Result<()> = made.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
            made.map(|()| path)
                .map_err(|error| MakeError::Backend(format!("cannot make an empty layer: {error}")))
        };
        self.empty_layer.get_or_try_init(make).await.map(PathBuf::as_path)
    }

    fn sweep_cache(&self, needed: &[Origin]) -> io::Result<()> {
        let current = self.bootables.values().map(|bootable| &bootable.initramfs.digest);
        let needed = needed.iter().map(|origin| &origin.initramfs_digest);
        let mut stays: Vec<_> =
            current.chain(needed).map(|digest| initramfs::place(&self.places.cache, digest)).collect();
        stays.push(self.places.cache.join("layer.img"));
        let bootables = self.bootables.values().chain(&self.kept);
        stays.extend(bootables.map(|bootable| bootable.template.copy_in(&self.places.cache)));
        for entry in fs::read_dir(&self.places.cache)? {
            let path = entry?.path();
            if !stays.contains(&path) {
                durable::remove(&path)?;
            }
        }
        Ok(())
    }
}

impl Bootable {
    /// Whether a VM of `origin` was started with it.
    fn is_of(&self, origin: &Origin) -> bool {
        let own = (&self.template.name, &self.template.digest, &self.initramfs.digest);
        own == (&origin.template, &origin.template_digest, &origin.initramfs_digest)
    }
}

/// What the VMs and snapshots of this host are of, each once.
fn origins(places: &Places, shelf: &Shelf) -> io::Result<Vec<Origin>> {
    let mut found: Vec<Origin> = Vec::new();
    let mut note = |origin: Origin| {
        if !found.contains(&origin) {
            found.push(origin);
        }
    };
    for captured in shelf.all() {
        // One that cannot be read needs nothing.
        if let Ok(Some(manifest)) = places.snapshot(&captured.snapshot_id).read() {
            note(manifest.origin);
        }
    }
    for entry in fs::read_dir(&places.homes)? {
        let name = entry?.file_name();
        if let Ok(origin) = Origin::read(&Home::of(&places.homes, &name.to_string_lossy())) {
            note(origin);
        }
    }
    Ok(found)
}

fn snapshot_key(template: &Template, initramfs: &Initramfs, vmm: &dyn Vmm, processor: &str) -> String {
    let mut digest = Sha256::new();
    for part in [&template.digest, &initramfs.digest, &vmm.snapshot_key(), processor] {
        digest.update(part.as_bytes());
        digest.update([0]);
    }
    hex::encode(&digest.finalize()[..8])
}

/// The host's processor, as the kernel calls it.
fn processor() -> io::Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    Ok(cpuinfo.lines().find(|line| line.starts_with("model name")).unwrap_or_default().to_owned())
}

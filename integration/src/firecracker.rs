//! VMs of the driver of Firecracker, without what a host makes of them: what a guest does in them is nobody's business.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "who uses it ends where something is not as expected"
)]

use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_vmm_agent::{
    driver::{
        cgroup::{Cgroup, Cgroups, Limits},
        console::Console,
        firecracker::{Firecracker, Settings},
        home::Home,
        initramfs,
        process::Process,
        template::{self, Template},
        vmm::{Extent, Launch, Machine, Memory, SavedMemory, Start, Vmm as _, VmmError},
    },
    microvm::Kind,
    network::{self, Network, plan::Names},
};
use tempfile::TempDir;

use crate::prepared;

/// Of every VM here, MiB: small, so that all of it is written soon.
pub const MEMORY_MB: u32 = 128;

/// What a VM needs: enough for its memory and its VMM.
const LIMITS: Limits = Limits { memory_bytes: 512 << 20, cpu_millis: 1000, pids: 64 };

/// The programs that `make setup-test` has fetched.
pub fn settings() -> Settings {
    Settings {
        firecracker: prepared::tool("firecracker/firecracker").unwrap(),
        jailer: prepared::tool("firecracker/jailer").unwrap(),
        ..Settings::default()
    }
}

/// Where VMs live, and what they are made of.
#[derive(Debug)]
pub struct Bed {
    /// The driver.
    pub vmm: Firecracker,
    homes: PathBuf,
    cgroups: Cgroups,
    template: Template,
    network: Option<(Names, Arc<Network>)>,
    initramfs: PathBuf,
    _dir: TempDir,
}

impl Bed {
    /// With the binaries that were fetched.
    pub async fn new() -> Self {
        Self::with(settings()).await
    }

    /// With others.
    pub async fn with(settings: Settings) -> Self {
        Self::made(settings, None).await
    }

    /// With a network for each VM.
    pub async fn with_network() -> Self {
        let names = Names::new(&format!("fc{:06x}", std::process::id() & 0xff_ffff));
        let plenty = network::Settings {
            allow: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            limits: network::Limits { connections: 1000, mbit: 1000 },
        };
        let network = Network::open(names.clone(), plenty, BTreeSet::new()).await.unwrap();
        Self::made(settings(), Some((names, network))).await
    }

    /// Removes the network.
    pub async fn end(self) {
        if let Some((names, network)) = &self.network {
            network.close().await;
            network::remove_all(names).await.unwrap();
        }
    }

    async fn made(settings: Settings, network: Option<(Names, Arc<Network>)>) -> Self {
        // Where the templates are: both must be on one filesystem.
        let dir = TempDir::new_in("/var/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let homes = dir.path().join("vms");
        fs::create_dir(&homes).unwrap();
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let cgroups = Cgroups::find(&format!("test-firecracker-{}-{number}", std::process::id())).unwrap();
        cgroups.prepare().unwrap();
        let templates = template::find(Path::new(prepared::IMAGES)).unwrap();
        let template = templates.into_iter().next().expect("a template: run `make setup`");
        let init = prepared::binaries().unwrap().join("oc-init");
        let initramfs = initramfs::ensure(dir.path(), &template, &init).unwrap().path;
        let vmm = Firecracker::find(settings, network.is_some()).await.unwrap();
        Self { vmm, homes, cgroups, template, network, initramfs, _dir: dir }
    }

    /// A VM without a VMM, with an empty disk.
    pub fn vm(&self, name: &str) -> Vm<'_> {
        let home = Home::of(&self.homes, name);
        home.create().unwrap();
        let layer = home.add_file("layer.img").unwrap();
        fs::OpenOptions::new().write(true).open(layer).unwrap().set_len(64 << 20).unwrap();
        let cgroup = self.cgroups.of(name);
        cgroup.create(LIMITS).unwrap();
        Vm { bed: self, home, cgroup }
    }
}

impl Drop for Bed {
    /// Ends what a test that failed has left; one that did not leaves nothing.
    fn drop(&mut self) {
        let left = self.cgroups.existing().unwrap();
        for pid in left.iter().flat_map(|name| self.cgroups.of(name).processes().unwrap()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if !std::thread::panicking() {
            assert_eq!(left, [] as [String; 0], "groups are left");
            self.cgroups.clean_up().unwrap();
        }
    }
}

/// A VM that has a home and a group.
#[derive(Debug)]
pub struct Vm<'a> {
    bed: &'a Bed,
    /// Its home.
    pub home: Home,
    /// Its group.
    pub cgroup: Cgroup,
}

/// A VM whose VMM was launched.
#[derive(Debug)]
pub struct Launched {
    /// Its process.
    pub process: Process,
    /// How it is told what to do.
    pub machine: Box<dyn Machine>,
    /// What it says.
    pub console: Console,
}

impl Vm<'_> {
    fn kind(&self) -> Kind {
        Kind { template: "base".into(), cpu_count: 1, memory_mb: MEMORY_MB }
    }

    /// Launches its VMM; what that said last, if it cannot be.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub async fn launch(&self, memory: Memory, start: Start) -> Result<Launched, (VmmError, String)> {
        let (console, writer) = Console::open().unwrap();
        let network = match &self.bed.network {
            Some((_, network)) => {
                let noted = network.take(|number| self.home.note_network(number, network.limits()));
                Some(noted.await.unwrap())
            }
            None => None,
        };
        let launch = Launch {
            home: &self.home,
            cgroup: &self.cgroup,
            kind: &self.kind(),
            kernel: &self.bed.template.kernel(),
            initramfs: &self.bed.initramfs,
            rootfs: &self.bed.template.rootfs(),
            memory,
            start,
            network,
            console: writer,
        };
        match self.bed.vmm.launch(launch).await {
            Ok((process, machine)) => Ok(Launched { process, machine, console }),
            Err(error) => {
                // What it said last is read by now.
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err((error, console.tail()))
            }
        }
    }

    /// Boots it.
    pub async fn boot(&self) -> Launched {
        self.launch(Memory::Anonymous, Start::Boot).await.unwrap()
    }

    /// Boots it, and saves it, paused, at a place of that name.
    pub async fn boot_and_save(&self, name: &str, extent: Extent) -> (Launched, Saved) {
        let vm = self.boot().await;
        vm.machine.pause().await.unwrap();
        let place = self.place(name);
        place.save(vm.machine.as_ref(), extent).await.unwrap();
        (vm, place)
    }

    /// Launches a VMM that waits for what is at `place` to be loaded.
    pub async fn wait_for(&self, place: &Saved) -> Launched {
        self.launch(Memory::CopyOf(place.memory.clone()), Start::Paused).await.unwrap()
    }

    /// A place to save it at, with an empty memory.
    pub fn place(&self, name: &str) -> Saved {
        Saved {
            state: self.home.add_file(&format!("{name}.state")).unwrap(),
            memory: self.home.add_file(&format!("{name}.memory")).unwrap(),
        }
    }

    /// Where `other` was saved, as files of this VM's.
    pub fn copy_of(&self, other: &Saved, name: &str) -> Saved {
        let place = self.place(name);
        fs::copy(&other.state, &place.state).unwrap();
        fs::copy(&other.memory, &place.memory).unwrap();
        place
    }

    /// Ends its VMM; what it was saved to becomes readable to others, as a host makes it.
    pub async fn end_but_keep(&self, vm: &Launched) {
        vm.process.kill().await.unwrap();
        for entry in fs::read_dir(self.home.dir()).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o444)).unwrap();
            }
        }
    }

    /// Ends it, and sees that nothing of it is left.
    pub async fn end(self) {
        let pids = self.cgroup.processes().unwrap();
        self.cgroup.kill().await.unwrap();
        self.cgroup.destroy().await.unwrap();
        if let (Some((_, network)), Some(number)) = (&self.bed.network, self.home.network().unwrap()) {
            network.release(number).await.unwrap();
        }
        // What a launch was about when it was given up may still be put there.
        while let Err(error) = fs::remove_dir_all(self.home.dir()) {
            assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty, "{error}");
        }
        for pid in pids {
            assert!(!Path::new(&format!("/proc/{pid}/exe")).exists(), "process {pid} is left");
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(self.home.vm()), "a mount is left");
    }
}

/// Where a VM is saved.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Its devices.
    pub state: PathBuf,
    /// Its memory.
    pub memory: PathBuf,
}

impl Saved {
    /// Saves it there.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub async fn save(&self, machine: &dyn Machine, extent: Extent) -> Result<(), VmmError> {
        machine.save(&self.state, Some(SavedMemory { file: &self.memory, extent })).await
    }

    /// What its memory takes on the disk, bytes.
    pub fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(&self.memory).unwrap().blocks() * 512
    }
}

/// The message of a refusal.
pub fn refused<T: std::fmt::Debug>(result: Result<T, VmmError>) -> String {
    match result.unwrap_err() {
        VmmError::Refused { message, .. } | VmmError::Snapshot(message) => message,
        other => panic!("{other:?}"),
    }
}

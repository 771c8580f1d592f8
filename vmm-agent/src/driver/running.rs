//! A VM that runs, and the ways to get one: a boot, a clone of a golden snapshot, and what a snapshot of a VM makes go on.

use std::{future::Future, io, sync::Arc, time::Duration};

use tokio::task::spawn_blocking;

use super::{
    cgroup::Cgroup,
    console::Console,
    golden::Golden,
    graft,
    guest_link::GuestLink,
    home::Home,
    pages::GuestMemory,
    parts::{Bootable, Parts},
    ports::Ports,
    process::Process,
    snapshot::{Manifest, Place, Source},
    vmm::{Graft, Launch, Machine, Memory, Start, VmmError},
};
use crate::{
    fail,
    microvm::{Kind, MakeError},
    telemetry,
};

/// A boot takes 4 s under emulation at rest (measured); with every CPU busy several times that.
pub const BOOT_WITHIN: Duration = Duration::from_secs(60);
/// Between two tries to reach a guest that boots.
const BOOT_STEP: Duration = Duration::from_millis(5);

impl From<VmmError> for MakeError {
    fn from(error: VmmError) -> Self {
        Self::Backend(error.to_string())
    }
}

/// A VM whose process was started or found.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub process: Process,
    /// Its VMM.
    pub machine: Box<dyn Machine>,
    /// The way to its guest.
    pub link: GuestLink,
    /// The way to its guest's ports, if it has a network.
    pub ports: Option<Ports>,
    /// Its console; only if this agent started it.
    pub console: Option<Console>,
}

impl Running {
    /// Boots a VM in `home`, whose layer is there. Its guest answers then.
    ///
    /// # Errors
    ///
    /// [`MakeError`]; a process may be in `cgroup`.
    pub async fn boot(
        parts: &Parts,
        home: &Home,
        cgroup: &Cgroup,
        (bootable, kind): (&Bootable, &Kind),
        memory: Memory,
    ) -> Result<Self, MakeError> {
        let running = Self::launch(parts, home, cgroup, (bootable, kind), memory, Start::Boot).await?;
        let up = async {
            while let Err(error) = running.link.connect().await {
                let console = running.console.as_ref().map(Console::tail);
                tracing::debug!(%error, console, "the guest is not up yet");
                // A VMM may say so at once.
                tokio::time::sleep(BOOT_STEP).await;
            }
        };
        let up = tokio::time::timeout(BOOT_WITHIN, running.unless_it_ends(up)).await;
        match up {
            Ok(Ok(())) => Ok(running),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(running.failed(&format!("its guest was not up within {BOOT_WITHIN:?}"))),
        }
    }

    /// Starts a clone of `golden` in `home`, whose layer is there. It is paused then.
    ///
    /// # Errors
    ///
    /// [`VmmError::Snapshot`] if the snapshot is no good; a process may be in `cgroup`.
    pub async fn clone_of(
        golden: &Golden,
        parts: &Parts,
        home: &Home,
        cgroup: &Cgroup,
        kind: &Kind,
    ) -> Result<Self, CloneError> {
        let base = golden.memory();
        on_disk(home, move |home| home.keep_base(&base)).await?;
        let memory = Memory::CopyOf(home.base());
        let of = (parts.bootable(&kind.template)?, kind);
        let running = Self::launch(parts, home, cgroup, of, memory, Start::Paused).await?;
        match running.unless_it_ends(telemetry::step("load", running.machine.load(&golden.state()))).await? {
            Ok(()) => Ok(running),
            Err(VmmError::Snapshot(reason)) => Err(CloneError::Snapshot(reason)),
            Err(error) => Err(MakeError::from(error).into()),
        }
    }

    /// Starts a VM in `home`, whose layer is there, from the memory and devices of the snapshot at `place`. It is paused
    /// then, as it was.
    ///
    /// # Errors
    ///
    /// [`MakeError::Unusable`] if the snapshot is no good; a process may be in `cgroup`.
    pub async fn of_snapshot(
        parts: &Arc<Parts>,
        place: &Place,
        home: &Home,
        cgroup: &Cgroup,
        kind: &Kind,
    ) -> Result<Self, MakeError> {
        let read = place.clone();
        let read = unless_damaged(home, move |_| read.read()).await?;
        let manifest = read.ok_or_else(|| MakeError::Unusable("there is none".into()))?;
        let bootable = parts.bootable_of(&manifest.origin);
        let bootable = bootable.filter(|bootable| parts.origin(bootable, kind) == manifest.origin);
        let Some(bootable) = bootable else {
            return Err(MakeError::Unusable("it is of another VMM, CPU, kernel or base image".into()));
        };
        let (from, known) = (place.clone(), parts.clone());
        let ready = move |home: &Home| {
            from.verify_memory(&manifest, &known.verified)?;
            home.keep_base(&from.memory())?;
            let state = home.state_to_load(|file| from.copy_state(file))?;
            Ok((manifest, state))
        };
        let (manifest, state) = telemetry::step("verify", unless_damaged(home, ready)).await?;
        let memory = Memory::CopyOf(home.base());
        let running = Self::launch(parts, home, cgroup, (bootable, kind), memory, Start::Paused).await?;
        fail::pass(fail::START_LAUNCHED, home.vm())?;
        // Before the devices: they look at what the guest has left them there.
        if manifest.pages_bytes() > 0 {
            let memory = running.memory(kind.memory_mb).await?;
            let from = place.clone();
            let pages = unless_damaged(home, move |_| from.load_pages(&manifest, &memory));
            running.unless_it_ends(telemetry::step("pages", pages)).await??;
        }
        fail::pass(fail::START_PAGED, home.vm())?;
        match running.unless_it_ends(telemetry::step("load", running.machine.load(&state))).await? {
            Ok(()) => {
                fail::pass(fail::START_LOADED, home.vm())?;
                on_disk(home, Home::forget_state).await?;
                Ok(running)
            }
            Err(VmmError::Snapshot(reason)) => Err(MakeError::Unusable(reason)),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes it, a clone that is paused, the VM whose state is the snapshot at `place`. Its layer is in `home` already.
    ///
    /// # Errors
    ///
    /// [`MakeError`]: it is only good for being ended.
    pub async fn graft(
        &self,
        home: &Home,
        place: Place,
        manifest: Manifest,
        kind: &Kind,
    ) -> Result<(), MakeError> {
        // Before its memory is looked at: that it is closed is written there.
        self.link.hang_up().await;
        let memory = self.memory(kind.memory_mb).await?;
        let of_clone = memory.clone();
        let plan = unless_damaged(home, move |_| {
            let target = graft::Memory::of(&place, &manifest, of_clone.bytes)?;
            let patches = target.patches(&of_clone)?;
            Ok((patches, place.read_state()?, target))
        });
        let (patches, state, target) = self.unless_it_ends(telemetry::step("graft_plan", plan)).await??;
        let graft = Graft { home, patches: &patches, state: &state };
        self.unless_it_ends(telemetry::step("graft", self.machine.graft(&graft))).await??;
        let verified = on_disk(home, move |_| target.verify(&memory));
        telemetry::step("graft_verify", verified).await
    }

    /// Where its guest's memory is.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the VMM.
    pub async fn memory(&self, memory_mb: u32) -> Result<GuestMemory, MakeError> {
        let address = self.machine.memory_address().await?;
        Ok(GuestMemory { process: self.process.clone(), address, bytes: u64::from(memory_mb) << 20 })
    }

    /// Where a capture of it takes its memory from.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the VMM.
    pub async fn source(&self, parts: &Parts, memory_mb: u32) -> Result<Source, MakeError> {
        Ok(match parts.vmm.saves_memory() {
            true => Source::Vmm { bytes: u64::from(memory_mb) << 20 },
            false => Source::Process(self.memory(memory_mb).await?),
        })
    }

    /// Takes over the VMM in `home` that an earlier agent started; `None` if there is none any more.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if it does not answer.
    pub async fn adopt(parts: &Parts, home: &Home, cgroup: &Cgroup) -> Result<Option<Self>, MakeError> {
        let failed = |error: io::Error| MakeError::Backend(format!("cannot look for its process: {error}"));
        let [pid] = cgroup.processes().map_err(failed)?[..] else { return Ok(None) };
        let Ok(process) = Process::open(pid) else { return Ok(None) };
        // Still in the group: the number is no other process's by now.
        if cgroup.processes().map_err(failed)? != [pid] {
            return Ok(None);
        }
        let machine = parts.vmm.attach(home).await?;
        let ports = parts.interfaces.ports(home)?;
        let link = GuestLink::new(parts.vmm.clone(), home.clone());
        Ok(Some(Self { process, machine, link, ports, console: None }))
    }

    async fn launch(
        parts: &Parts,
        home: &Home,
        cgroup: &Cgroup,
        (bootable, kind): (&Bootable, &Kind),
        memory: Memory,
        start: Start,
    ) -> Result<Self, MakeError> {
        let origin = parts.origin(bootable, kind);
        let ready = move |home: &Home| {
            home.forget_previous()?;
            origin.write(home)
        };
        on_disk(home, ready).await?;
        parts.create_group(cgroup, kind)?;
        let network = telemetry::step("network", parts.interfaces.plug(home)).await?;
        let ports = parts.interfaces.ports(home)?;
        fail::pass(fail::START_PLUGGED, home.vm())?;
        let (console, writer) = Console::open().map_err(VmmError::Start)?;
        let launch = Launch {
            home,
            cgroup,
            kind,
            kernel: &bootable.template.kernel(),
            initramfs: &bootable.initramfs.path,
            rootfs: &bootable.template.rootfs(),
            memory,
            start,
            network,
            console: writer,
        };
        match telemetry::step("launch", parts.vmm.launch(launch)).await {
            Ok((process, machine)) => {
                let link = GuestLink::new(parts.vmm.clone(), home.clone());
                Ok(Self { process, machine, link, ports, console: Some(console) })
            }
            // What it has to say is on its console, if it came as far.
            Err(error) => Err(with_console(&error.to_string(), &console)),
        }
    }

    /// Waits for `work`, but not longer than the VMM lives.
    async fn unless_it_ends<T>(&self, work: impl Future<Output = T>) -> Result<T, MakeError> {
        tokio::select! {
            done = work => Ok(done),
            () = self.process.exit() => Err(self.failed("the VMM ended")),
        }
    }

    fn failed(&self, what: &str) -> MakeError {
        match &self.console {
            Some(console) => with_console(what, console),
            None => MakeError::Backend(what.to_owned()),
        }
    }
}

fn with_console(what: &str, console: &Console) -> MakeError {
    let tail = console.tail();
    let last = tail.lines().last().unwrap_or("nothing");
    MakeError::Backend(format!("{what}; its console says: {last}"))
}

/// Why there is no clone.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// The snapshot is no good; another may be.
    #[error("the golden snapshot is no good: {0}")]
    Snapshot(String),
    /// Anything else.
    #[error(transparent)]
    Other(#[from] MakeError),
}

/// Puts a copy of `layer` into `home`.
///
/// # Errors
///
/// [`MakeError::Backend`] if the disk does not take it.
pub async fn add_layer(home: &Home, layer: std::path::PathBuf) -> Result<(), MakeError> {
    telemetry::step("layer", on_disk(home, move |home| home.add_layer(&layer))).await.map(drop)
}

/// Reads a snapshot, on a thread of its own.
///
/// # Errors
///
/// [`MakeError::Unusable`] if it is damaged.
pub async fn unless_damaged<T: Send + 'static>(
    home: &Home,
    work: impl FnOnce(&Home) -> io::Result<T> + Send + 'static,
) -> Result<T, MakeError> {
    let home = home.clone();
    let done = spawn_blocking(move || work(&home)).await;
    done.map_err(|panic| MakeError::Backend(panic.to_string()))?.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => MakeError::Unusable(error.to_string()),
        _ => MakeError::Backend(error.to_string()),
    })
}

/// Does what may wait for the disk, on a thread of its own.
///
/// # Errors
///
/// [`MakeError::Backend`] with the disk's reason.
pub async fn on_disk<T: Send + 'static>(
    home: &Home,
    work: impl FnOnce(&Home) -> io::Result<T> + Send + 'static,
) -> Result<T, MakeError> {
    let home = home.clone();
    let done = spawn_blocking(move || work(&home).map_err(|error| (home, error))).await;
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err((home, error))) => Err(MakeError::Backend(format!("{}: {error}", home.dir().display()))),
        Err(panic) => Err(MakeError::Backend(panic.to_string())),
    }
}

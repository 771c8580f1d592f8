//! A VM that runs, and the two ways to get one: a boot, and a clone of a golden snapshot.

use std::{future::Future, io, time::Duration};

use tokio::task::spawn_blocking;

use super::{
    cgroup::Cgroup,
    console::Console,
    golden::Golden,
    guest_link::GuestLink,
    home::Home,
    parts::Parts,
    process::Process,
    vmm::{Launch, Machine, Memory, Start, VmmError},
};
use crate::{
    microvm::{Kind, MakeError},
    telemetry,
};

/// A boot takes 4 s under emulation at rest (measured); with every CPU busy several times that.
pub const BOOT_WITHIN: Duration = Duration::from_secs(60);

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
    /// Its console; only if this agent started it.
    pub console: Option<Console>,
}

impl Running {
    /// Boots `kind` in `home`, whose layer is there. Its guest answers then.
    ///
    /// # Errors
    ///
    /// [`MakeError`]; a process may be in `cgroup`.
    pub async fn boot(
        parts: &Parts,
        home: &Home,
        cgroup: &Cgroup,
        kind: &Kind,
        memory: Memory,
    ) -> Result<Self, MakeError> {
        let running = Self::launch(parts, home, cgroup, kind, memory, Start::Boot).await?;
        let up = async {
            while let Err(error) = running.link.connect().await {
                let console = running.console.as_ref().map(Console::tail);
                tracing::debug!(%error, console, "the guest is not up yet");
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
        let memory = Memory::CopyOf(golden.memory());
        let running = Self::launch(parts, home, cgroup, kind, memory, Start::Paused).await?;
        match running.unless_it_ends(telemetry::step("load", running.machine.load(&golden.state()))).await? {
            Ok(()) => Ok(running),
            Err(VmmError::Snapshot(reason)) => Err(CloneError::Snapshot(reason)),
            Err(error) => Err(MakeError::from(error).into()),
        }
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
        Ok(Some(Self { process, machine, link: GuestLink::new(home.clone()), console: None }))
    }

    async fn launch(
        parts: &Parts,
        home: &Home,
        cgroup: &Cgroup,
        kind: &Kind,
        memory: Memory,
        start: Start,
    ) -> Result<Self, MakeError> {
        let bootable = parts.bootable(&kind.template)?;
        parts.create_group(cgroup, kind)?;
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
            console: writer,
        };
        match telemetry::step("launch", parts.vmm.launch(launch)).await {
            Ok((process, machine)) => {
                Ok(Self { process, machine, link: GuestLink::new(home.clone()), console: Some(console) })
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
    telemetry::step("layer", on_disk(home, move |home| home.add_layer(&layer))).await
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

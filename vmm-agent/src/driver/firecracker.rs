//! Firecracker under its jailer: for each VM a process in a jail, with a user, a control group, a mount, a network and a PID
//! namespace of its own, and with Firecracker's own filter of system calls (docs/decisions/0021).
//!
//! - [`version`]: which are supported; [`machine`]: what a VMM is told before it boots.
//! - [`jail`]: what it sees; [`spawn`]: how it gets there; [`api`]: how it is told; [`metrics`]: what it tells.
//! - [`fill`]: what its memory is filled with, where it cannot map that. [`probe`]: whether a guest boots here.

mod api;
mod fill;
mod jail;
mod machine;
mod metrics;
pub mod probe;
mod spawn;
pub mod version;

use std::{
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use nix::sys::statvfs::FsFlags;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

pub use self::machine::{Settings, boot_arguments};
use self::{
    api::{Api, CHANGE_LAYER, CHANGE_STATE, LOAD, MACHINE, SAVE, STATE},
    fill::Filler,
    jail::{GUEST, Jail},
    machine::in_jail,
    version::Version,
};
use super::{
    home::Home,
    process::Process,
    vmm::{Extent, Graft, Launch, Machine, Memory, SavedMemory, Start, Vmm, VmmError},
};
use crate::backend::Condition;

/// The port that the guest's first process listens on, on its vsock (`vmm-agent/guest/src/vsock.rs`).
const GUEST_PORT: u32 = 1024;
/// What a guest's VMM takes beside the guest's memory at most: its own is 5 MiB for a small guest (SPECIFICATION.md), and page
/// tables, connections and what it writes to disk come on top.
const OVERHEAD: u64 = 64 << 20;
/// Files that a VMM may have open: each connection of a host to its guest is one.
const MAX_FILES: u32 = 2048;
/// Size of a file that a VMM may write, bytes: as large as a disk may be.
const MAX_FILE: u64 = 16 << 40;
/// A jailer copies its program and makes three devices; the VMM's API is there 6 to 60 ms after that (SPECIFICATION.md).
const STARTS_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks for the API.
const STARTS_STEP: Duration = Duration::from_millis(1);
/// A VMM answers to a request for a connection at once, or closes it because nobody listens in the guest.
const CONNECTS_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of that answer: `OK`, and a number.
const MAX_GREETING: usize = 32;

/// What a VM is restored from, in its jail.
const MEMORY: &str = "memory";
const STATE_IN: &str = "state";
/// What it is saved to.
const MEMORY_OUT: &str = "saved.memory";
const STATE_OUT: &str = "saved.state";

/// Firecracker on this host.
#[derive(Debug)]
pub struct Firecracker {
    settings: Settings,
    program_name: String,
    version: Version,
    name: String,
    snapshot_format: String,
    host_kernel: String,
    has_network: bool,
}

impl Firecracker {
    /// Finds out which Firecracker there is, and that it can be used here.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to do.
    pub async fn find(settings: Settings, has_network: bool) -> Result<Self, String> {
        let (program, jailer) = (settings.firecracker.as_path(), settings.jailer.as_path());
        let version: Version = version::printed(program, "--version").await?.parse()?;
        version.check()?;
        let of_jailer: Version = version::printed(jailer, "--version").await?.parse()?;
        if of_jailer != version {
            return Err(format!(
                "the jailer is of version {of_jailer} and Firecracker of {version}: install both of one release"
            ));
        }
        let format = version::printed(program, "--snapshot-version").await?;
        let snapshot_format = format.lines().next().unwrap_or_default().trim_start_matches('v').to_owned();
        // The jailer takes the file that the path leads to in the end.
        let resolved = fs_err::canonicalize(program).map_err(|error| error.to_string())?;
        let program_name = resolved.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if !program_name.contains("firecracker") {
            return Err(format!(
                "{}: the jailer starts only what has `firecracker` in its file's name",
                resolved.display()
            ));
        }
        OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|error| {
            format!("/dev/kvm cannot be opened: {error}; Firecracker needs hardware virtualisation: load kvm_intel or kvm_amd, \
                     run the agent as root, or use --vmm qemu")
        })?;
        if settings.huge_pages && !has_huge_pages().map_err(|error| error.to_string())? {
            let remedy = "set vm.nr_hugepages, or run the agent without --huge-pages";
            return Err(format!("the host has set no huge pages aside: {remedy}"));
        }
        let name = format!("Firecracker {version}");
        let host_kernel = kernel_line(
            &nix::sys::utsname::uname().map_err(|error| error.to_string())?.release().to_string_lossy(),
        );
        Ok(Self { settings, program_name, version, name, snapshot_format, host_kernel, has_network })
    }

    /// Sees that VMMs can be jailed below `data_dir`.
    ///
    /// # Errors
    ///
    /// What is wrong with its filesystem, and what to do.
    pub fn fits(&self, data_dir: &Path) -> Result<(), String> {
        let flags = nix::sys::statvfs::statvfs(data_dir).map_err(|error| error.to_string())?.flags();
        for (flag, name) in [(FsFlags::ST_NODEV, "nodev"), (FsFlags::ST_NOEXEC, "noexec")] {
            if flags.contains(flag) {
                let place = data_dir.display();
                return Err(format!(
                    "{place} is mounted {name}: a jail has devices and a program in it; mount it without, or use another \
                     --data-dir"
                ));
            }
        }
        Ok(())
    }

    fn jailer(&self, home: &Home, namespace: Option<&Path>) -> Vec<String> {
        let (uid, base) = (home.uid().to_string(), home.jail());
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |option: &str, value: &str| arguments.extend([option.to_owned(), value.to_owned()]);
        add("--id", home.vm());
        add("--exec-file", &self.settings.firecracker.to_string_lossy());
        add("--uid", &uid);
        add("--gid", &uid);
        add("--chroot-base-dir", &base.to_string_lossy());
        add("--resource-limit", &format!("no-file={MAX_FILES}"));
        add("--resource-limit", &format!("fsize={MAX_FILE}"));
        if let Some(namespace) = namespace {
            add("--netns", &namespace.to_string_lossy());
        }
        // Of control groups it is told nothing: it is in the VM's already, whichever version the host has.
        arguments.extend(["--new-pid-ns".to_owned(), "--".to_owned()]);
        let mut add = |option: &str, value: &str| arguments.extend([option.to_owned(), value.to_owned()]);
        add("--api-sock", &in_jail(jail::API));
        add("--metrics-path", &in_jail(jail::METRICS));
        // It logs each call otherwise, where its guest's console is.
        add("--level", "Warning");
        arguments
    }

    fn machine(&self, home: &Home, jail: Jail, memory: Option<PathBuf>) -> Result<Microvm, VmmError> {
        let reader = jail.open_metrics().and_then(|fifo| metrics::Reader::open(fifo, home.vm()));
        if let Err(error) = &reader {
            warn!(vm = home.vm(), %error, "what the VMM counts is not read");
        }
        let api = Api::of(jail.clone());
        let (home, version) = (home.clone(), self.version);
        let filled_from = memory.filter(|_| self.settings.huge_pages);
        Ok(Microvm { home, jail, api, version, filled_from, _metrics: reader.ok() })
    }
}

/// Whether the host has set huge pages aside.
fn has_huge_pages() -> io::Result<bool> {
    let pages = fs_err::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")?;
    Ok(pages.trim() != "0")
}

/// The line of kernels that a release is of: snapshots are for hosts of one line (docs/snapshotting/snapshot-support.md).
fn kernel_line(release: &str) -> String {
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

#[tonic::async_trait]
impl Vmm for Firecracker {
    fn version(&self) -> &str {
        &self.name
    }

    fn accelerator(&self) -> &'static str {
        "kvm"
    }

    fn snapshot_key(&self) -> String {
        let (name, format, kernel) = (&self.name, &self.snapshot_format, &self.host_kernel);
        // What its machine is, its CPU template with it, and what its kernel is told stands there.
        let kind = crate::microvm::Kind { template: String::new(), cpu_count: 1, memory_mb: 1 };
        let network =
            self.has_network.then_some((crate::network::plan::GUEST_MAC, crate::network::plan::TAP));
        let unlimited = Settings { disk_mib: None, disk_iops: None, ..self.settings.clone() };
        let machine: Vec<_> = machine::calls(&unlimited, &kind, network)
            .into_iter()
            .map(|(_, body)| body.to_string())
            .collect();
        format!("{name} {format} {kernel} {}", machine.concat())
    }

    fn overhead_bytes(&self) -> u64 {
        OVERHEAD
    }

    fn snapshot_format(&self) -> Option<&str> {
        Some(&self.snapshot_format)
    }

    fn host_kernel(&self) -> Option<&str> {
        Some(&self.host_kernel)
    }

    fn links_files(&self) -> bool {
        true
    }

    fn saves_memory(&self) -> bool {
        true
    }

    fn grafts(&self) -> bool {
        false
    }

    async fn launch(&self, launch: Launch<'_>) -> Result<(Process, Box<dyn Machine>), VmmError> {
        let home = launch.home.clone();
        let mut lent: Vec<(PathBuf, &'static str)> =
            vec![(launch.rootfs.to_owned(), machine::BASE), (home.layer(), machine::LAYER)];
        if launch.start == Start::Boot {
            lent.push((launch.kernel.to_owned(), machine::KERNEL));
            lent.push((launch.initramfs.to_owned(), machine::INITRAMFS));
        }
        let memory = match launch.memory {
            Memory::CopyOf(image) => Some(image),
            _ => None,
        };
        lent.extend(memory.iter().map(|image| (image.clone(), MEMORY)));
        let (of, program) = (home.clone(), self.program_name.clone());
        let jail = on_disk(move || {
            let jail = Jail::create(&of, &program)?;
            lent.iter().try_for_each(|(from, name)| jail.lend(from, name))?;
            Ok(jail)
        })
        .await
        .map_err(VmmError::Start)?;
        let network = launch.network.as_ref().map(|network| (network.mac, network.tap));
        let namespace = launch.network.as_ref().map(|network| network.namespace.clone());
        // The VMM opens the TAP itself, which only one can have open.
        drop(launch.network);
        let plan = spawn::Plan {
            program: self.settings.jailer.clone(),
            arguments: self.jailer(&home, namespace.as_deref()),
            entrances: launch.cgroup.entrances().map_err(VmmError::Start)?,
            console: launch.console,
            has_network: namespace.is_some(),
        };
        let started = timeout(STARTS_WITHIN, spawn::jail(plan)).await;
        let status =
            started.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(VmmError::Start)?;
        if !status.success() {
            return Err(VmmError::Start(io::Error::other(format!("the jailer ended: {status}"))));
        }
        let processes = launch.cgroup.processes().map_err(VmmError::Start)?;
        let [pid] = processes[..] else {
            return Err(VmmError::Start(io::Error::other("the VMM ended at once")));
        };
        let process = Process::open(pid).map_err(VmmError::Start)?;
        let machine = self.machine(&home, jail, memory)?;
        machine.answers(&process).await?;
        if launch.start == Start::Boot {
            for (call, body) in machine::calls(&self.settings, launch.kind, network) {
                machine.api.call(call, Some(&body)).await?;
            }
        }
        Ok((process, Box::new(machine)))
    }

    async fn attach(&self, home: &Home) -> Result<Box<dyn Machine>, VmmError> {
        let machine = self.machine(home, Jail::find(home).map_err(VmmError::Lost)?, None)?;
        machine.api.call(STATE, None).await?;
        Ok(Box::new(machine))
    }

    async fn dial(&self, home: &Home) -> io::Result<UnixStream> {
        dial(&Jail::find(home)?).await
    }
}

/// Connects to the guest's port: the VMM is asked for it in a line, and answers in one (docs/vsock.md).
async fn dial(jail: &Jail) -> io::Result<UnixStream> {
    let mut stream = jail.connect(GUEST).await?;
    let greeted = timeout(CONNECTS_WITHIN, async {
        stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes()).await?;
        let mut greeting = Vec::new();
        // Byte by byte: what follows is the guest's.
        while greeting.last() != Some(&b'\n') && greeting.len() < MAX_GREETING {
            match stream.read_u8().await {
                Ok(byte) => greeting.push(byte),
                Err(_) => {
                    let message = "nobody listens in the guest";
                    return Err(io::Error::new(io::ErrorKind::ConnectionRefused, message));
                }
            }
        }
        match greeting.strip_prefix(b"OK ") {
            Some(_) => Ok(()),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM does not speak of a connection")),
        }
    });
    greeted.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(stream)
}

async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

#[derive(Debug)]
struct Microvm {
    home: Home,
    jail: Jail,
    api: Api,
    version: Version,
    /// The image that its memory is filled from when it is restored, if it does not map that.
    filled_from: Option<PathBuf>,
    _metrics: Option<metrics::Reader>,
}

impl Microvm {
    /// Waits until the API answers.
    async fn answers(&self, process: &Process) -> Result<(), VmmError> {
        let deadline = Instant::now() + STARTS_WITHIN;
        let tries = async {
            loop {
                match self.api.call(STATE, None).await {
                    Ok(_) => return Ok(()),
                    Err(error) if Instant::now() >= deadline => return Err(error),
                    Err(_) => sleep(STARTS_STEP).await,
                }
            }
        };
        tokio::select! {
            answered = tries => answered,
            () = process.exit() => Err(VmmError::Start(io::Error::other("the VMM ended at once"))),
        }
    }

    async fn change_state(&self, state: &str) -> Result<(), VmmError> {
        self.api.call(CHANGE_STATE, Some(&json!({ "state": state }))).await.map(drop)
    }

    /// Lends a file for the length of one call.
    async fn lend(&self, from: &Path, name: &'static str) -> Result<(), VmmError> {
        let (jail, from) = (self.jail.clone(), from.to_owned());
        on_disk(move || jail.lend(&from, name)).await.map_err(VmmError::Lost)
    }

    fn take_back(&self, names: &[&str]) {
        for name in names {
            if let Err(error) = self.jail.take_back(name) {
                debug!(vm = self.home.vm(), name, %error, "a VMM keeps a name of a file");
            }
        }
    }

    /// What the VMM calls so much of its memory, if it does write that where it belongs.
    async fn snapshot_type(&self, extent: Extent) -> Result<&'static str, VmmError> {
        if extent == Extent::All {
            return Ok("Full");
        }
        let machine = self.api.call(MACHINE, None).await?;
        let memory_mb = machine.get("mem_size_mib").and_then(Value::as_u64).unwrap_or(u64::MAX);
        let memory_mb = u32::try_from(memory_mb).unwrap_or(u32::MAX);
        // Which pages of a memory of huge ones are written, nobody remembers.
        let pages = machine.get("huge_pages").and_then(Value::as_str);
        let tells_changes = pages.is_none_or(|pages| pages != machine::HUGE_PAGES);
        Ok(if tells_changes && self.version.writes_changes_of(memory_mb) { "Diff" } else { "Full" })
    }

    /// Loads what `from` says, while its memory is filled from `image`.
    async fn load_filled(&self, mut from: Value, image: &Path) -> Result<(), VmmError> {
        let filler = Filler::listen(self.jail.clone(), image.to_owned()).map_err(VmmError::Lost)?;
        from["mem_backend"] = json!({ "backend_type": "Uffd", "backend_path": in_jail(fill::SOCKET) });
        let (mut loading, mut filling) = (pin!(self.api.call(LOAD, Some(&from))), pin!(filler.fill()));
        let unfilled = |error: io::Error| VmmError::Snapshot(format!("its memory cannot be filled: {error}"));
        let done = tokio::select! {
            loaded = &mut loading => match loaded {
                Ok(_) => filling.await.map_err(unfilled),
                // It may not have asked for its memory, and never will.
                Err(error) => Err(error),
            },
            filled = &mut filling => match filled {
                Ok(()) => loading.await.map(drop),
                Err(error) => Err(unfilled(error)),
            },
        };
        self.take_back(&[fill::SOCKET]);
        done
    }
}

#[tonic::async_trait]
impl Machine for Microvm {
    async fn resume(&self) -> Result<(), VmmError> {
        self.change_state("Resumed").await
    }

    async fn condition(&self) -> Result<Condition, VmmError> {
        let state = self.api.call(STATE, None).await?;
        Ok(match state.get("state").and_then(Value::as_str) {
            Some("Not started") => Condition::Stopped("it has no guest".to_owned()),
            // A write that the host's disk does not take fails in the guest; a guest that resets ends its VMM.
            _ => Condition::Runs,
        })
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.change_state("Paused").await
    }

    async fn save(&self, state: &Path, memory: Option<SavedMemory<'_>>) -> Result<(), VmmError> {
        let Some(memory) = memory else {
            let message = "it is not told where the memory goes".to_owned();
            return Err(VmmError::Refused { command: "to be saved", message });
        };
        let snapshot_type = self.snapshot_type(memory.extent).await?;
        self.lend(state, STATE_OUT).await?;
        self.lend(memory.file, MEMORY_OUT).await?;
        let to = json!({
            "snapshot_type": snapshot_type,
            "snapshot_path": in_jail(STATE_OUT),
            "mem_file_path": in_jail(MEMORY_OUT),
        });
        let saved = self.api.call(SAVE, Some(&to)).await;
        self.take_back(&[STATE_OUT, MEMORY_OUT]);
        saved.map(drop)
    }

    async fn load(&self, state: &Path) -> Result<(), VmmError> {
        self.lend(state, STATE_IN).await?;
        let from = json!({
            "snapshot_path": in_jail(STATE_IN),
            "mem_backend": { "backend_type": "File", "backend_path": in_jail(MEMORY) },
            self.version.tracking_field(): self.filled_from.is_none(),
            "resume_vm": false,
        });
        let loaded = match &self.filled_from {
            Some(image) => self.load_filled(from, image).await,
            None => self.api.call(LOAD, Some(&from)).await.map(drop),
        };
        self.take_back(&[STATE_IN]);
        match loaded {
            Err(VmmError::Refused { message, .. }) => Err(VmmError::Snapshot(message)),
            loaded => loaded,
        }
    }

    async fn graft(&self, _: &Graft<'_>) -> Result<(), VmmError> {
        Err(VmmError::Refused {
            command: "a graft",
            message: "it takes a state on only when it starts".into(),
        })
    }

    async fn memory_address(&self) -> Result<u64, VmmError> {
        Err(VmmError::Refused {
            command: "its memory's address",
            message: "it writes its memory itself".into(),
        })
    }

    async fn grow_layer(&self, bytes: u64) -> Result<(), VmmError> {
        let layer = self.home.layer();
        let grown = on_disk(move || OpenOptions::new().write(true).open(layer)?.set_len(bytes)).await;
        grown.map_err(VmmError::Lost)?;
        let change = json!({ "drive_id": machine::LAYER, "path_on_host": in_jail(machine::LAYER) });
        self.api.call(CHANGE_LAYER, Some(&change)).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_one_line_of_kernels_are_alike() {
        assert_eq!(kernel_line("6.1.0-37-cloud-amd64"), "6.1");
        assert_eq!(kernel_line("5.10.245"), kernel_line("5.10.1-x"));
        assert_ne!(kernel_line("6.1.1"), kernel_line("6.18.1"));
    }
}

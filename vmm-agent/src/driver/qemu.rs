//! QEMU's `microvm` machine, one process for each VM: a kernel, two disks and one serial port, without PCI and firmware.

mod arguments;
mod debug;
mod graft;
mod qmp;
mod spawn;
pub mod tsc;
mod vmstate;

use std::{fs::File, io, path::Path, process::Stdio, time::Duration};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout},
};
use tracing::warn;

pub use self::arguments::Accelerator;
use self::{arguments::Machine as Model, qmp::Qmp};
use super::{
    home::{self, Home},
    process::Process,
    userfaultfd,
    vmm::{Graft, Launch, Machine, SavedMemory, Start, Vmm, VmmError},
};
use crate::backend::Condition;

/// The memory's backend.
const MEMORY: &str = "ram";
/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// What is loaded before it (`vmm-agent/preload`).
const PRELOAD: &str = "liboc_preload.so";
/// How long device state may take to save or load: a few milliseconds, but the host may be busy.
const MIGRATION_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks at a migration.
const MIGRATION_STEP: Duration = Duration::from_micros(500);
/// What a guest has said is read as it comes.
const SAID_WITHIN: Duration = Duration::from_secs(2);
/// How long the program may take to print its version.
const VERSION_WITHIN: Duration = Duration::from_secs(20);

/// QEMU on this host.
#[derive(Debug)]
pub struct Qemu {
    version: String,
    accelerator: Accelerator,
    tsc_khz: u64,
    preload: Option<File>,
    has_network: bool,
}

impl Qemu {
    /// Finds out which QEMU there is. Whether VMs have a network is part of what they are: a snapshot knows its devices.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub async fn find(accelerator: Accelerator, has_network: bool) -> io::Result<Self> {
        let preload = preload();
        if let Err(reason) = &preload {
            warn!(%reason, "captures of a sandbox will cost what it changed since it was started");
        }
        let (version, tsc_khz) = (version().await?, tsc::measure_khz().await);
        Ok(Self { version, accelerator, tsc_khz, preload: preload.ok(), has_network })
    }
}

/// What is loaded into QEMU's process so that its writes to the guest's memory can be told; beside this program.
fn preload() -> io::Result<File> {
    if !userfaultfd::is_supported() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel does not remember which pages are written",
        ));
    }
    let path = std::env::current_exe()?.with_file_name(PRELOAD);
    File::open(&path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// The version that [`PROGRAM`] prints.
///
/// # Errors
///
/// If it is not there or prints none.
pub async fn version() -> io::Result<String> {
    let output = tokio::process::Command::new(PROGRAM)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output =
        timeout(VERSION_WITHIN, output).await.map_err(|_| io::ErrorKind::TimedOut)?.map_err(|error| {
            io::Error::new(error.kind(), format!("cannot run {PROGRAM}: {error}; install qemu-system-x86"))
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version =
        text.lines().next().and_then(|line| line.split("version ").nth(1)).and_then(|v| v.split(' ').next());
    version
        .map(|version| format!("QEMU {version}"))
        .ok_or_else(|| io::Error::other(format!("{PROGRAM} --version prints {text:?}")))
}

#[tonic::async_trait]
impl Vmm for Qemu {
    fn version(&self) -> &str {
        &self.version
    }

    fn accelerator(&self) -> &'static str {
        self.accelerator.name()
    }

    fn snapshot_key(&self) -> String {
        // All that the command line is made of stands in these files.
        let made_of = [include_str!("qemu/arguments.rs"), include_str!("command_line.rs")].concat();
        let arguments = hex::encode(&Sha256::digest(made_of)[..8]);
        let network = if self.has_network { "network" } else { "none" };
        let (option, cpu) = (self.accelerator.option(), self.accelerator.cpu());
        format!("{} {option} {cpu} {network} {arguments}", self.version)
    }

    fn overhead_bytes(&self) -> u64 {
        self.accelerator.overhead_bytes()
    }

    fn snapshot_format(&self) -> Option<&str> {
        None
    }

    fn host_kernel(&self) -> Option<&str> {
        None
    }

    fn links_files(&self) -> bool {
        false
    }

    fn saves_memory(&self) -> bool {
        false
    }

    fn grafts(&self) -> bool {
        self.accelerator == Accelerator::Tcg
    }

    async fn launch(&self, launch: Launch<'_>) -> Result<(Process, Box<dyn Machine>), VmmError> {
        let control = launch.home.listen(home::CONTROL).map_err(VmmError::Start)?;
        let guest = launch.home.listen(home::GUEST).map_err(VmmError::Start)?;
        let debug = match launch.start {
            Start::Paused if self.grafts() => Some(launch.home.listen(home::DEBUG).map_err(VmmError::Start)?),
            _ => None,
        };
        let model = Model {
            launch: &launch,
            accelerator: self.accelerator,
            tsc_khz: self.tsc_khz,
            control: &control,
            guest: &guest,
            debug: debug.as_ref(),
        };
        let arguments = model.arguments();
        let sockets = [Some(control), Some(guest), debug].into_iter().flatten().map(Into::into);
        let inherited = sockets.chain(launch.network.map(|network| network.fd)).collect();
        let entrances = launch.cgroup.entrances().map_err(VmmError::Start)?;
        let preload = self.preload.as_ref().map(File::try_clone).transpose().map_err(VmmError::Start)?;
        let (uid, console) = (launch.home.uid(), launch.console);
        let plan = spawn::Plan { arguments, inherited, entrances, uid, console, preload };
        let process = spawn::spawn(plan).await.map_err(VmmError::Start)?;
        // The socket is there already: QEMU takes the connection when it is ready.
        let qmp = Qmp::connect(launch.home).await?;
        Ok((process, Box::new(Microvm { qmp })))
    }

    async fn attach(&self, home: &Home) -> Result<Box<dyn Machine>, VmmError> {
        Ok(Box::new(Microvm { qmp: Qmp::connect(home).await? }))
    }

    async fn dial(&self, home: &Home) -> io::Result<UnixStream> {
        home.connect(home::GUEST).await
    }
}

#[derive(Debug)]
struct Microvm {
    qmp: Qmp,
}

impl Microvm {
    /// Waits until QEMU has handed on what the guest said last. What it holds when it is saved, or is hung up on, it never gives
    /// back: it tries to hand it on while nobody is connected, and then waits for ever for room (`flush_buf` in
    /// hw/char/virtio-console.c).
    async fn said(&self) -> Result<(), VmmError> {
        let queue = json!({ "path": arguments::PORTS_PATH, "queue": arguments::SAID_QUEUE });
        let deadline = Instant::now() + SAID_WITHIN;
        loop {
            let status = self.qmp.execute("x-query-virtio-queue-status", queue.clone()).await?;
            // Before the guest's driver has set it up there is none.
            if status.get("inuse").and_then(Value::as_u64).unwrap_or_default() == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(VmmError::Late {
                    command: "to hand on what the guest said",
                    within: SAID_WITHIN,
                });
            }
            sleep(MIGRATION_STEP).await;
        }
    }

    async fn migrated(&self) -> Result<(), VmmError> {
        let deadline = Instant::now() + MIGRATION_WITHIN;
        loop {
            let status = self.qmp.execute("query-migrate", json!({})).await?;
            match status.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let reason =
                        status.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
                    return Err(VmmError::Snapshot(reason.to_owned()));
                }
                _ if Instant::now() >= deadline => {
                    return Err(VmmError::Late { command: "query-migrate", within: MIGRATION_WITHIN });
                }
                _ => sleep(MIGRATION_STEP).await,
            }
        }
    }
}

#[tonic::async_trait]
impl Machine for Microvm {
    async fn resume(&self) -> Result<(), VmmError> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn condition(&self) -> Result<Condition, VmmError> {
        let status = self.qmp.execute("query-status", json!({})).await?;
        // RunState (qapi/run-state.json). A write that the host's disk does not take halts the VM by default.
        Ok(match status.get("status").and_then(Value::as_str) {
            Some("io-error") => Condition::DiskFull,
            Some(state @ ("internal-error" | "guest-panicked" | "shutdown" | "watchdog")) => {
                Condition::Stopped(state.to_owned())
            }
            _ => Condition::Runs,
        })
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.qmp.execute("stop", json!({})).await?;
        self.said().await
    }

    async fn save(&self, state: &Path, _: Option<SavedMemory<'_>>) -> Result<(), VmmError> {
        // Of all devices, and nothing but them; nothing of it is Xen's (qapi/migration.json).
        let to = json!({ "filename": state, "live": false });
        self.qmp.execute("xen-save-devices-state", to).await.map(drop)
    }

    async fn load(&self, state: &Path) -> Result<(), VmmError> {
        // It is to say what is wrong with a snapshot, rather than to end.
        let from = json!({ "uri": format!("file:{}", state.display()), "exit-on-error": false });
        self.qmp.execute("migrate-incoming", from).await?;
        self.migrated().await
    }

    async fn memory_address(&self) -> Result<u64, VmmError> {
        let blocks = self.qmp.execute("x-query-ramblock", json!({})).await?;
        let text = blocks.get("human-readable-text").and_then(Value::as_str).unwrap_or_default();
        memory_address(text).ok_or_else(|| VmmError::Refused {
            command: "x-query-ramblock",
            message: "it does not say where the guest's memory is".to_owned(),
        })
    }

    async fn grow_layer(&self, bytes: u64) -> Result<(), VmmError> {
        let node = graft::layer_node(&self.qmp).await?;
        self.qmp.execute("block_resize", json!({ "node-name": node, "size": bytes })).await.map(drop)
    }

    async fn graft(&self, graft: &Graft<'_>) -> Result<(), VmmError> {
        graft::perform(&self.qmp, graft).await
    }
}

/// The address of the guest's memory in QEMU's table of its blocks of memory: the columns' names, and a line for each
/// block, its name first (`ram_block_format` in QEMU's softmmu/physmem.c).
fn memory_address(table: &str) -> Option<u64> {
    let mut lines = table.lines();
    // The first column's name has two words, and the second one's values, such as `4 KiB`.
    let column = lines.next()?.split_whitespace().position(|name| name == "HVA")?;
    let mut blocks = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
    let memory = blocks.find(|block| block.first() == Some(&MEMORY))?;
    u64::from_str_radix(memory.get(column)?.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_found_among_the_blocks() {
        // As QEMU 10.0 prints it.
        let table = "
              Block Name    PSize              Offset               Used              Total                HVA  RO
                     ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fe5c3e00000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000004040000 0x0000000000001000 0x0000000000200000 0x00007fe60e000000  ro
";
        assert_eq!(memory_address(table.trim_start_matches('\n')), Some(0x7fe5_c3e0_0000));
        assert_eq!(memory_address("Block Name PSize\n ram 4 KiB 0x0"), None);
    }
}

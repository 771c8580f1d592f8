//! What a restore takes under Firecracker and its jailer, beside the same calls to a Firecracker that is nobody's.
//!
//! Until the state is loaded: what a guest does then needs a host on which it runs.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use oc_integration::{
    firecracker::{Bed, MEMORY_MB, settings},
    prepared,
};
use oc_vmm_agent::driver::vmm::Extent;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::table::{Table, Target, median, ms_since};

const ROUNDS: usize = 21;
/// VMs at once, to see what each takes of the agent.
const AT_ONCE: usize = 10;
const STARTS_WITHIN: Duration = Duration::from_secs(20);

/// Measures the restores.
pub async fn measure(table: &mut Table) -> anyhow::Result<()> {
    let bed = Bed::new().await;
    let origin = bed.vm("vm-origin");
    let (vm, golden) = origin.boot_and_save("golden", Extent::Changed).await;
    origin.end_but_keep(&vm).await;
    let bare = Bare::new().await?;

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        theirs.push(bare.restore().await?);
        let begun = Instant::now();
        let home = bed.vm("vm-clone");
        let clone = home.wait_for(&golden).await;
        clone.machine.load(&golden.state).await?;
        ours.push(ms_since(begun));
        home.end().await;
    }
    let (ours, theirs) = (median(&ours), median(&theirs));
    table.row("Firecracker alone: start to a loaded state", theirs, "ms", Target::None);
    table.row(
        "Firecracker under its jailer: home, jail, start to a loaded state",
        ours,
        "ms",
        Target::Most(40.0),
    );
    table.row("of that, what is ours and the jailer's", ours - theirs, "ms", Target::Most(15.0));

    let before = resident_kib()?;
    let mut crowd = Vec::new();
    for number in 0..AT_ONCE {
        let home = bed.vm(&format!("vm-{number}"));
        let clone = home.wait_for(&golden).await;
        clone.machine.load(&golden.state).await?;
        crowd.push((home, clone));
    }
    let each = resident_kib()?.saturating_sub(before) as f64 / AT_ONCE as f64;
    table.row("the agent's memory for each VM under Firecracker", each, "KiB", Target::Most(1024.0));
    for (home, _clone) in crowd {
        home.end().await;
    }
    origin.end().await;
    Ok(())
}

/// What this process, in which the driver is, has in memory.
fn resident_kib() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().next().context("no figure")?.parse()?)
}

/// Firecracker with no jailer and none of our code.
struct Bare {
    dir: tempfile::TempDir,
    program: PathBuf,
}

impl Bare {
    /// With a state to be restored.
    async fn new() -> anyhow::Result<Self> {
        let this = Self { dir: tempfile::TempDir::new_in("/var/tmp")?, program: settings().firecracker };
        let images = Path::new(prepared::IMAGES).join("base");
        fs::File::create(this.path("layer"))?.set_len(64 << 20)?;
        let mut child = this.start().await?;
        let drive = |id: &str, path: &Path, is_read_only: bool| json!({ "drive_id": id, "is_root_device": false, "is_read_only": is_read_only, "path_on_host": path });
        let calls = [
            (
                "PUT /machine-config",
                json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MB, "track_dirty_pages": true }),
            ),
            (
                "PUT /boot-source",
                json!({ "kernel_image_path": images.join("vmlinux"), "boot_args": "console=ttyS0 reboot=k" }),
            ),
            ("PUT /drives/base", drive("base", &images.join("rootfs.img"), true)),
            ("PUT /drives/layer", drive("layer", &this.path("layer"), false)),
            ("PUT /vsock", json!({ "guest_cid": 3, "uds_path": this.path("guest.sock") })),
            ("PUT /entropy", json!({})),
            ("PUT /balloon", json!({ "amount_mib": 0, "deflate_on_oom": true })),
            ("PUT /actions", json!({ "action_type": "InstanceStart" })),
            ("PATCH /vm", json!({ "state": "Paused" })),
            (
                "PUT /snapshot/create",
                json!({ "snapshot_type": "Diff", "snapshot_path": this.path("state"), "mem_file_path": this.path("memory") }),
            ),
        ];
        for (call, body) in calls {
            this.call(call, &body)?;
        }
        child.kill()?;
        child.wait()?;
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Restores it, and ends it. Milliseconds from the start until its state is loaded.
    async fn restore(&self) -> anyhow::Result<f64> {
        fs::remove_file(self.path("guest.sock"))?;
        let begun = Instant::now();
        let mut child = self.start().await?;
        let from = json!({
            "snapshot_path": self.path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": self.path("memory") },
            "enable_diff_snapshots": true,
        });
        self.call("PUT /snapshot/load", &from)?;
        let took = ms_since(begun);
        child.kill()?;
        child.wait()?;
        Ok(took)
    }

    async fn start(&self) -> anyhow::Result<Child> {
        let socket = self.path("api.sock");
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let child = Command::new(&self.program)
            .args(["--level", "Error", "--api-sock"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let begun = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            ensure!(begun.elapsed() < STARTS_WITHIN, "Firecracker does not listen");
            sleep(Duration::from_millis(1)).await;
        }
        Ok(child)
    }

    fn call(&self, call: &str, body: &Value) -> anyhow::Result<()> {
        let mut stream = UnixStream::connect(self.path("api.sock"))?;
        let body = body.to_string();
        write!(
            stream,
            "{call} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = [0; 512];
        let length = stream.read(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer[..length]);
        ensure!(answer.starts_with("HTTP/1.1 204"), "{call}: {answer}");
        Ok(())
    }
}

//! A mesh of one's own on this machine, made and ended by `oc up` and `oc down` as anybody's is.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use oc_vmm_agent::network::plan::Names;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::{leftovers, prepared, rest::Rest};

/// Whatever a test waits for on a busy machine with emulated guests.
pub const PATIENCE: Duration = Duration::from_secs(120);
const LOOKS_EVERY: Duration = Duration::from_millis(50);

/// A mesh in a state directory of its own. Dropped, it is ended without a look at what is left; see [`Mesh::stop`].
#[derive(Debug)]
pub struct Mesh {
    /// Removed with the mesh.
    _directory: TempDir,
    state: PathBuf,
    bin: PathBuf,
    host_id: String,
    options: Vec<String>,
    environment: Vec<(String, String)>,
    /// URL of the gateway.
    pub url: String,
    /// The administrator's key.
    pub key: String,
}

impl Mesh {
    /// Starts a mesh, and waits until it is ready. `options` are `oc up`'s.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn start(options: &[&str]) -> anyhow::Result<Self> {
        Self::start_in(None, options, &[])
    }

    /// As [`Mesh::start`], with its state directory at `place`, and in this environment.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn start_in(
        place: Option<&Path>,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::Builder::new().prefix("oc-mesh-").permissions(passable()).tempdir()?;
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let mut mesh = Self {
            state: place.map_or_else(|| directory.path().join("state"), Path::to_owned),
            _directory: directory,
            bin: prepared::binaries()?,
            // Control groups are called by it: nobody else on this machine has the same.
            host_id: format!("test-{}-{number}", std::process::id()),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            environment: environment
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            url: String::new(),
            key: String::new(),
        };
        mesh.up()?;
        Ok(mesh)
    }

    /// Starts it again after [`Mesh::down`], or takes over after its supervisor was killed.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn up(&mut self) -> anyhow::Result<()> {
        let mut command = self.oc();
        command.args(["up", "--detach", "--listen", "127.0.0.1:0", "--host-id", &self.host_id]);
        command.args(&self.options).envs(self.environment.iter().cloned());
        if let Err(error) = succeeded(command) {
            bail!("{error:#}\n{}", self.logs());
        }
        let exports = succeeded({
            let mut command = self.oc();
            command.arg("env");
            command
        })?;
        let value = |name: &str| -> anyhow::Result<String> {
            let line = exports.lines().find_map(|line| line.strip_prefix(&format!("export {name}=")));
            Ok(line.with_context(|| format!("oc env does not export {name}"))?.trim_matches('\'').to_owned())
        };
        self.url = value("OC_API_URL")?;
        self.key = value("OC_API_KEY")?;
        Ok(())
    }

    /// Stops it as an operator does.
    ///
    /// # Errors
    ///
    /// If `oc down` fails.
    pub fn down(&self) -> anyhow::Result<()> {
        let mut command = self.oc();
        command.arg("down");
        if let Err(error) = succeeded(command) {
            bail!("{error:#}\n{}", self.logs());
        }
        Ok(())
    }

    /// Stops it, and sees that it has left nothing.
    ///
    /// # Errors
    ///
    /// If it does not stop, or something is left.
    pub fn stop(self) -> anyhow::Result<()> {
        self.down()?;
        let left = leftovers::of(&self.state, &self.host_id)?;
        ensure!(left.is_empty(), "the mesh has left behind:\n{}", left.join("\n"));
        Ok(())
    }

    /// `oc` for this mesh.
    pub fn oc(&self) -> Command {
        let mut command = Command::new(self.bin.join("oc"));
        command.arg("--state-dir").arg(&self.state).stdin(Stdio::null());
        for name in ["OPENCOMPUTER_API_URL", "OPENCOMPUTER_API_KEY", "OC_STATE_DIR"] {
            command.env_remove(name);
        }
        if self.url.is_empty() {
            command.env_remove("OC_API_URL").env_remove("OC_API_KEY");
        } else {
            command.env("OC_API_URL", &self.url).env("OC_API_KEY", &self.key);
        }
        command
    }

    /// REST as its administrator.
    pub fn rest(&self) -> Rest {
        Rest::new(&self.url, &self.key)
    }

    /// Makes a key for a tenant; its ID, and REST with it.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub async fn rest_of_new_tenant(&self, tenant: &str) -> anyhow::Result<(String, Rest)> {
        let made = self.rest().post("/api/keys", json!({ "tenant": tenant })).await?.expect(201)?.json();
        let text = |value: &Value| value.as_str().context("no text").map(str::to_owned);
        Ok((text(&made["key"]["keyID"])?, Rest::new(&self.url, &text(&made["apiKey"])?)))
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// What the networks of its host's VMs are called.
    pub fn network_names(&self) -> Names {
        Names::new(&leftovers::tag(&self.state))
    }

    /// The numbers of those that VMs have.
    ///
    /// # Errors
    ///
    /// If there are no homes of VMs.
    pub fn networks(&self) -> anyhow::Result<BTreeSet<u32>> {
        // vmm-agent/src/driver/home.rs
        let numbers = fs::read_dir(self.state.join("agent/vms"))?.filter_map(|home| {
            let text = fs::read_to_string(home.ok()?.path().join("network")).ok()?;
            text.split_whitespace().next()?.parse().ok()
        });
        Ok(numbers.collect())
    }

    /// Name of this machine in the mesh.
    pub fn host_id(&self) -> &str {
        &self.host_id
    }

    /// The process of a service: `scheduler`, `vmm-agent` or `gateway`.
    ///
    /// # Errors
    ///
    /// If none runs.
    pub fn pid(&self, service: &str) -> anyhow::Result<i32> {
        for entry in fs::read_dir(self.state.join("run"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let Some(rest) = name.strip_prefix(&format!("{service}.")) else { continue };
            let Some(pid) = rest.strip_suffix(".pid").and_then(|pid| pid.parse().ok()) else { continue };
            let program = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if program.starts_with(self.bin.join(format!("oc-{service}")).as_os_str().as_encoded_bytes()) {
                return Ok(pid);
            }
        }
        bail!("no {service} runs");
    }

    /// The process of a service, as soon as there is one.
    ///
    /// # Errors
    ///
    /// If there is none for a long time.
    pub async fn running_pid(&self, service: &str) -> anyhow::Result<i32> {
        eventually(&format!("a running {service}"), async || self.pid(service)).await
    }

    /// The last lines of every log.
    pub fn logs(&self) -> String {
        let mut shown = String::new();
        for name in ["oc-up", "scheduler", "vmm-agent", "gateway"] {
            let text =
                fs::read_to_string(self.state.join("log").join(format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(25)..].join("\n");
            shown.push_str(&format!("--- {name}.log\n{tail}\n"));
        }
        shown
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let _ = self.oc().arg("down").stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// Tries until it works.
///
/// # Errors
///
/// The last attempt's, if none works within [`PATIENCE`].
pub async fn eventually<T>(
    what: &str,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("not within {PATIENCE:?}: {what}")));
            }
            Err(_) => sleep(LOOKS_EVERY).await,
        }
    }
}

/// Runs a command to its end; what it printed.
///
/// # Errors
///
/// If it fails: with what it said.
pub fn succeeded(mut command: Command) -> anyhow::Result<String> {
    let Output { status, stdout, stderr } = command.output().with_context(|| format!("{command:?}"))?;
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    ensure!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    Ok(stdout.into_owned())
}

/// MicroVMs run as users of their own, who come through.
fn passable() -> fs::Permissions {
    fs::Permissions::from_mode(0o711)
}

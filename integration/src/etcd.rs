//! A real etcd server on free loopback ports, with data of its own.

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::prepared;

/// How long a server may take until it answers; a busy machine is slow.
const STARTS_WITHIN: Duration = Duration::from_secs(30);
/// Ports may be taken by somebody else between being found and being used.
const ATTEMPTS: usize = 5;

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct EtcdServer {
    data: TempDir,
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

impl EtcdServer {
    /// Starts a server and waits until it answers.
    ///
    /// # Errors
    ///
    /// If there is no etcd, or it does not start.
    pub async fn start() -> anyhow::Result<Self> {
        for _ in 0..ATTEMPTS {
            let data = tempfile::tempdir()?;
            let mut server = Self { data, client_port: free_port()?, peer_port: free_port()?, process: None };
            if server.launch().await? {
                return Ok(server);
            }
        }
        bail!("etcd did not start in {ATTEMPTS} attempts");
    }

    /// `host:port` for clients.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// Ends the server as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Starts it again after [`kill`](Self::kill), with the same data on the same ports.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        for _ in 0..ATTEMPTS {
            // Clients that try to come back may have a port of its for a moment.
            if self.launch().await? {
                return Ok(());
            }
        }
        bail!("etcd did not start again in {ATTEMPTS} attempts");
    }

    /// Whether it came up.
    async fn launch(&mut self) -> anyhow::Result<bool> {
        let client = format!("http://{}", self.address());
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let process = Command::new(binary()?)
            .arg("--data-dir")
            .arg(self.data.path().join("etcd"))
            .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("etcd cannot be started")?;
        let process = self.process.insert(process);
        let deadline = Instant::now() + STARTS_WITHIN;
        let http = reqwest::Client::new();
        while Instant::now() < deadline {
            if process.try_wait()?.is_some() {
                return Ok(false);
            }
            let health = http.get(format!("{client}/health")).send().await;
            if health.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(true);
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(false)
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// `OC_ETCD_BIN`, else `etcd` from `PATH`, else what `make setup-test` puts into the cache.
fn binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("OC_ETCD_BIN") {
        return Ok(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|directory| directory.join("etcd")).find(|file| file.is_file()) {
        Some(file) => Ok(file),
        None => prepared::tool("etcd/usr/bin/etcd"),
    }
}

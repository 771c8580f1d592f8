//! The edge by TLS: API, ports, and names of their own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::mesh::{Mesh, eventually, succeeded};
use serde_json::Value;
use tempfile::TempDir;

use crate::previews::oc;

/// The host name of a preview.
const OWN_NAME: &str = "app.example.test";
/// As large as a certificate and its key are made, bytes.
const SIZE: usize = 4096;

pub async fn all_of_it_works_by_tls(_: Arc<Mesh>) -> anyhow::Result<()> {
    // Of its own: it speaks TLS alone.
    let directory = tempfile::tempdir()?;
    let pair = Pair::make(directory.path())?;
    let pairs = directory.path().to_str().context("a path")?;
    let mesh = Mesh::start(&["--pool-size", "0", "--tls", "--tls-dir", pairs])?;
    ensure!(mesh.url.starts_with("https://"), "{}", mesh.url);
    // `oc` speaks gRPC.
    let made = oc(&mesh, &["create", "--timeout", "0"])?;
    let id = made["sandboxID"].as_str().context("no ID")?.to_owned();
    let server = "cd /etc; for port in 8000 8001; do (python3 -m http.server $port >/dev/null 2>&1 &); done";
    let mut exec = mesh.oc();
    exec.args(["exec", &id, "--wait", "--", server]);
    succeeded(exec)?;
    let port = mesh.url.rsplit_once(':').context("no port")?.1;
    let curl = |trusted: &Path, arguments: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["-sS", "--fail", "--cacert"]).arg(trusted).args(arguments);
        succeeded(command)
    };
    let made_here = mesh.state().join("tls/ca.crt");
    let key = format!("X-API-Key: {}", mesh.key);
    let rest = curl(&made_here, &["-H", &key, &format!("{}/api/sandboxes/{id}", mesh.url)])?;
    assert_eq!(serde_json::from_str::<Value>(&rest)?["connectURL"], mesh.url);
    let preview = oc(&mesh, &["preview", "create", &id, "--port", "8000"])?;
    assert_eq!(preview["sslStatus"], "active");
    let (name, url) =
        (preview["hostname"].as_str().context("no host")?, preview["url"].as_str().context("no URL")?);
    let resolve = format!("{name}:{port}:127.0.0.1");
    let page = eventually("the page", async || {
        let how = ["--resolve", &resolve, "--http2", "-w", "%{http_version}", &format!("{url}/hostname")];
        curl(&made_here, &how)
    })
    .await?;
    assert!(page.ends_with('2'), "{page}");

    // A host name of its own has a certificate of its own.
    oc(&mesh, &["preview", "create", &id, "--port", "8001", "--domain", OWN_NAME])?;
    let (resolve, url) =
        (format!("{OWN_NAME}:{port}:127.0.0.1"), format!("https://{OWN_NAME}:{port}/hostname"));
    let by_its_name = async || {
        eventually("the page by its own name", async || curl(&pair.trusted, &["--resolve", &resolve, &url]))
            .await
    };
    let page = by_its_name().await?;
    // Nothing shows that the files are others: they are read because somebody says so.
    pair.renew()?;
    kill(Pid::from_raw(mesh.running_pid("gateway").await?), Signal::SIGHUP)?;
    assert_eq!(by_its_name().await?, page);
    mesh.stop()
}

/// A certificate for [`OWN_NAME`] with its key, as files for a gateway.
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
    /// What clients trust.
    trusted: PathBuf,
    made: TempDir,
}

impl Pair {
    fn make(directory: &Path) -> anyhow::Result<Self> {
        let made = tempfile::tempdir()?;
        let file = |ending: &str| directory.join(format!("{OWN_NAME}.{ending}"));
        let pair =
            Self { certificate: file("crt"), key: file("key"), trusted: made.path().join("crt"), made };
        pair.write()?;
        Ok(pair)
    }

    fn write(&self) -> anyhow::Result<()> {
        let key = self.made.path().join("key");
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        openssl.args(["-subj", "/CN=made here", "-addext", &format!("subjectAltName=DNS:{OWN_NAME}")]);
        openssl.arg("-keyout").arg(&key).arg("-out").arg(&self.trusted);
        succeeded(openssl)?;
        for (from, to) in [(&self.trusted, &self.certificate), (&key, &self.key)] {
            let mut text = fs::read(from)?;
            text.resize(SIZE, b'\n');
            fs::write(to, text)?;
        }
        Ok(())
    }

    /// Writes another one into the same files, of the same size and time.
    fn renew(&self) -> anyhow::Result<()> {
        let files = [&self.certificate, &self.key];
        let times = files.map(|file| fs::metadata(file)?.modified());
        self.write()?;
        for (file, time) in files.into_iter().zip(times) {
            fs::File::options().write(true).open(file)?.set_modified(time?)?;
        }
        Ok(())
    }
}

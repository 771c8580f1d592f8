//! A terminal in a browser, over WebSockets, which comes back to where it was.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::{
    mesh::{Mesh, eventually},
    prepared,
};
use serde_json::json;

use crate::hibernation::hibernate;

/// What opens the page, types, and looks.
const DRIVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/functional/browser/drive.mjs");
/// Debian's, which `tools/setup --test` installs.
pub const BROWSER: &str = "/usr/bin/chromium-headless-shell";
/// The page when the test failed.
const SCREENSHOT: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/browser.png");

pub async fn a_terminal_in_a_browser_outlives_what_serves_it(_: Arc<Mesh>) -> anyhow::Result<()> {
    // Of its own: its services are killed.
    let mesh = Mesh::start(&["--pool-size", "0"])?;
    let sandbox = mesh.rest().create(json!({})).await?;
    let directory = tempfile::tempdir()?;
    let (descriptors, errors) = (directory.path().join("descriptors.bin"), directory.path().join("errors"));
    fs::write(&descriptors, oc_proto::DESCRIPTORS)?;
    let mut command = Command::new(prepared::tool("node/bin/node")?);
    command
        .arg(DRIVER)
        .env("OC_URL", &mesh.url)
        .env("OC_SANDBOX", &sandbox.id)
        .env("OC_TOKEN", sandbox.facts["token"].as_str().context("no token")?)
        .env("OC_DESCRIPTORS", &descriptors)
        .env("OC_BROWSER", BROWSER)
        .env("OC_SCREENSHOT", SCREENSHOT);
    let errors_file = File::create(&errors)?;
    let mut driver = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors_file).spawn()?;
    let mut answers = driver.stdin.take().context("no standard input")?;
    for line in BufReader::new(driver.stdout.take().context("no standard output")?).lines() {
        let line = line?;
        let Some(wish) = line.strip_prefix("please ") else { continue };
        match wish.strip_prefix("kill ") {
            Some(service) => replace(&mesh, service).await?,
            None => drop(hibernate(&mesh.rest(), &sandbox).await?),
        }
        writeln!(answers)?;
    }
    let ended = driver.wait()?;
    ensure!(ended.success(), "{}", fs::read_to_string(&errors)?);
    sandbox.delete().await?;
    mesh.stop()
}

/// Kills a service, and waits until there is another of it.
async fn replace(mesh: &Mesh, service: &str) -> anyhow::Result<()> {
    let killed = mesh.pid(service)?;
    kill(Pid::from_raw(killed), Signal::SIGKILL)?;
    eventually(&format!("another {service}"), async || {
        ensure!(mesh.pid(service)? != killed, "the {service} is not replaced yet");
        Ok(())
    })
    .await
}

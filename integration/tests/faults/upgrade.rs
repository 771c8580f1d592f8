//! A host whose guest is built anew while sandboxes and checkpoints of the one before are there.

use std::{io::Write as _, sync::Arc};

use anyhow::ensure;
use oc_integration::{
    mesh::{Mesh, eventually},
    prepared,
};
use serde_json::json;

use crate::killed::crash;

pub async fn what_was_made_of_an_older_build_goes_on(_: Arc<()>) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let guest = directory.path().join("oc-init");
    std::fs::copy(prepared::binaries()?.join("oc-init"), &guest)?;
    let mesh = Mesh::start(&[
        "--pool-size",
        "0",
        "--paused-for",
        "0",
        "--guest-binary",
        &guest.display().to_string(),
    ])?;
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0 })).await?;
    sandbox.run("echo in memory > /dev/shm/file; echo on disk > file").await?;
    let taken = rest.post(&sandbox.path("/checkpoints"), json!({ "name": "old" })).await?.expect(201)?.json();
    rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;

    // Another binary to every digest, and the same to the kernel.
    std::fs::OpenOptions::new().append(true).open(&guest)?.write_all(b"newer")?;
    let killed = mesh.running_pid("vmm-agent").await?;
    crash(killed)?;
    eventually("the agent is replaced", async || {
        ensure!(mesh.pid("vmm-agent")? != killed);
        rest.get("/api/nodes").await?.expect(200).map(drop)
    })
    .await?;
    let newer = eventually("a sandbox of the new build", async || rest.create(json!({})).await).await?;
    assert_eq!(newer.facts["startPath"], "clone");
    let woken = rest.post(&sandbox.path("/wake"), json!({})).await?.expect(200)?.json();
    assert_eq!(woken["startPath"], "memory");
    let path = format!("/api/checkpoints/{}/fork", taken["id"].as_str().unwrap_or_default());
    for (mode, start, script) in [
        ("live", "restored", "cat /dev/shm/file file"),
        ("cold", "restored-disk", "echo in memory; cat file"),
    ] {
        let made = rest.post(&path, json!({ "mode": mode })).await?.expect(201)?.json();
        assert_eq!(made["sandboxes"][0]["startPath"], start);
        let fork = rest.sandbox(made["sandboxes"][0]["sandboxID"].as_str().unwrap_or_default());
        assert_eq!(fork.run(script).await?, "in memory\non disk\n", "{mode}");
        fork.delete().await?;
    }
    newer.delete().await?;
    sandbox.delete().await?;
    mesh.stop()
}

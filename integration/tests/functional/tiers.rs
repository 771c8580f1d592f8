//! Sandboxes that are only paused when they hibernate, at first. Each test has a mesh that keeps them paused for long.

use std::sync::Arc;

use anyhow::ensure;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::Sandbox,
};
use serde_json::json;

use crate::hibernation::{self, WITNESS, hibernate, stored_bytes, wake, witness};

/// Waits until the memory of a sandbox that hibernates is on disk.
async fn captured(sandbox: &Sandbox) -> anyhow::Result<()> {
    eventually("it is captured", async || {
        let facts = sandbox.get().await?.expect(200)?.json();
        ensure!(facts["status"] == "hibernated" && stored_bytes(&facts) > 0, "{facts}");
        Ok(())
    })
    .await
}

/// As a crash: nothing is told beforehand.
fn crash(pid: i32) -> anyhow::Result<()> {
    Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?)
}

fn vmms(mesh: &Mesh) -> Vec<i32> {
    processes::vmms(mesh.state()).into_iter().map(|vmm| vmm.pid).collect()
}

pub async fn a_paused_sandbox_goes_on_whatever_dies(_: Arc<Mesh>) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "0", "--paused-for", "3600"])?;
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0 })).await?;
    sandbox.put("witness.py", WITNESS).await?.expect(204)?;
    sandbox.run("python3 witness.py > /dev/null 2>&1 & echo on disk > file").await?;
    eventually("the witness writes", async || witness(&sandbox).await).await?;
    let (pid, secret, _) = witness(&sandbox).await?;
    let goes_on = async |beats: u64| {
        eventually("the witness goes on", async || {
            let (same, known, now) = witness(&sandbox).await?;
            assert_eq!((&same, &known), (&pid, &secret), "it is another process");
            ensure!(now > beats, "beat {now} after {beats}");
            Ok(())
        })
        .await?;
        hibernation::knows_the_time(&sandbox).await
    };
    let vmm = vmms(&mesh);
    assert_eq!(vmm.len(), 1);

    // Woken at once, amid the capture, and after it.
    for is_captured in [false, true] {
        let (_, _, beats) = witness(&sandbox).await?;
        let told = hibernate(&rest, &sandbox).await?;
        assert_eq!((&told["status"], &told["tier"]), (&json!("hibernated"), &json!("paused")), "{told}");
        if is_captured {
            captured(&sandbox).await?;
        }
        assert_eq!(vmms(&mesh), vmm, "its process stays");
        let woken = wake(&rest, &sandbox).await?;
        assert_eq!((&woken["status"], &woken["startPath"]), (&json!("running"), &json!("paused")));
        assert_eq!(stored_bytes(&woken), 0);
        goes_on(beats).await?;
    }
    // The agent dies while it is paused.
    for _ in 0..2 {
        let (_, _, beats) = witness(&sandbox).await?;
        hibernate(&rest, &sandbox).await?;
        let agent = mesh.running_pid("vmm-agent").await?;
        crash(agent)?;
        eventually("its agent is replaced", async || {
            ensure!(mesh.pid("vmm-agent")? != agent);
            rest.get("/api/nodes").await?.expect(200).map(drop)
        })
        .await?;
        captured(&sandbox).await?;
        assert_eq!(vmms(&mesh), vmm, "it is paused as it was");
        // A call is enough.
        eventually("it wakes", async || sandbox.run("true").await.map(drop)).await?;
        assert_eq!(sandbox.get().await?.json()["startPath"], "paused");
        goes_on(beats).await?;
    }
    // Its process dies when it is captured.
    let (_, _, beats) = witness(&sandbox).await?;
    hibernate(&rest, &sandbox).await?;
    captured(&sandbox).await?;
    crash(vmm[0])?;
    assert_eq!(wake(&rest, &sandbox).await?["startPath"], "memory");
    goes_on(beats).await?;
    // And when it may not be: what is on disk is there in any case.
    hibernate(&rest, &sandbox).await?;
    crash(vmms(&mesh)[0])?;
    let woken = wake(&rest, &sandbox).await?;
    assert!(woken["startPath"] == "memory" || woken["startPath"] == "disk", "{woken}");
    assert_eq!(sandbox.run("cat file").await?, "on disk\n");
    // Deleted amid all that nothing is left, which the mesh's end sees.
    hibernate(&rest, &sandbox).await?;
    sandbox.delete().await?;
    assert!(vmms(&mesh).is_empty());
    mesh.stop()
}

pub async fn a_paused_sandbox_makes_room(_: Arc<Mesh>) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "0", "--paused-for", "3600", "--max-sandboxes", "1"])?;
    let rest = mesh.rest();
    let first = rest.create(json!({})).await?;
    first.run("echo in memory > /dev/shm/file").await?;
    hibernate(&rest, &first).await?;
    captured(&first).await?;
    assert_eq!(vmms(&mesh).len(), 1);
    let second = rest.create(json!({})).await?;
    eventually("the paused one gives way", async || {
        ensure!(vmms(&mesh).len() == 1);
        Ok(())
    })
    .await?;
    second.run("true").await?;
    second.delete().await?;
    assert_eq!(wake(&rest, &first).await?["startPath"], "memory");
    assert_eq!(first.run("cat /dev/shm/file").await?, "in memory\n");
    first.delete().await?;
    mesh.stop()
}

//! Processes that are killed while nothing else happens.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
};
use serde_json::json;

/// As a crash: nothing is told beforehand.
pub fn crash(pid: i32) -> anyhow::Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("process {pid}"))
}

/// The VMM of the one sandbox that runs.
fn vmm_of_only_sandbox(mesh: &Mesh) -> anyhow::Result<i32> {
    let vmms = processes::vmms(mesh.state());
    ensure!(vmms.len() == 1, "{} VMMs run", vmms.len());
    Ok(vmms[0].pid)
}

pub async fn a_killed_vmm_fails_its_sandbox_alone(_: Arc<()>) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "0"])?;
    let lost = mesh.rest().create(json!({})).await?;
    let vmm = vmm_of_only_sandbox(&mesh)?;
    let other = mesh.rest().create(json!({})).await?;
    let waiting = {
        let lost = lost.clone();
        tokio::spawn(async move { lost.exec(json!({ "cmd": "sleep 60" })).await })
    };
    // It runs by now, or will at once: either way it is cut off.
    lost.run("true").await?;
    crash(vmm)?;
    let cut = waiting.await??;
    assert_eq!(cut.refusal(), (410, "SANDBOX_FAILED".into()));
    assert_eq!(lost.exec(json!({ "cmd": "true" })).await?.refusal(), (410, "SANDBOX_FAILED".into()));
    assert_eq!(lost.read("/etc/passwd").await?.refusal(), (410, "SANDBOX_FAILED".into()));
    eventually("its record says so", async || {
        let state = lost.get().await?.expect(200)?.json();
        ensure!(
            state["status"] == "failed" && state["failure"].as_str().is_some_and(|text| !text.is_empty()),
            "{state}"
        );
        Ok(())
    })
    .await?;
    other.run("true").await?;
    lost.delete().await?;
    assert_eq!(lost.exec(json!({ "cmd": "true" })).await?.refusal(), (410, "SANDBOX_DELETED".into()));
    // One that powers itself off is lost as well.
    let _ = other.exec(json!({ "cmd": "echo b > /proc/sysrq-trigger", "user": "root" })).await?;
    eventually("the one that rebooted has failed", async || {
        let refusal = other.exec(json!({ "cmd": "true" })).await?.refusal();
        ensure!(refusal == (410, "SANDBOX_FAILED".into()), "{refusal:?}");
        Ok(())
    })
    .await?;
    mesh.stop()
}

pub async fn a_sandbox_outlives_every_service(_: Arc<()>) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "1"])?;
    let sandbox = mesh.rest().create(json!({ "envs": { "A": "kept" } })).await?;
    sandbox
        .run("echo written > file; (while :; do date +%s%N > beat; sleep 0.1; done) > /dev/null 2>&1 &")
        .await?;
    for service in ["vmm-agent", "scheduler", "gateway", "vmm-agent"] {
        let killed = mesh.pid(service)?;
        crash(killed)?;
        eventually("the mesh works again", async || {
            ensure!(mesh.pid(service)? != killed, "the {service} is not replaced yet");
            let beat = sandbox.run("cat beat").await?;
            ensure!(sandbox.run("sleep 0.3; cat beat").await? > beat, "its process stands still");
            Ok(())
        })
        .await?;
        assert_eq!(sandbox.run("cat file; echo $A").await?, "written\nkept\n");
        // Which the calls before did not need: the scheduler.
        let another = eventually("a create", async || mesh.rest().create(json!({})).await).await?;
        another.delete().await?;
    }
    eventually("no VMM is left over", async || {
        let now = processes::vmms(mesh.state()).len();
        ensure!(now == 2, "{now} VMMs for a sandbox and a pool of one");
        Ok(())
    })
    .await?;
    sandbox.delete().await?;
    mesh.stop()
}

/// What starts a mesh's services again when they die.
pub fn supervisor_of(mesh: &Mesh) -> anyhow::Result<i32> {
    let supervisor = processes::naming(&mesh.state().display().to_string())
        .into_iter()
        .find(|process| process.command.iter().any(|word| word == "--detached"));
    Ok(supervisor.context("no supervisor")?.pid)
}

pub async fn a_sandbox_outlives_its_supervisor(_: Arc<()>) -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&["--pool-size", "1"])?;
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox.run("echo written > file").await?;
    crash(supervisor_of(&mesh)?)?;
    mesh.up()?;
    let sandbox = mesh.rest().sandbox(&sandbox.id);
    assert_eq!(sandbox.run("cat file").await?, "written\n");

    // Stopped as it should be, it deletes everybody's sandboxes, and says so when it is there again.
    let others = mesh.rest_of_new_tenant("others").await?.1.create(json!({})).await?;
    mesh.down()?;
    mesh.up()?;
    let others = mesh.rest_of_new_tenant("others").await?.1.sandbox(&others.id);
    for sandbox in [mesh.rest().sandbox(&sandbox.id), others] {
        assert_eq!(sandbox.get().await?.expect(200)?.json()["status"], "deleted");
    }
    mesh.stop()
}

pub async fn a_call_that_is_cut_off_says_so(_: Arc<()>) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "1"])?;
    let sandbox = mesh.rest().create(json!({})).await?;
    let running = {
        let sandbox = sandbox.clone();
        tokio::spawn(async move { sandbox.exec(json!({ "cmd": "touch begun; sleep 60" })).await })
    };
    eventually("the command runs", async || sandbox.run("test -e begun").await.map(drop)).await?;
    crash(mesh.pid("vmm-agent")?)?;
    let cut = running.await??;
    assert_eq!(cut.refusal(), (503, "HOST_UNAVAILABLE".into()));
    assert!(cut.headers.contains_key("retry-after"));
    // Nobody would hear of its end, so it was ended.
    eventually("the command was ended", async || {
        let count = sandbox.run("pgrep -fc '[s]leep 60' || true").await?;
        ensure!(count == "0\n", "{count}");
        Ok(())
    })
    .await?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    mesh.stop()
}

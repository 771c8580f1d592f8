//! Checkpoints one after another, with failures between them: what a capture took for nothing is in the next one.

use std::{fs, sync::Arc, time::Duration};

use anyhow::ensure;
use oc_integration::{
    memory::{change, digest},
    mesh::{Mesh, eventually},
    rest::{Rest, Sandbox},
};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{disk::Disk, killed::crash};

/// Room for an image of each checkpoint, which share no blocks.
const SIZE_MIB: u64 = 6144;

async fn checkpoint(rest: &Rest, sandbox: &Sandbox, name: &str) -> anyhow::Result<Value> {
    Ok(rest.post(&sandbox.path("/checkpoints"), json!({ "name": name })).await?.expect(201)?.json())
}

fn path(checkpoint: &Value, rest: &str) -> String {
    format!("/api/checkpoints/{}{rest}", checkpoint["id"].as_str().unwrap_or_default())
}

/// Kills the agent, and waits for the next one.
async fn replace_agent(mesh: &Mesh, sandbox: &Sandbox) -> anyhow::Result<()> {
    let killed = mesh.running_pid("vmm-agent").await?;
    crash(killed)?;
    eventually("another agent takes over", async || {
        ensure!(mesh.pid("vmm-agent")? != killed, "it is not replaced yet");
        sandbox.run("true").await
    })
    .await
    .map(drop)
}

pub async fn a_chain_of_checkpoints_misses_nothing_whatever_fails(_: Arc<()>) -> anyhow::Result<()> {
    let disk = Disk::mount(SIZE_MIB)?;
    let mesh = Mesh::start_in(
        Some(&disk.path().join("state")),
        &["--pool-size", "0"],
        &[("OC_DISK_RESERVE_MB", "20")],
    )?;
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0, "memoryMB": 512 })).await?;
    let mut chain = Vec::new();
    let mut state = String::new();
    // What happens between the change of some memory and the checkpoint after it.
    for (number, failure) in ["none", "full", "full twice", "between", "amid", "none"].into_iter().enumerate()
    {
        change(&sandbox, &format!("number-{number}"), 3).await?;
        change(&sandbox, "again", 40).await?;
        state = digest(&sandbox).await?;
        match failure {
            "full" | "full twice" => {
                for _ in 0..if failure == "full" { 1 } else { 2 } {
                    // Enough to begin with, not enough for an image.
                    disk.leave(40)?;
                    let refused = rest.post(&sandbox.path("/checkpoints"), json!({ "name": "none" })).await?;
                    let (_, reason) = refused.refusal();
                    ensure!(["CHECKPOINT_FAILED", "HOST_DISK_FULL"].contains(&reason.as_str()), "{reason}");
                    fs::remove_file(disk.path().join("ballast"))?;
                    change(&sandbox, "between", 1).await?;
                    state = digest(&sandbox).await?;
                }
            }
            "between" => replace_agent(&mesh, &sandbox).await?,
            "amid" => {
                let asked = {
                    let (rest, path) = (mesh.rest(), sandbox.path("/checkpoints"));
                    tokio::spawn(async move { rest.post(&path, json!({ "name": "cut off" })).await })
                };
                // Somewhere from its begin to its end.
                sleep(Duration::from_millis(60)).await;
                replace_agent(&mesh, &sandbox).await?;
                let _ = asked.await?;
            }
            _ => {}
        }
        let name = format!("link {number}");
        let taken =
            eventually("the host takes checkpoints again", async || checkpoint(&rest, &sandbox, &name).await)
                .await?;
        chain.push((taken, state.clone()));
    }
    for (taken, state) in &chain {
        rest.post(&path(taken, "/verify"), json!({})).await?.expect(200)?;
        let made = eventually("the host says that it has room", async || {
            rest.post(&path(taken, "/fork"), json!({ "mode": "live" })).await?.expect(201)
        })
        .await?
        .json();
        let fork = rest.sandbox(made["sandboxes"][0]["sandboxID"].as_str().unwrap_or_default());
        ensure!(digest(&fork).await? == *state, "{} is not what was taken", taken["name"]);
        fork.delete().await?;
    }
    ensure!(digest(&sandbox).await? == state, "the sandbox itself is another");
    let listed = rest.get(&sandbox.path("/checkpoints")).await?.expect(200)?.json();
    for taken in listed.as_array().into_iter().flatten() {
        rest.delete(&path(taken, "")).await?.expect(204)?;
    }
    sandbox.delete().await?;
    mesh.stop()
}

//! Checkpoints that are taken one after another of a sandbox that goes on: each is laid over the one before, and is whole
//! without it.

use std::{path::Path, sync::Arc};

use anyhow::ensure;
use nix::{
    sys::{
        signal::{Signal, kill},
        statvfs::statvfs,
    },
    unistd::Pid,
};
use oc_integration::{
    memory::{change, digest},
    mesh::{Mesh, eventually},
    rest::{Rest, Sandbox},
};
use serde_json::{Value, json};

const MIB: i64 = 1 << 20;

async fn checkpoint(rest: &Rest, sandbox: &Sandbox, name: &str) -> anyhow::Result<Value> {
    Ok(rest.post(&sandbox.path("/checkpoints"), json!({ "name": name })).await?.expect(201)?.json())
}

fn path(checkpoint: &Value, rest: &str) -> String {
    format!("/api/checkpoints/{}{rest}", checkpoint["id"].as_str().unwrap_or_default())
}

async fn live_fork(rest: &Rest, path: &str) -> anyhow::Result<Sandbox> {
    let made = rest.post(path, json!({ "mode": "live" })).await?.expect(201)?.json();
    Ok(rest.sandbox(made["sandboxes"][0]["sandboxID"].as_str().unwrap_or_default()))
}

pub async fn each_checkpoint_of_a_chain_is_its_own_moment(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0 })).await?;
    // Pages beside the image, an image of its own, pages beside that one, pages that are written again, and much again.
    let changes = [("small", 2), ("large", 60), ("beside", 3), ("large", 4), ("much", 40)];
    let mut chain = Vec::new();
    for (number, (name, mib)) in changes.into_iter().enumerate() {
        change(&sandbox, name, mib).await?;
        sandbox.run(&format!("echo {number} > file")).await?;
        let state = digest(&sandbox).await?;
        let taken = checkpoint(&rest, &sandbox, &format!("link {number}")).await?;
        chain.push((taken, state));
        if number == 1 {
            // What is taken for a fork counts as changed since the checkpoint before all the same.
            change(&sandbox, "more", 8).await?;
            let fork = live_fork(&rest, &sandbox.path("/fork")).await?;
            assert_eq!(digest(&fork).await?, digest(&sandbox).await?);
            fork.delete().await?;
        }
    }
    // What a guest changes by itself is less than 20 MiB.
    let changed: Vec<_> =
        chain.iter().map(|(taken, _)| taken["memoryChangedBytes"].as_i64().unwrap_or_default()).collect();
    for (number, least) in [(0, 2), (1, 60), (2, 11), (3, 4), (4, 40)] {
        let bounds = least * MIB..(least + 20) * MIB;
        assert!(bounds.contains(&changed[number]), "link {number} of {changed:?}");
    }
    // One in the middle is nobody's foundation.
    let (gone, _) = chain.remove(2);
    rest.delete(&path(&gone, "")).await?.expect(204)?;
    for (taken, state) in &chain {
        rest.post(&path(taken, "/verify"), json!({})).await?.expect(200)?;
        let fork = live_fork(&rest, &path(taken, "/fork")).await?;
        assert_eq!(digest(&fork).await?, *state, "{}", taken["name"]);
        assert_eq!(
            fork.run("cat file").await?.trim(),
            taken["name"].as_str().unwrap_or_default()[5..].trim()
        );
        fork.delete().await?;
    }
    // It is hibernated over the last of them, and wakes as it was; what follows is laid over what woke.
    change(&sandbox, "beside", 1).await?;
    let state = digest(&sandbox).await?;
    rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    assert_eq!(digest(&sandbox).await?, state);
    change(&sandbox, "small", 1).await?;
    let state = digest(&sandbox).await?;
    let last = checkpoint(&rest, &sandbox, "awake").await?;
    for (taken, _) in &chain {
        rest.delete(&path(taken, "")).await?.expect(204)?;
    }
    // Back, with everything that it was laid over gone.
    rest.post(
        &sandbox.path(&format!("/checkpoints/{}/restore", last["id"].as_str().unwrap_or_default())),
        json!({}),
    )
    .await?
    .expect(200)?;
    assert_eq!(digest(&sandbox).await?, state);
    rest.delete(&path(&last, "")).await?.expect(204)?;
    sandbox.delete().await
}

pub async fn sandboxes_live_on_a_filesystem_of_their_own(_: Arc<Mesh>) -> anyhow::Result<()> {
    let options = ["--pool-size", "0", "--data-image-mb", "3072"];
    let mut mesh = Mesh::start_in(None, &options, &[("OC_DISK_RESERVE_MB", "200")])?;
    let rest = mesh.rest();
    let agent = mesh.state().join("agent");
    assert!(mounts_of(&agent)?.contains(" - xfs "), "{}", mounts_of(&agent)?);
    let sandbox = rest.create(json!({ "timeout": 0, "memoryMB": 512 })).await?;
    let mut chain = Vec::new();
    for (number, mib) in [8, 40, 4].into_iter().enumerate() {
        change(&sandbox, &format!("number-{number}"), mib).await?;
        sandbox.run(&format!("head -c 20M /dev/urandom > {number}; sha256sum * > /dev/shm/sums")).await?;
        let state = digest(&sandbox).await?;
        chain.push((checkpoint(&rest, &sandbox, &format!("link {number}")).await?, state));
    }
    // A disk that shares its blocks takes them once.
    let snapshots = agent.join("snapshots");
    let room = |path: &Path| statvfs(path).map(|stat| stat.blocks_free());
    let before = room(&snapshots)?;
    let disk =
        rest.post(&sandbox.path("/checkpoints"), json!({ "name": "disk", "kind": "disk_only" })).await?;
    let disk = disk.expect(201)?.json();
    let taken = before.saturating_sub(room(&snapshots)?) * 4096;
    assert!(taken < 16 << 20, "a copy of the disk took {taken} bytes");
    for (taken, state) in &chain {
        rest.post(&path(taken, "/verify"), json!({})).await?.expect(200)?;
        let fork = live_fork(&rest, &path(taken, "/fork")).await?;
        assert_eq!(digest(&fork).await?, *state, "{}", taken["name"]);
        fork.run("sha256sum --quiet -c /dev/shm/sums").await?;
        fork.delete().await?;
    }
    let fork = live_fork(&rest, &sandbox.path("/fork")).await?;
    fork.run("sha256sum --quiet -c /dev/shm/sums").await?;
    fork.delete().await?;
    rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    sandbox.run("sha256sum --quiet -c /dev/shm/sums").await?;
    let (first, state) = &chain[0];
    let restore = format!("/checkpoints/{}/restore", first["id"].as_str().unwrap_or_default());
    rest.post(&sandbox.path(&restore), json!({})).await?.expect(200)?;
    assert_eq!(digest(&sandbox).await?, *state);
    // The next agent finds it mounted, whatever became of the one before.
    let killed = mesh.pid("vmm-agent")?;
    kill(Pid::from_raw(killed), Signal::SIGKILL)?;
    eventually("another agent takes over", async || {
        ensure!(mesh.pid("vmm-agent")? != killed);
        sandbox.run("true").await
    })
    .await?;
    assert_eq!(digest(&sandbox).await?, *state);
    for taken in chain.iter().map(|(taken, _)| taken).chain([&disk]) {
        rest.delete(&path(taken, "")).await?.expect(204)?;
    }
    sandbox.delete().await?;
    // Nothing of it is left: neither a mount nor the file.
    mesh.down()?;
    assert_eq!(mounts_of(&agent)?, "");
    mesh.up()?;
    mesh.stop()
}

/// What the kernel says of what is mounted at `path`.
fn mounts_of(path: &Path) -> anyhow::Result<String> {
    let path = path.display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let found: Vec<_> = mounts.lines().filter(|line| line.split(' ').nth(4) == Some(&path)).collect();
    Ok(found.join("\n"))
}

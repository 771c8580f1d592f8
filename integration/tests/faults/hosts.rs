//! Two hosts with one record store and one object store, of which one goes.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use oc_integration::{
    etcd::EtcdServer,
    mesh::{Mesh, eventually},
    rest::{Rest, Sandbox},
};
use serde_json::json;

use crate::killed::{crash, supervisor_of};

/// Counts in memory without a rest, and leaves a file on disk and 24 MiB in memory whose digest is on disk.
const WORK: &str = "(while :; do date +%s%N > /dev/shm/next; mv /dev/shm/next /dev/shm/now; sleep 0.05; done) > /dev/null 2>&1 & echo $! > /dev/shm/pid; echo kept > disk; head -c 24M /dev/urandom > /dev/shm/much; md5sum < /dev/shm/much > sum; sync";
/// Whether that goes on.
const GOES_ON: &str = "before=$(cat /dev/shm/now); sleep 1; kill -0 $(cat /dev/shm/pid) && test $before != $(cat /dev/shm/now) && md5sum < /dev/shm/much | cmp - sum";

/// Sees that neither an object store nor a host has a snapshot.
fn no_snapshot(objects: &Path, mesh: &Mesh) -> anyhow::Result<()> {
    // What a crash has left half is no object.
    let is_whole = |path: &PathBuf| !path.to_string_lossy().contains('#');
    let mut left: Vec<_> = files(&objects.join("snapshots"))?.into_iter().filter(is_whole).collect();
    left.extend(files(&mesh.state().join("agent/snapshots"))?);
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Waits until a host is no member.
async fn without(rest: &Rest, host: &Mesh) -> anyhow::Result<()> {
    eventually("the host is gone", async || {
        let nodes = rest.get("/api/nodes").await?.expect(200)?.json();
        ensure!(!nodes.to_string().contains(host.host_id()), "{nodes}");
        Ok(())
    })
    .await
}

/// The files below a directory.
fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}

pub async fn a_checkpoint_outlives_its_host(_: Arc<()>) -> anyhow::Result<()> {
    let server = EtcdServer::start().await?;
    let objects = tempfile::tempdir()?;
    let (store, object_store) =
        (format!("etcd://{}", server.address()), format!("file://{}", objects.path().display()));
    let options = ["--pool-size", "0", "--store", &store, "--object-store", &object_store];
    let mut first = Mesh::start(&options)?;
    let sandbox = first.rest().create(json!({ "timeout": 0 })).await?;
    sandbox.run(WORK).await?;
    let pid = sandbox.run("cat /dev/shm/pid").await?;
    let taken = first.rest().post(&sandbox.path("/checkpoints"), json!({ "name": "one" })).await?;
    let id = taken.expect(201)?.json()["id"].as_str().context("no id")?.to_owned();
    // Amid the upload, or before: the next agent begins it again.
    crash(first.running_pid("vmm-agent").await?)?;
    let at = format!("/api/checkpoints/{id}");
    eventually("it is in the object store", async || {
        let shown = first.rest().get(&at).await?.expect(200)?.json();
        ensure!(shown["isUploaded"] == true && shown["status"] == "ready", "{shown}");
        Ok(())
    })
    .await?;
    let verify = format!("{at}/verify");
    // The agent may not be back yet.
    let verified =
        eventually("it is whole", async || first.rest().post(&verify, json!({})).await?.expect(200));
    let verified = verified.await?.json();
    assert!(verified["verifiedBytes"].as_i64() > Some(24 << 20), "{verified}");
    assert!(verified["uploadedBytes"].as_i64() > Some(24 << 20), "{verified}");

    let second = Mesh::start(&options)?;
    first.down()?;
    assert!(!first.state().join("agent/snapshots").exists(), "its host has nothing of it any more");
    let rest = second.rest();
    let fork = async |mode: &str| rest.post(&format!("{at}/fork"), json!({ "mode": mode })).await;
    without(&rest, &first).await?;

    // A copy that is damaged is told, and nothing is made of it.
    let chunks = files(&objects.path().join("chunks"))?;
    let by_length: BTreeMap<u64, &PathBuf> =
        chunks.iter().map(|path| Ok((fs::metadata(path)?.len(), path))).collect::<anyhow::Result<_>>()?;
    let (_, victim) = by_length.last_key_value().context("there are no chunks")?;
    let whole = fs::read(victim)?;
    let mut damaged = whole.clone();
    damaged[1000] ^= 1;
    fs::write(victim, &damaged)?;
    for answer in [rest.post(&format!("{at}/verify"), json!({})).await?, fork("live").await?] {
        assert_eq!(answer.refusal().1, "CHECKPOINT_DAMAGED");
    }
    assert_eq!(fs::read_dir(second.state().join("agent/snapshots"))?.count(), 0, "half a copy is left");
    fs::write(victim, &whole)?;

    // It goes on where it was, on a host that has never seen it.
    for mode in ["live", "cold"] {
        let made = fork(mode).await?.expect(201)?.json();
        let made = rest.sandbox(made["sandboxes"][0]["sandboxID"].as_str().context("no sandboxID")?);
        assert_eq!(made.run("cat disk").await?, "kept\n", "{mode}");
        if mode == "live" {
            assert_eq!(made.run("cat /dev/shm/pid").await?, pid);
            let ran = format!("{GOES_ON} && echo goes on");
            assert_eq!(made.run(&ran).await?, "goes on\n");
        }
        made.delete().await?;
    }
    // The first host comes back without it, and gets it from there.
    first.up()?;
    let made = first.rest().post(&format!("{at}/fork"), json!({ "mode": "live" })).await?.expect(201)?.json();
    let made = rest.sandbox(made["sandboxes"][0]["sandboxID"].as_str().context("no sandboxID")?);
    assert_eq!(made.run("cat /dev/shm/pid").await?, pid);
    made.delete().await?;
    assert!(first.state().join("agent/snapshots").join(&id).is_dir(), "its own host makes it");

    rest.delete(&at).await?.expect(204)?;
    // The second host's copy is a stray, which goes when it is older than what another scheduler may be at.
    eventually("neither its host nor the object store has it any more", async || {
        no_snapshot(objects.path(), &first)
    })
    .await?;
    first.stop()?;
    second.stop()
}

/// Kills all of a mesh: what it has on disk stays, and nobody is told.
fn lose(mesh: &Mesh) -> anyhow::Result<()> {
    crash(supervisor_of(mesh)?)?;
    for service in ["gateway", "vmm-agent", "scheduler"] {
        crash(mesh.pid(service)?)?;
    }
    Ok(())
}

pub async fn a_hibernated_sandbox_outlives_its_host(_: Arc<()>) -> anyhow::Result<()> {
    let server = EtcdServer::start().await?;
    let objects = tempfile::tempdir()?;
    let (store, object_store) =
        (format!("etcd://{}", server.address()), format!("file://{}", objects.path().display()));
    let options =
        ["--pool-size", "0", "--paused-for", "0", "--store", &store, "--object-store", &object_store];
    let mut first = Mesh::start(&options)?;
    let on = |mesh: &Mesh, sandbox: &Sandbox| mesh.rest().sandbox(&sandbox.id);
    let create = async || first.rest().create(json!({ "timeout": 0, "envs": { "A": "kept" } })).await;
    let (sandbox, forgotten) = (&create().await?, &create().await?);
    sandbox.run(WORK).await?;
    let pid = sandbox.run("cat /dev/shm/pid").await?;
    // What is put there of an earlier hibernation is not what it wakes from.
    for round in ["earlier", "later"] {
        sandbox.run(&format!("echo {round} > round")).await?;
        for sandbox in [sandbox, forgotten] {
            first.rest().post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
            eventually("it is in the object store", async || {
                let shown = sandbox.get().await?.expect(200)?.json();
                ensure!(shown["isUploaded"] == true && shown["status"] == "hibernated", "{shown}");
                Ok(())
            })
            .await?;
        }
    }
    let second = Mesh::start(&options)?;
    lose(&first)?;
    let rest = second.rest();
    without(&rest, &first).await?;

    let woken = on(&second, sandbox);
    let ran = format!("{GOES_ON} && echo $A $(cat disk round)");
    assert_eq!(woken.run(&ran).await?, "kept kept later\n");
    assert_eq!(woken.run("cat /dev/shm/pid").await?, pid, "its processes came along");
    let shown = woken.get().await?.expect(200)?.json();
    assert_eq!((&shown["startPath"], &shown["workerID"]), (&json!("memory"), &json!(second.host_id())));
    on(&second, forgotten).delete().await?;
    woken.run("echo second > disk").await?;
    eventually("nothing is left of what it was made of, nor of the other one", async || {
        no_snapshot(objects.path(), &second)
    })
    .await?;

    // The first host comes back with what it has stored: it is a stray, and the sandbox stays where it runs.
    first.up()?;
    eventually("it has nothing of them any more", async || {
        let left: Vec<_> =
            ["agent/vms", "agent/snapshots"].iter().map(|at| files(&first.state().join(at))).collect();
        ensure!(left.iter().flatten().all(Vec::is_empty), "{left:?}");
        Ok(())
    })
    .await?;
    assert_eq!(on(&first, sandbox).run("cat disk").await?, "second\n");
    on(&first, sandbox).delete().await?;
    first.stop()?;
    second.stop()
}

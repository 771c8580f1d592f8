//! Sandboxes that go on in clones that waited in the pool, instead of in a new VMM.

use std::{collections::HashSet, sync::Arc};

use anyhow::{Context as _, ensure};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::{Rest, Sandbox},
};
use serde_json::json;

use crate::checkpoints::{checkpoint, delete_all, fork, id, of, restore, with_witness, witness};

/// The processes of clones that wait, so many at least.
async fn waiting(mesh: &Mesh, wanted: u64) -> anyhow::Result<HashSet<i32>> {
    let rest = mesh.rest();
    eventually("clones wait", async || {
        let ready = rest.get("/api/nodes").await?.json()[0]["poolReady"].as_u64();
        ensure!(ready >= Some(wanted), "{ready:?}");
        Ok(())
    })
    .await?;
    Ok(processes::vmms(mesh.state()).into_iter().map(|vmm| vmm.pid).collect())
}

fn vmm(mesh: &Mesh, sandbox: &Sandbox) -> anyhow::Result<i32> {
    Ok(processes::vmm_of(mesh.state(), &sandbox.id).context("it has no microVM")?.pid)
}

/// Forks live, and sees that the child is in a VMM that was there.
async fn grafted(mesh: &Mesh, rest: &Rest, path: &str) -> anyhow::Result<Sandbox> {
    let before = waiting(mesh, 1).await?;
    let children = fork(rest, path, json!({ "mode": "live", "timeout": 0 })).await?;
    let child = children.into_iter().next().context("no child")?;
    assert!(before.contains(&vmm(mesh, &child)?), "its VMM is a new one");
    Ok(child)
}

pub async fn a_live_fork_goes_on_in_a_clone_that_waited(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let parent = with_witness(&rest, json!({ "timeout": 0, "diskMB": 24576 })).await?;
    parent.run("head -c 3000000 /dev/urandom > data; sync").await?;
    let (who, _) = witness(&parent).await?;
    let child = grafted(&mesh, &rest, &parent.path("/fork")).await?;
    let sum = "sha256sum data; df --output=size -B1M / | tail -1; hostname";
    assert_eq!(child.run(sum).await?, parent.run(sum).await?, "its disk and its size came along");
    assert_eq!(witness(&child).await?.0, who, "its processes came along");
    eventually("its processes go on", async || {
        let (now, beat) = witness(&child).await?;
        ensure!(now == who && beat > witness(&parent).await?.1 / 2);
        Ok(())
    })
    .await?;
    child.run("echo child > mine; rm data").await?;
    assert_eq!(parent.run("ls").await?, "data\nwitness.py\n", "its disk is its own");

    // What went on there is taken down as any other, gone back to and branched from, and one that waited takes that on again.
    let taken = checkpoint(&rest, &child, json!({ "name": "of a graft" })).await?;
    child.run("rm mine").await?;
    let grandchild = grafted(&mesh, &rest, &of(&taken, "/fork")).await?;
    assert_eq!(grandchild.run("ls; cat mine").await?, "mine\nwitness.py\nchild\n");
    assert_eq!(witness(&grandchild).await?.0, who);
    let before = waiting(&mesh, 1).await?;
    restore(&rest, &child, &taken).await?.expect(200)?;
    assert!(before.contains(&vmm(&mesh, &child)?), "it was restored into a new VMM");
    assert_eq!(child.run("cat mine").await?, "child\n");
    assert_eq!(witness(&child).await?.0, who);
    rest.delete(&format!("/api/checkpoints/{}", id(&taken))).await?.expect(204)?;
    delete_all(vec![parent, child, grandchild]).await
}

/// A program that computes and checks what it computes, without a rest: whatever is stale of its code or its memory shows.
const BUSY: &str = "\
import hashlib, zlib
known, rounds = {}, 0
while True:
    for number in range(50):
        data = bytes((number * n) % 251 for n in range(997))
        digest = (hashlib.sha256(data).hexdigest(), zlib.crc32(data), sum(data))
        assert known.setdefault(number, digest) == digest
    rounds += 1
    open('/dev/shm/rounds', 'w').write(str(rounds))
";

pub async fn a_busy_sandbox_is_forked_into_clones_that_waited(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let parent = rest.create(json!({ "timeout": 0 })).await?;
    parent.put("busy.py", BUSY).await?.expect(204)?;
    parent
        .run("python3 busy.py 2> /dev/shm/errors > /dev/null & while :; do :; done > /dev/null 2>&1 & echo")
        .await?;
    let rounds = async |sandbox: &Sandbox| -> anyhow::Result<u64> {
        Ok(sandbox.run("cat /dev/shm/rounds").await?.trim().parse()?)
    };
    eventually("it computes", async || rounds(&parent).await).await?;
    for _ in 0..4 {
        let child = grafted(&mesh, &rest, &parent.path("/fork")).await?;
        let begun = rounds(&child).await?;
        eventually("it computes on", async || {
            ensure!(rounds(&child).await? > begun + 2);
            Ok(())
        })
        .await?;
        assert_eq!(child.run("cat /dev/shm/errors").await?, "", "what it computes is wrong");
        child.delete().await?;
    }
    parent.delete().await
}

pub async fn a_stored_sandbox_wakes_in_a_clone_that_waited(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = with_witness(&rest, json!({ "timeout": 0 })).await?;
    let (who, _) = witness(&sandbox).await?;
    for round in 0..3 {
        sandbox.run(&format!("echo {round} >> rounds; sync")).await?;
        rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
        eventually("its process is ended", async || {
            ensure!(processes::vmm_of(mesh.state(), &sandbox.id).is_none());
            Ok(())
        })
        .await?;
        let before = waiting(&mesh, 1).await?;
        let (now, beat) = witness(&sandbox).await?;
        assert_eq!(now, who, "its processes go on");
        assert_eq!(sandbox.get().await?.json()["startPath"], "memory");
        assert!(before.contains(&vmm(&mesh, &sandbox)?), "it went on in a new VMM");
        eventually("it goes on", async || {
            ensure!(witness(&sandbox).await?.1 > beat);
            Ok(())
        })
        .await?;
    }
    assert_eq!(sandbox.run("cat rounds").await?, "0\n1\n2\n");
    assert_eq!(sandbox.run_as_root("dmesg | grep -ciE 'ext4.*error|call trace' || true").await?, "0\n");
    sandbox.delete().await
}

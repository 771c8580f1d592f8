//! Sandboxes that go on in clones that waited in the pool, instead of in a new VMM.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::{Rest, Sandbox},
};
use serde_json::{Value, json};

use crate::checkpoints::{checkpoint, delete_all, fork, id, of, restore, witness};

/// Counts in memory, and keeps a secret there: as little as a process can change of a sandbox's memory, because one that has
/// changed much is restored into a new VMM. Whoever reads it finds it whole.
const COUNTER: &str = "\
secret=$(od -An -tx8 -N8 /dev/urandom); beats=0
while :; do
    echo $$ $secret $beats > /dev/shm/next; mv /dev/shm/next /dev/shm/witness
    beats=$((beats + 1)); sleep 0.1
done
";

async fn with_counter(rest: &Rest, body: Value) -> anyhow::Result<Sandbox> {
    let sandbox = rest.create(body).await?;
    sandbox.put("counter", COUNTER).await?.expect(204)?;
    sandbox.run("sh counter > /dev/null 2>&1 & echo").await?;
    eventually("it counts", async || witness(&sandbox).await).await?;
    Ok(sandbox)
}

/// Waits until a clone waits; the moment, by the kernel's clock.
async fn waiting(mesh: &Mesh) -> anyhow::Result<Duration> {
    let rest = mesh.rest();
    eventually("a clone waits", async || {
        let ready = rest.get("/api/nodes").await?.json()[0]["poolReady"].as_u64();
        ensure!(ready >= Some(1), "{ready:?}");
        Ok(())
    })
    .await?;
    processes::uptime()
}

/// Whether a sandbox is in a VMM that was there at that moment.
fn is_grafted(mesh: &Mesh, sandbox: &Sandbox, moment: Duration) -> anyhow::Result<bool> {
    Ok(processes::started_at(vmm(mesh, sandbox)?)? < moment)
}

fn vmm(mesh: &Mesh, sandbox: &Sandbox) -> anyhow::Result<i32> {
    Ok(processes::vmm_of(mesh.state(), &sandbox.id).context("it has no microVM")?.pid)
}

/// Others take the clones that wait, too: so often is it tried to get one.
const ATTEMPTS: usize = 30;
/// A sandbox sleeps and wakes so often at least.
const ROUNDS: usize = 8;

/// Forks live until a child is in a VMM that was there.
async fn grafted(mesh: &Mesh, rest: &Rest, path: &str) -> anyhow::Result<Sandbox> {
    for _ in 0..ATTEMPTS {
        let before = waiting(mesh).await?;
        let children = fork(rest, path, json!({ "mode": "live", "timeout": 0 })).await?;
        let child = children.into_iter().next().context("no child")?;
        if is_grafted(mesh, &child, before)? {
            return Ok(child);
        }
        child.delete().await?;
    }
    anyhow::bail!("each of {ATTEMPTS} children is in a VMM of its own")
}

pub async fn a_live_fork_goes_on_in_a_clone_that_waited(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let parent = with_counter(&rest, json!({ "timeout": 0, "diskMB": 24576 })).await?;
    parent.run("head -c 300000 /dev/urandom > data; sync").await?;
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
    assert_eq!(parent.run("ls").await?, "counter\ndata\n", "its disk is its own");

    // What went on there is taken down as any other, gone back to and branched from, and one that waited takes that on again.
    let taken = checkpoint(&rest, &child, json!({ "name": "of a graft" })).await?;
    child.run("rm mine").await?;
    let grandchild = grafted(&mesh, &rest, &of(&taken, "/fork")).await?;
    assert_eq!(grandchild.run("ls; cat mine").await?, "counter\nmine\nchild\n");
    assert_eq!(witness(&grandchild).await?.0, who);
    let mut is_in_clone = false;
    for _ in 0..ATTEMPTS {
        let before = waiting(&mesh).await?;
        restore(&rest, &child, &taken).await?.expect(200)?;
        is_in_clone = is_grafted(&mesh, &child, before)?;
        if is_in_clone {
            break;
        }
    }
    assert!(is_in_clone, "it was always restored into a new VMM");
    assert_eq!(child.run("cat mine").await?, "child\n");
    assert_eq!(witness(&child).await?.0, who);
    rest.delete(&format!("/api/checkpoints/{}", id(&taken))).await?.expect(204)?;
    delete_all(vec![parent, child, grandchild]).await
}

/// A program that computes and checks what it computes, without a rest: whatever is stale of its code or its memory shows.
const BUSY: &str = "\
known=; rounds=0
while :; do
    sum=0; number=0
    while [ $number -lt 3000 ]; do
        sum=$(( (sum * 31 + number) % 1000003 )); number=$((number + 1))
    done
    known=${known:-$sum}
    [ $sum = $known ] || echo \"$sum is not $known\" >> /dev/shm/errors
    rounds=$((rounds + 1)); echo $rounds > /dev/shm/next; mv /dev/shm/next /dev/shm/rounds
done
";

pub async fn a_busy_sandbox_is_forked_into_clones_that_waited(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let parent = rest.create(json!({ "timeout": 0 })).await?;
    parent.put("busy", BUSY).await?.expect(204)?;
    parent
        .run("touch /dev/shm/errors; sh busy > /dev/null 2>&1 & sh -c 'while :; do :; done' > /dev/null 2>&1 & echo")
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
    let sandbox = with_counter(&rest, json!({ "timeout": 0 })).await?;
    let (who, _) = witness(&sandbox).await?;
    let (mut expected, mut in_clones) = (String::new(), 0);
    for round in 0.. {
        if round >= ROUNDS && in_clones > 1 {
            break;
        }
        assert!(round < ATTEMPTS, "it went on in a new VMM each time, or nearly");
        sandbox.run(&format!("echo {round} >> rounds; sync")).await?;
        rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
        eventually("its process is ended", async || {
            ensure!(processes::vmm_of(mesh.state(), &sandbox.id).is_none());
            Ok(())
        })
        .await?;
        let before = waiting(&mesh).await?;
        let (now, beat) = witness(&sandbox).await?;
        assert_eq!(now, who, "its processes go on");
        assert_eq!(sandbox.get().await?.json()["startPath"], "memory");
        in_clones += usize::from(is_grafted(&mesh, &sandbox, before)?);
        expected.push_str(&format!("{round}\n"));
        eventually("it goes on", async || {
            ensure!(witness(&sandbox).await?.1 > beat);
            Ok(())
        })
        .await?;
    }
    assert_eq!(sandbox.run("cat rounds").await?, expected);
    assert_eq!(sandbox.run_as_root("dmesg | grep -ciE 'ext4.*error|call trace' || true").await?, "0\n");
    sandbox.delete().await
}

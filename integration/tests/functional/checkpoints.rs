//! States of sandboxes: taken down, gone back to, branched from.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use futures_util::{
    FutureExt as _,
    future::{join_all, try_join_all},
};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::{Answer, Rest, Sandbox},
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::hibernation::{self, check_disk, rounds, start_writers, verify_writers};

/// Checkpoints of everything that a sandbox may have.
const MAX_FULL: usize = 10;

pub async fn checkpoint(rest: &Rest, sandbox: &Sandbox, body: Value) -> anyhow::Result<Value> {
    Ok(rest.post(&sandbox.path("/checkpoints"), body).await?.expect(201)?.json())
}

pub async fn restore(rest: &Rest, sandbox: &Sandbox, checkpoint: &Value) -> anyhow::Result<Answer> {
    // As the published clients do: a JSON content type and nothing else.
    let path = sandbox.path(&format!("/checkpoints/{}/restore", id(checkpoint)));
    rest.send(rest.request(Method::POST, &path).header("content-type", "application/json")).await
}

pub async fn fork(rest: &Rest, path: &str, body: Value) -> anyhow::Result<Vec<Sandbox>> {
    let made = rest.post(path, body).await?.expect(201)?.json();
    let made = made["sandboxes"].as_array().context("no sandboxes")?;
    Ok(made.iter().map(|one| rest.sandbox(one["sandboxID"].as_str().unwrap_or_default())).collect())
}

pub fn id(checkpoint: &Value) -> &str {
    checkpoint["id"].as_str().unwrap()
}

pub fn of(checkpoint: &Value, rest: &str) -> String {
    format!("/api/checkpoints/{}{rest}", id(checkpoint))
}

/// Where the host keeps a checkpoint.
fn place(mesh: &Mesh, checkpoint: &Value) -> PathBuf {
    mesh.state().join("agent/snapshots").join(id(checkpoint))
}

pub async fn delete_all(sandboxes: Vec<Sandbox>) -> anyhow::Result<()> {
    try_join_all(sandboxes.iter().map(Sandbox::delete)).await.map(drop)
}

/// Counts in memory, and keeps a secret there.
const WITNESS: &str = "\
import os, time
secret, beats = os.urandom(16).hex(), 0
while True:
    with open('/dev/shm/next', 'w') as out: print(os.getpid(), secret, beats, file=out)
    os.rename('/dev/shm/next', '/dev/shm/witness')
    beats += 1
    time.sleep(0.05)
";

/// Process and secret of the witness, and its beat.
pub async fn witness(sandbox: &Sandbox) -> anyhow::Result<(String, u64)> {
    let text = sandbox.run("cat /dev/shm/witness").await?;
    let (who, beat) = text.trim().rsplit_once(' ').context("no witness")?;
    Ok((who.to_owned(), beat.parse()?))
}

async fn with_witness(rest: &Rest, body: Value) -> anyhow::Result<Sandbox> {
    let sandbox = rest.create(body).await?;
    sandbox.put("witness.py", WITNESS).await?.expect(204)?;
    sandbox.run("python3 witness.py > /dev/null 2>&1 & echo").await?;
    eventually("the witness writes", async || witness(&sandbox).await).await?;
    Ok(sandbox)
}

pub async fn a_checkpoint_is_gone_back_to_and_branched_from(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = with_witness(&rest, json!({ "envs": { "A": "parent", "B": "kept" } })).await?;
    sandbox.run("echo first > file").await?;
    let (who, _) = witness(&sandbox).await?;
    let first = checkpoint(&rest, &sandbox, json!({ "name": "first" })).await?;
    assert_eq!((&first["status"], &first["kind"]), (&json!("ready"), &json!("full")));
    assert_eq!((&first["isQuiesced"], &first["parentId"]), (&json!(true), &json!("")));
    assert!(first["sizeBytes"].as_i64() > Some(0), "{first}");
    sandbox.run("echo second > file; echo more > other").await?;
    let second = checkpoint(&rest, &sandbox, json!({ "name": "second", "kind": "disk_only" })).await?;
    assert_eq!((&second["kind"], &second["parentId"]), (&json!("disk_only"), &first["id"]));

    // Back, with what ran then, under the same ID.
    sandbox.run("touch /dev/shm/later").await?;
    let restored = restore(&rest, &sandbox, &first).await?.expect(200)?.json();
    assert_eq!((&restored["sandboxID"], &restored["startPath"]), (&json!(sandbox.id), &json!("restored")));
    assert_eq!(sandbox.run("cat file; ls; ls /dev/shm/later || true").await?, "first\nfile\nwitness.py\n");
    assert_eq!(witness(&sandbox).await?.0, who, "it is another process");
    // What follows is a branch beside the second one.
    let third = checkpoint(&rest, &sandbox, json!({ "name": "third" })).await?;
    assert_eq!(third["parentId"], first["id"]);

    // Forward again: a disk that boots.
    let restored = restore(&rest, &sandbox, &second).await?.expect(200)?.json();
    assert_eq!(restored["startPath"], "restored-disk");
    assert_eq!(sandbox.run("cat file other; echo $A; ls /dev/shm").await?, "second\nmore\nparent\n");

    // Others begin there, with an identity of their own.
    let live = fork(
        &rest,
        &of(&first, "/fork"),
        json!({ "count": 3, "mode": "live", "envs": { "A": "child" }, "timeout": 60 }),
    )
    .await?;
    let mut seen = HashSet::from([sandbox.run("cat /etc/machine-id").await?]);
    for (number, child) in live.iter().enumerate() {
        let facts = child.get().await?.expect(200)?.json();
        assert_eq!((&facts["fromCheckpointId"], &facts["timeout"]), (&first["id"], &json!(60)));
        let renewed = ["clock", "entropy", "hostname", "environment", "machine-id", "boot-id"];
        assert_eq!(facts["renewed"], json!(renewed));
        assert_eq!(witness(child).await?.0, who, "its processes came along");
        assert_eq!(child.run("cat file; hostname; echo $A $B").await?, "first\nsandbox\nchild kept\n");
        let boot_id = "cat /proc/sys/kernel/random/boot_id";
        for secret in ["cat /etc/machine-id", "head -c 16 /dev/urandom | od -An -tx1", boot_id] {
            assert!(seen.insert(child.run(secret).await?), "two have the same: {secret}");
        }
        hibernation::knows_the_time(child).await?;
        child.run(&format!("echo {number} > file; echo {number} > /dev/shm/mine")).await?;
    }
    for (number, child) in live.iter().enumerate() {
        let text = format!("{number}\n{number}\n");
        assert_eq!(child.run("cat file /dev/shm/mine").await?, text, "it sees another's writes");
    }
    assert_eq!(sandbox.run("cat file").await?, "second\n");
    let cold = rest
        .post(&format!("/api/sandboxes/from-checkpoint/{}", id(&first)), json!({ "secretStore": "none" }))
        .await?
        .expect(201)?
        .json();
    assert_eq!((&cold["startPath"], &cold["status"]), (&json!("restored-disk"), &json!("running")));
    let cold = rest.sandbox(cold["sandboxID"].as_str().unwrap());
    assert_eq!(cold.run("cat file; echo $A; ls /dev/shm").await?, "first\nparent\n");

    // They outlive their sandbox, and what was made of them outlives them.
    sandbox.delete().await?;
    let listed = rest.get(&sandbox.path("/checkpoints")).await?.expect(200)?.json();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["name"].clone()).collect();
    assert_eq!(names, ["first", "second", "third"]);
    rest.delete(&of(&first, "")).await?.expect(204)?;
    assert_eq!(rest.get(&of(&first, "")).await?.refusal(), (404, "CHECKPOINT_NOT_FOUND".into()));
    // Their tree closes up.
    for child in [&second, &third] {
        assert_eq!(rest.get(&of(child, "")).await?.expect(200)?.json()["parentId"], "");
    }
    assert_eq!(live[0].run("cat file").await?, "0\n");
    let late = fork(&rest, &of(&third, "/fork"), json!({ "mode": "live" })).await?;
    assert_eq!(late[0].run("cat file").await?, "first\n");
    for (checkpoint, delete) in
        [(&second, sandbox.path(&format!("/checkpoints/{}", id(&second)))), (&third, of(&third, ""))]
    {
        rest.post(&of(checkpoint, "/verify"), json!({})).await?.expect(200)?;
        rest.delete(&delete).await?.expect(204)?;
        assert!(!place(&mesh, checkpoint).exists());
    }
    delete_all([live, vec![cold], late].concat()).await
}

pub async fn a_running_sandbox_branches_while_it_goes_on(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = with_witness(&rest, json!({ "timeout": 0 })).await?;
    // A call that is under way goes on, too.
    let under_way = {
        let sandbox = sandbox.clone();
        tokio::spawn(async move { sandbox.run("for n in 1 2 3 4 5 6; do echo $n; sleep 0.3; done").await })
    };
    let made =
        rest.post(&sandbox.path("/fork"), json!({ "count": 4, "mode": "live" })).await?.expect(201)?.json();
    assert!(made["pauseUs"].as_i64() > Some(0) && made["freezeUs"].as_i64() > Some(0), "{made}");
    let (who, _) = witness(&sandbox).await?;
    let children: Vec<_> = made["sandboxes"].as_array().unwrap().iter().collect();
    assert_eq!(children.len(), 4);
    let mut forks = Vec::new();
    for child in children {
        assert_eq!((&child["forkedFrom"], &child["timeout"]), (&json!(sandbox.id), &json!(0)));
        let child = rest.sandbox(child["sandboxID"].as_str().unwrap());
        let (same, beat) = witness(&child).await?;
        assert_eq!(same, who);
        eventually("it goes on by itself", async || {
            ensure!(witness(&child).await?.1 > beat);
            Ok(())
        })
        .await?;
        forks.push(child);
    }
    assert_eq!(under_way.await??, "1\n2\n3\n4\n5\n6\n");
    // A fork of a fork, and one that was asleep.
    rest.post(&forks[0].path("/hibernate"), json!({})).await?.expect(200)?;
    let again = fork(&rest, &forks[0].path("/fork"), json!({ "mode": "live" })).await?;
    assert_eq!(witness(&again[0]).await?.0, who);
    let cold = fork(&rest, &sandbox.path("/fork"), json!({})).await?;
    assert_eq!(cold[0].run("ls").await?, "witness.py\n");
    assert_eq!(cold[0].get().await?.json()["startPath"], "restored-disk");
    delete_all([forks, again, cold, vec![sandbox]].concat()).await?;
    eventually("nothing of what they were made of is left", async || {
        let left: Vec<_> = std::fs::read_dir(mesh.state().join("agent/snapshots"))?
            .filter_map(|entry| Some(entry.ok()?.file_name().into_string().unwrap_or_default()))
            .filter(|name| name.contains("fk-"))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

pub async fn a_fork_has_ssh_host_keys_of_its_own(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    let keys = "cat /etc/ssh/ssh_host_ed25519_key.pub | cut -d ' ' -f 2";
    sandbox
        .run_as_root("mkdir -p /etc/ssh; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key")
        .await?;
    let mut seen = HashSet::from([sandbox.run(keys).await?]);
    let taken = checkpoint(&rest, &sandbox, json!({ "name": "with keys" })).await?;
    for mode in ["live", "cold"] {
        let forks = fork(&rest, &of(&taken, "/fork"), json!({ "mode": mode })).await?;
        assert!(seen.insert(forks[0].run(keys).await?), "a {mode} fork has the keys of another");
        let renewed = forks[0].get().await?.json()["renewed"].clone();
        assert!(renewed.as_array().unwrap().contains(&json!("ssh-host-keys")), "{renewed}");
        delete_all(forks).await?;
    }
    // One that is put back is who it was.
    restore(&rest, &sandbox, &taken).await?.expect(200)?;
    assert!(seen.contains(&sandbox.run(keys).await?));
    rest.delete(&of(&taken, "")).await?.expect(204)?;
    sandbox.delete().await
}

pub async fn forks_share_what_none_of_them_changed(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    const CHANGED_MIB: u64 = 200;
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    sandbox
        .run(&format!("head -c {CHANGED_MIB}M /dev/urandom > /dev/shm/much; md5sum < /dev/shm/much > sum"))
        .await?;
    let forks = fork(&rest, &sandbox.path("/fork"), json!({ "count": 4, "mode": "live" })).await?;
    let vmms: Vec<i32> =
        forks.iter().filter_map(|fork| Some(processes::vmm_of(mesh.state(), &fork.id)?.pid)).collect();
    assert_eq!(vmms.len(), forks.len());
    for child in &forks {
        assert_eq!(child.run("md5sum < /dev/shm/much | cmp - sum && echo same").await?, "same\n");
    }
    let own = |field: &str| -> u64 {
        vmms.iter().filter_map(|pid| processes::memory_kib(*pid, "smaps_rollup", field)).sum::<u64>() >> 10
    };
    // Each has read all of it; it is in memory once, and nobody's own.
    let private = own("Private_Dirty");
    assert!(private < CHANGED_MIB * 2, "{} forks have {private} MiB of their own", forks.len());
    forks[0].run("head -c 16 /dev/zero | dd of=/dev/shm/much conv=notrunc 2> /dev/null").await?;
    for child in forks.iter().skip(1).chain([&sandbox]) {
        assert_eq!(child.run("md5sum < /dev/shm/much | cmp - sum && echo same").await?, "same\n");
    }
    delete_all([forks, vec![sandbox]].concat()).await
}

pub async fn bad_checkpoints_and_forks_are_refused(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    let path = sandbox.path("/checkpoints");
    let refused = async |path: &str, body: Value| -> anyhow::Result<(u16, String)> {
        Ok(rest.post(path, body).await?.refusal())
    };
    for (body, reason) in [
        (json!({}), "INVALID_ARGUMENT"),
        (json!({ "name": "" }), "INVALID_ARGUMENT"),
        (json!({ "name": "a\nb" }), "INVALID_ARGUMENT"),
        (json!({ "name": "x".repeat(129) }), "INVALID_ARGUMENT"),
        (json!({ "name": "a", "kind": "half" }), "INVALID_ARGUMENT"),
        (
            json!({ "name": "a", "retentionPolicy": { "mode": "delete_oldest", "maxCount": 11 } }),
            "INVALID_ARGUMENT",
        ),
        (json!({ "name": "a", "retentionPolicy": { "maxCount": -1 } }), "INVALID_ARGUMENT"),
    ] {
        assert_eq!(refused(&path, body.clone()).await?, (400, reason.into()), "{body}");
    }
    let disk = checkpoint(&rest, &sandbox, json!({ "name": "disk", "kind": "disk_only" })).await?;
    assert_eq!(refused(&path, json!({ "name": "disk" })).await?, (409, "CHECKPOINT_EXISTS".into()));
    for count in [0, 65, -1] {
        for path in [sandbox.path("/fork"), of(&disk, "/fork")] {
            assert_eq!(refused(&path, json!({ "count": count })).await?, (400, "INVALID_ARGUMENT".into()));
        }
    }
    let live = json!({ "mode": "live" });
    assert_eq!(refused(&of(&disk, "/fork"), live).await?, (400, "CHECKPOINT_HAS_NO_MEMORY".into()));
    for unknown in ["cp-00000000000000000000", "cp-1", "..%2f..%2fx", "sb-00000000000000000000"] {
        let not_found = (404, "CHECKPOINT_NOT_FOUND".to_owned());
        let base = format!("/api/checkpoints/{unknown}");
        assert_eq!(rest.get(&base).await?.refusal(), not_found, "{unknown}");
        assert_eq!(rest.delete(&base).await?.refusal(), not_found);
        assert_eq!(refused(&format!("{base}/fork"), json!({})).await?, not_found);
        assert_eq!(refused(&format!("{base}/verify"), json!({})).await?, not_found);
        assert_eq!(
            refused(&sandbox.path(&format!("/checkpoints/{unknown}/restore")), json!({})).await?,
            not_found
        );
    }
    // Another sandbox's is not this one's, and another tenant's is nobody's.
    let other = rest.create(json!({})).await?;
    assert_eq!(restore(&rest, &other, &disk).await?.refusal(), (404, "CHECKPOINT_NOT_FOUND".into()));
    let (_, theirs) = mesh.rest_of_new_tenant("branches").await?;
    assert_eq!(theirs.get(&of(&disk, "")).await?.refusal(), (404, "CHECKPOINT_NOT_FOUND".into()));
    assert_eq!(theirs.delete(&of(&disk, "")).await?.refusal(), (404, "CHECKPOINT_NOT_FOUND".into()));
    assert_eq!(theirs.get(&path).await?.refusal(), (404, "SANDBOX_NOT_FOUND".into()));
    assert_eq!(
        theirs.post(&sandbox.path("/fork"), json!({})).await?.refusal(),
        (404, "SANDBOX_NOT_FOUND".into())
    );
    assert_eq!(theirs.get("/api/checkpoints").await?.expect(200)?.json(), json!([]));
    // A sandbox's token is not enough.
    let token = sandbox.get().await?.json()["token"].as_str().unwrap().to_owned();
    let asked = rest.anonymous(Method::GET, &path).bearer_auth(token);
    assert_eq!(rest.send(asked).await?.refusal(), (403, "INVALID_CREDENTIALS".into()));
    delete_all(vec![other]).await?;
    sandbox.delete().await?;
    assert_eq!(refused(&path, json!({ "name": "late" })).await?, (410, "SANDBOX_DELETED".into()));
    assert_eq!(restore(&rest, &sandbox, &disk).await?.refusal(), (410, "SANDBOX_DELETED".into()));
    assert_eq!(refused(&sandbox.path("/fork"), json!({})).await?, (410, "SANDBOX_DELETED".into()));
    rest.delete(&of(&disk, "")).await?.expect(204).map(drop)
}

pub async fn there_is_an_end_to_checkpoints(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    // Asked for all at once: as many as may be are taken, under every name once.
    let path = sandbox.path("/checkpoints");
    let asks = (0..MAX_FULL + 2).map(|number| {
        let body = json!({ "name": format!("n{}", number.min(MAX_FULL)) });
        rest.post(&path, body).boxed_local()
    });
    let answers: Vec<Answer> = join_all(asks).await.into_iter().collect::<anyhow::Result<_>>()?;
    let taken = answers.iter().filter(|answer| answer.status == 201).count();
    assert_eq!(taken, MAX_FULL);
    let refusals: Vec<_> =
        answers.iter().filter(|answer| answer.status != 201).map(|answer| answer.refusal().1).collect();
    assert!(
        refusals
            .iter()
            .all(|reason| ["TOO_MANY_CHECKPOINTS", "CHECKPOINT_EXISTS"].contains(&reason.as_str())),
        "{refusals:?}"
    );
    let eleventh = rest.post(&sandbox.path("/checkpoints"), json!({ "name": "eleventh" })).await?;
    assert_eq!(eleventh.refusal(), (400, "TOO_MANY_CHECKPOINTS".into()));
    // A disk is counted apart, and a policy makes room.
    let disk = checkpoint(&rest, &sandbox, json!({ "name": "disk", "kind": "disk_only" })).await?;
    let keep = json!({ "name": "kept", "retentionPolicy": { "mode": "delete_oldest", "maxCount": 3 } });
    let kept = checkpoint(&rest, &sandbox, keep).await?;
    let listed = rest.get(&sandbox.path("/checkpoints")).await?.expect(200)?.json();
    let listed = listed.as_array().unwrap();
    let full = listed.iter().filter(|one| one["kind"] == "full").count();
    assert_eq!((full, listed.len()), (3, 4), "{listed:?}");
    assert!(
        listed.iter().any(|one| one["id"] == kept["id"]) && listed.iter().any(|one| one["id"] == disk["id"])
    );
    let on_disk = std::fs::read_dir(mesh.state().join("agent/snapshots"))?.count();
    assert!(on_disk >= 4, "{on_disk}");
    for one in listed {
        rest.delete(&of(one, "")).await?.expect(204)?;
        assert!(!place(&mesh, one).exists());
    }
    sandbox.delete().await
}

/// Changes a byte in the middle of a file.
fn damage(file: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(file)?;
    // The middle of its data: what is large is sparse.
    let mut byte = [0];
    let end = file.metadata()?.len();
    let mut at = end / 2;
    let mut block = vec![0; 1 << 20];
    for start in (0..end).step_by(block.len()) {
        let read = file.read_at(&mut block, start)?;
        if let Some(found) = block[..read].iter().position(|byte| *byte != 0) {
            at = start + found as u64;
            if start >= end / 4 || read < block.len() {
                break;
            }
        }
    }
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x55], at).map_err(Into::into)
}

pub async fn a_damaged_checkpoint_is_told_and_never_served(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    // Enough for a memory image of its own; that of one that changed little is all clones'.
    sandbox.run("head -c 40M /dev/urandom > /dev/shm/much; echo here > file").await?;
    let damaged = || (500, "CHECKPOINT_DAMAGED".to_owned());
    for part in ["memory.img", "memory.digests", "state.bin", "layer.img", "layer.digests", "manifest.json"] {
        let taken = checkpoint(&rest, &sandbox, json!({ "name": part })).await?;
        damage(&place(&mesh, &taken).join(part))?;
        assert_eq!(rest.post(&of(&taken, "/verify"), json!({})).await?.refusal(), damaged(), "{part}");
        let live = rest.post(&of(&taken, "/fork"), json!({ "mode": "live" })).await?;
        assert_eq!(live.refusal(), damaged(), "{part}");
        assert_eq!(restore(&rest, &sandbox, &taken).await?.refusal(), damaged(), "{part}");
        assert_eq!(sandbox.run("cat file").await?, "here\n", "it is as it was");
        assert_eq!(sandbox.get().await?.json()["status"], "running");
        rest.delete(&of(&taken, "")).await?.expect(204)?;
    }
    // One whose directory is gone.
    let taken = checkpoint(&rest, &sandbox, json!({ "name": "lost" })).await?;
    std::fs::remove_dir_all(place(&mesh, &taken))?;
    assert_eq!(rest.post(&of(&taken, "/fork"), json!({})).await?.refusal(), damaged());
    rest.delete(&of(&taken, "")).await?.expect(204)?;
    sandbox.delete().await
}

pub async fn a_checkpoint_that_is_deleted_disturbs_no_fork(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    sandbox.run("head -c 40M /dev/urandom > /dev/shm/much; md5sum < /dev/shm/much > sum").await?;
    let taken = checkpoint(&rest, &sandbox, json!({ "name": "brief" })).await?;
    let path = of(&taken, "/fork");
    let forks = fork(&rest, &path, json!({ "count": 3, "mode": "live" }));
    let deletion = async {
        // Sooner or later than they have what they need: either way they are whole.
        tokio::time::sleep(std::time::Duration::from_millis(150)).await;
        rest.delete(&of(&taken, "")).await?.expect(204)
    };
    let (forks, deleted) = tokio::join!(forks, deletion);
    deleted?;
    assert!(!place(&mesh, &taken).exists());
    for child in forks.as_deref().unwrap_or_default() {
        assert_eq!(child.run("md5sum < /dev/shm/much | cmp - sum && echo same").await?, "same\n");
    }
    if let Err(error) = &forks {
        assert!(format!("{error:#}").contains("CHECKPOINT_"), "{error:#}");
    }
    delete_all([forks.unwrap_or_default(), vec![sandbox]].concat()).await
}

pub async fn writers_lose_nothing_however_their_sandbox_branches(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0 })).await?;
    start_writers(&sandbox).await?;
    for round in 0..rounds(2)? {
        let taken = checkpoint(&rest, &sandbox, json!({ "name": format!("round {round}") })).await?;
        ensure!(taken["isQuiesced"] == true, "round {round}: {taken}");
        check_disk(&place(&mesh, &taken).join("layer.img")).with_context(|| format!("round {round}"))?;
        rest.post(&of(&taken, "/verify"), json!({})).await?.expect(200)?;
        // They go on in the fork, and are whole on a disk that boots.
        let live = fork(&rest, &of(&taken, "/fork"), json!({ "mode": "live" })).await?;
        let there = verify_writers(&live[0]).await.with_context(|| format!("round {round}, live fork"))?;
        // The three of them, and who looks for them.
        assert!(there[0] >= 4, "round {round}: its writers write: {there:?}");
        let cold = fork(&rest, &of(&taken, "/fork"), json!({ "mode": "cold" })).await?;
        let stopped = verify_writers(&cold[0]).await.with_context(|| format!("round {round}, cold fork"))?;
        assert_eq!(stopped[0], 1, "nothing runs there");
        assert!(there[1..].iter().zip(&stopped[1..]).all(|(on, off)| on >= off), "{there:?} {stopped:?}");
        // Back to it, while they write.
        restore(&rest, &sandbox, &taken).await?.expect(200)?;
        let here = verify_writers(&sandbox).await.with_context(|| format!("round {round}, restored"))?;
        assert!(here[0] >= 4 && here[1] >= stopped[1], "round {round}: {here:?} {stopped:?}");
        let straight = fork(&rest, &sandbox.path("/fork"), json!({ "mode": "live" })).await?;
        verify_writers(&straight[0]).await.with_context(|| format!("round {round}, fork of the sandbox"))?;
        rest.delete(&of(&taken, "")).await?.expect(204)?;
        delete_all([live, cold, straight].concat()).await?;
    }
    sandbox.delete().await
}

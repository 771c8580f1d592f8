//! Services that die while a sandbox's state is taken, gone back to, or branched from.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, ensure};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::{Rest, Sandbox},
};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{chaos::Dice, killed::crash};

const ROUNDS: u64 = 18;
const SERVICES: [&str; 3] = ["vmm-agent", "scheduler", "gateway"];
/// At rest each operation is done by then.
const WITHIN_MS: u64 = 450;
/// Checkpoints that are kept at a time: a sandbox may have ten.
const KEPT: usize = 6;

/// What is asked of the sandbox in a round, and what was answered.
async fn ask(
    rest: Rest,
    sandbox: Sandbox,
    round: u64,
    back_to: Option<String>,
) -> anyhow::Result<Option<Value>> {
    let answer = match (round % 3, back_to) {
        (0, _) => {
            rest.post(&sandbox.path("/checkpoints"), json!({ "name": format!("round {round}") })).await?
        }
        (1, Some(id)) => rest.post(&sandbox.path(&format!("/checkpoints/{id}/restore")), json!({})).await?,
        _ => rest.post(&sandbox.path("/fork"), json!({ "count": 2, "mode": "live" })).await?,
    };
    Ok((answer.status < 300).then(|| answer.json()))
}

pub async fn a_sandbox_is_as_before_or_as_after_whoever_dies(_: Arc<()>) -> anyhow::Result<()> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    eprintln!("branches: seed {seed}");
    let mut dice = Dice(seed);
    let mesh = Mesh::start(&["--pool-size", "0"])?;
    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    sandbox.run("(while :; do sleep 1; done) > /dev/null 2>&1 & echo $! > /dev/shm/pid; echo 0 > disk; echo 0 > /dev/shm/memory; sync").await?;
    let pid = sandbox.run("cat /dev/shm/pid").await?;
    // Every checkpoint that was answered, with the round whose marks are in it.
    let mut taken: BTreeMap<String, u64> = BTreeMap::new();
    let first = mesh.rest().post(&sandbox.path("/checkpoints"), json!({ "name": "undisturbed" })).await?;
    taken.insert(first.expect(201)?.json()["id"].as_str().context("no ID")?.to_owned(), 0);
    let mut at = 0;
    for round in 0..ROUNDS {
        // In memory and on disk alike: it is never the one of one state and the other of another.
        sandbox.run(&format!("echo {round} > /dev/shm/memory; echo {round} > disk; sync")).await?;
        let back_to = taken.keys().nth(usize::try_from(dice.roll(KEPT as u64))?).cloned();
        let asked = tokio::spawn(ask(mesh.rest(), sandbox.clone(), round, back_to.clone()));
        sleep(Duration::from_millis(dice.roll(WITHIN_MS))).await;
        let service = SERVICES[usize::try_from(round / 3 % 3)?];
        let killed = mesh.running_pid(service).await?;
        crash(killed)?;
        // Who asked may have been cut off: what counts is what there is afterwards.
        let answer = asked.await?.ok().flatten();
        let state = eventually("it is used again", async || {
            ensure!(mesh.pid(service)? != killed, "the {service} is not replaced yet");
            sandbox.run("test $(cat disk) = $(cat /dev/shm/memory) && kill -0 $(cat /dev/shm/pid) && cat disk /dev/shm/pid").await
        })
        .await?;
        let (mark, same) = state.split_once('\n').unwrap_or_default();
        assert_eq!(same, pid, "round {round}: it is another process");
        let mark: u64 = mark.parse()?;
        let restored = back_to.as_ref().filter(|_| round % 3 == 1).and_then(|id| taken.get(id)).copied();
        match (restored, &answer) {
            (Some(before), Some(_)) => assert_eq!(mark, before, "round {round}: it was told that it is back"),
            (Some(before), None) => {
                assert!(mark == before || mark == round, "round {round}: it is at {mark}")
            }
            (None, _) => assert_eq!(mark, round, "round {round}: it went back by itself"),
        }
        at = mark;
        if let (0, Some(answer)) = (round % 3, &answer) {
            taken.insert(answer["id"].as_str().unwrap_or_default().to_owned(), round);
        }
        if round % 3 == 2
            && let Some(answer) = &answer
        {
            for fork in answer["sandboxes"].as_array().into_iter().flatten() {
                let fork = mesh.rest().sandbox(fork["sandboxID"].as_str().unwrap_or_default());
                let found =
                    eventually("a fork that was answered", async || fork.run("cat disk").await).await?;
                assert_eq!(found.trim(), round.to_string(), "{}", fork.id);
            }
        }
        // What else was made is nobody's, or goes by itself.
        eventually("only it is left", async || {
            for other in mesh.rest().list().await?.into_iter().filter(|id| *id != sandbox.id) {
                mesh.rest().sandbox(&other).delete().await?;
            }
            let vmms = processes::vmms(mesh.state()).len();
            ensure!(mesh.rest().list().await?.len() == 1 && vmms == 1, "{vmms} VMMs");
            Ok(())
        })
        .await?;
        // No checkpoint that was answered is lost.
        let listed = eventually("a settled list of checkpoints", async || {
            let listed = mesh.rest().get(&sandbox.path("/checkpoints")).await?.expect(200)?.json();
            let listed = listed.as_array().cloned().unwrap_or_default();
            ensure!(listed.iter().all(|one| one["status"] == "ready"), "{listed:?}");
            Ok(listed)
        })
        .await?;
        for id in taken.keys() {
            assert!(listed.iter().any(|one| one["id"] == json!(id)), "round {round}: {id} is lost");
            let verify = format!("/api/checkpoints/{id}/verify");
            eventually("it is whole", async || mesh.rest().post(&verify, json!({})).await?.expect(200))
                .await?;
        }
        // Those whose answer nobody heard, and old ones.
        let surplus = taken.keys().take(taken.len().saturating_sub(KEPT - 1)).cloned();
        let unheard = listed.iter().filter_map(|one| one["id"].as_str().map(str::to_owned));
        let gone: Vec<_> = surplus.chain(unheard.filter(|id| !taken.contains_key(id))).collect();
        for id in gone {
            mesh.rest().delete(&format!("/api/checkpoints/{id}")).await?.expect(204)?;
            taken.remove(&id);
        }
    }
    assert!(at < ROUNDS, "{at}");
    for id in taken.keys() {
        mesh.rest().delete(&format!("/api/checkpoints/{id}")).await?.expect(204)?;
    }
    sandbox.delete().await?;
    eventually("no snapshot is left on disk", async || {
        let left = std::fs::read_dir(mesh.state().join("agent/snapshots"))?.count();
        ensure!(left == 0, "{left} are left");
        Ok(())
    })
    .await?;
    mesh.stop()
}

//! Services that die while a sandbox is put to sleep or woken, in either tier.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::ensure;
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
};
use serde_json::json;
use tokio::time::sleep;

use crate::{chaos::Dice, killed::crash};

const ROUNDS: usize = 12;
const SERVICES: [&str; 3] = ["vmm-agent", "scheduler", "gateway"];
/// At rest a hibernation and a wake are both done by then.
const WITHIN_MS: u64 = 400;

pub async fn a_sandbox_is_paused_or_runs_whoever_dies(_: Arc<()>) -> anyhow::Result<()> {
    sleeps_or_runs("3600").await
}

pub async fn a_sandbox_is_stored_or_runs_whoever_dies(_: Arc<()>) -> anyhow::Result<()> {
    sleeps_or_runs("0").await
}

async fn sleeps_or_runs(paused_for: &str) -> anyhow::Result<()> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    eprintln!("sleepers: seed {seed}");
    let mut dice = Dice(seed);
    let mesh = Mesh::start(&["--pool-size", "0", "--paused-for", paused_for])?;
    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    // In memory only, and counted by one process: it is never another one, and never goes back.
    sandbox.run("(n=0; while :; do n=$((n + 1)); echo $n > /dev/shm/n; mv /dev/shm/n /dev/shm/beat; sleep 0.05; done) > /dev/null 2>&1 & echo $! > /dev/shm/pid").await?;
    let pid = sandbox.run("cat /dev/shm/pid").await?;
    let mut beat = 0;
    for round in 0..ROUNDS {
        let asked = {
            let (rest, sandbox, round) = (mesh.rest(), sandbox.clone(), round);
            tokio::spawn(async move {
                rest.post(&sandbox.path("/hibernate"), json!({})).await?;
                if round % 2 == 1 {
                    rest.post(&sandbox.path("/wake"), json!({})).await?;
                }
                anyhow::Ok(())
            })
        };
        sleep(Duration::from_millis(dice.roll(WITHIN_MS))).await;
        let service = SERVICES[round % SERVICES.len()];
        let killed = mesh.running_pid(service).await?;
        crash(killed)?;
        // Who asked may have been cut off: what counts is what there is afterwards.
        let _ = asked.await?;
        eventually("it is used again", async || {
            ensure!(mesh.pid(service)? != killed, "the {service} is not replaced yet");
            let now: u64 = sandbox.run("cat /dev/shm/beat").await?.trim().parse()?;
            ensure!(sandbox.run("sleep 0.2; cat /dev/shm/beat").await?.trim().parse::<u64>()? > now);
            assert!(now >= beat, "round {round}: it went back from {beat} to {now}");
            beat = now;
            Ok(())
        })
        .await?;
        assert_eq!(sandbox.run("cat /dev/shm/pid").await?, pid, "round {round}");
        let vmms = processes::vmms(mesh.state());
        assert_eq!(vmms.len(), 1, "round {round}: one VMM for one sandbox");
    }
    mesh.rest().post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    crash(mesh.running_pid("vmm-agent").await?)?;
    eventually("its restarted host knows that it is hibernated", async || {
        let state = sandbox.get().await?.expect(200)?.json();
        ensure!(state["status"] == "hibernated", "{state}");
        mesh.rest().get("/api/nodes").await?.expect(200).map(drop)
    })
    .await?;
    let left = processes::vmms(mesh.state()).len();
    assert_eq!(left, usize::from(paused_for != "0"), "only one that is paused has a process");
    eventually("it wakes", async || sandbox.run("cat /dev/shm/pid").await.map(drop)).await?;
    let path = if paused_for == "0" { "memory" } else { "paused" };
    assert_eq!(sandbox.get().await?.expect(200)?.json()["startPath"], path);
    sandbox.delete().await?;
    mesh.stop()
}

//! Kills at random moments.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::ensure;
use futures_util::future::try_join_all;
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::Sandbox,
};
use serde_json::json;
use tokio::time::sleep;

use crate::killed::crash;

const CREATES: usize = 100;
/// Where a hundred creates are done sooner, more follow.
const KILLS: usize = 15;
const AT_ONCE: usize = 4;
/// Every third sandbox stays until the end.
const STAYS: usize = 3;
const SERVICES: [&str; 3] = ["scheduler", "vmm-agent", "gateway"];

/// Numbers that look random and can be had again.
pub struct Dice(pub u64);

impl Dice {
    /// At least 0, and below `below`.
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// Creates and uses sandboxes until there were enough; those that stay.
async fn work(
    mesh: &Mesh,
    next: &AtomicUsize,
    kills: &AtomicUsize,
) -> anyhow::Result<Vec<(Sandbox, String)>> {
    let mut kept = Vec::new();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= CREATES && kills.load(Ordering::Relaxed) >= KILLS {
            return Ok(kept);
        }
        let sandbox = eventually("a create", async || mesh.rest().create(json!({})).await).await?;
        let script = format!("echo {number} > number");
        eventually("a first command", async || sandbox.run(&script).await.map(drop)).await?;
        if number.is_multiple_of(STAYS) {
            kept.push((sandbox, number.to_string()));
        } else {
            eventually("a deletion", async || sandbox.delete().await).await?;
        }
    }
}

pub async fn a_hundred_creates_among_kills_leave_only_what_works(_: Arc<()>) -> anyhow::Result<()> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    eprintln!("chaos: seed {seed}");
    let mesh = Arc::new(Mesh::start(&["--pool-size", "2"])?);
    let (done, kills) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let killer = {
        let (mesh, done, kills) = (Arc::clone(&mesh), Arc::clone(&done), Arc::clone(&kills));
        tokio::spawn(async move {
            let mut dice = Dice(seed);
            while !done.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(dice.roll(3000))).await;
                let service = SERVICES[usize::try_from(dice.roll(3)).unwrap_or_default()];
                // One that is just being started again is spared.
                if mesh.pid(service).is_ok_and(|pid| crash(pid).is_ok()) {
                    kills.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    let next = AtomicUsize::new(0);
    let workers = (0..AT_ONCE).map(|_| work(&mesh, &next, &kills));
    let kept: Vec<(Sandbox, String)> = try_join_all(workers).await?.into_iter().flatten().collect();
    done.store(true, Ordering::Relaxed);
    killer.await?;
    let kills = kills.load(Ordering::Relaxed);
    eprintln!("chaos: {kills} kills");

    // What a client was told of is there, with all that was written.
    for (sandbox, text) in &kept {
        let found = eventually("a sandbox that stays", async || sandbox.run("cat number").await).await?;
        assert_eq!(found.trim(), text, "{}", sandbox.id);
    }
    // What is listed works: also those whose create a client never heard the answer of.
    let told: HashSet<&str> = kept.iter().map(|(sandbox, _)| sandbox.id.as_str()).collect();
    let listed = eventually("a settled list", async || {
        let listed = mesh.rest().list().await?;
        for id in &listed {
            let state = mesh.rest().sandbox(id).get().await?.expect(200)?.json();
            ensure!(state["status"] == "running", "{state}");
        }
        Ok(listed)
    })
    .await?;
    for id in &told {
        assert!(listed.iter().any(|listed| listed == id), "{id} is not listed");
    }
    for id in &listed {
        eventually("a listed sandbox", async || mesh.rest().sandbox(id).run("true").await.map(drop)).await?;
    }
    // And nothing else runs.
    eventually("a VMM for each sandbox and the pool, and no other", async || {
        let pool = mesh.rest().get("/api/nodes").await?.json()[0]["poolReady"].as_u64().unwrap_or_default();
        let (vmms, expected) = (processes::vmms(mesh.state()).len(), listed.len() + usize::try_from(pool)?);
        ensure!(
            pool == 2 && vmms == expected,
            "{vmms} VMMs for {} sandboxes and {pool} in the pool",
            listed.len()
        );
        Ok(())
    })
    .await?;
    for id in &listed {
        mesh.rest().sandbox(id).delete().await?;
    }
    Arc::into_inner(mesh).expect("everybody is done").stop()
}

//! Fifty sessions with random input and known output, while what carries them is killed in turn: every byte comes once.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use oc_integration::{
    mesh::{Mesh, eventually},
    streams::Sessions,
};
use serde_json::json;
use tokio::time::sleep;

use crate::{chaos::Dice, killed::crash};

const SANDBOXES: usize = 5;
const SESSIONS: usize = 10;
/// Each session's input, bytes at most.
const MOST: u64 = 200_000;
/// Lines that each session writes beside that, one every 50 ms.
const LINES: usize = 120;
const SERVICES: [&str; 2] = ["gateway", "vmm-agent"];
const KILLS_EVERY: Duration = Duration::from_secs(3);

pub async fn fifty_sessions_lose_no_byte_whatever_is_killed(_: Arc<()>) -> anyhow::Result<()> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    eprintln!("streams: seed {seed}");
    let mut dice = Dice(seed);
    let mesh = Mesh::start(&["--pool-size", "0"])?;
    let script = format!(
        "(i=0; while [ $i -lt {LINES} ]; do echo line $i >&2; i=$((i+1)); sleep 0.05; done) & cat; wait; exit 7"
    );
    let mut followers = Vec::new();
    let mut sandboxes = Vec::new();
    for _ in 0..SANDBOXES {
        let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
        let sessions = Sessions::of(&mesh, &sandbox.id);
        sandboxes.push(sandbox);
        for _ in 0..SESSIONS {
            let length = dice.roll(MOST);
            let sent: Vec<u8> = (0..length).map(|_| dice.roll(256).to_le_bytes()[0]).collect();
            let pieces: Vec<usize> =
                (0..20).map(|_| usize::try_from(dice.roll(20_000))).collect::<Result<_, _>>()?;
            let id = sessions.start(&script).await?;
            let sessions = sessions.clone();
            followers.push(tokio::spawn(async move {
                let outcome = sessions.follow(&id, &sent, &pieces).await?;
                let lines: String = (0..LINES).map(|n| format!("line {n}\n")).collect();
                assert!(outcome.stdout == sent, "{id}: its input did not come back as it went");
                assert!(outcome.stderr == lines.as_bytes(), "{id}: its lines are not whole");
                assert_eq!(outcome.exit.exit_code, 7, "{id}");
                anyhow::Ok(outcome.returns)
            }));
        }
    }
    let mut kills = 0;
    let mut all = tokio::spawn(try_join_all(followers));
    let returns = loop {
        tokio::select! {
            ended = &mut all => break ended??,
            () = sleep(KILLS_EVERY) => {
                let service = SERVICES[kills % SERVICES.len()];
                let killed = mesh.running_pid(service).await?;
                crash(killed)?;
                kills += 1;
                eventually("it is replaced", async || {
                    anyhow::ensure!(mesh.pid(service)? != killed, "not yet");
                    Ok(())
                })
                .await?;
            }
        }
    };
    let returns = returns.into_iter().collect::<anyhow::Result<Vec<usize>>>()?;
    eprintln!("streams: {kills} kills, {} returns", returns.iter().sum::<usize>());
    assert!(kills >= 4, "it was over after {kills} kills");
    assert!(returns.iter().all(|&returns| returns > 0), "{returns:?}");
    for sandbox in sandboxes {
        // The last that was killed may not be back yet.
        let listed =
            eventually("a list", async || mesh.rest().get(&sandbox.path("/exec")).await?.expect(200))
                .await?
                .json();
        for session in listed.as_array().context("no list")? {
            assert_eq!(session["attachedClients"], 0, "{session}");
        }
        sandbox.delete().await?;
    }
    mesh.stop()
}

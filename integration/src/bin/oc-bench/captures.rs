//! Checkpoints, live forks, hibernation: what a sandbox at rest takes for each, and one that has changed its memory.

use std::time::Instant;

use anyhow::ensure;
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::{Rest, Sandbox},
};
use serde_json::json;
use tokio::time::sleep;

use crate::{
    beside::Ours,
    floor::fork::CHANGED_MIB,
    memory::mib,
    table::{Table, Target, median, ms_since},
    timed::{REST, answered, checkpoint, checkpoints_of, delete, fork, hibernate, rested, wake},
};

const MEMORY_MB: u64 = 512;
const RUNS: usize = 9;
/// Of what takes longer, or more of the machine.
const FEWER_RUNS: usize = 5;

pub async fn measure(table: &mut Table) -> anyhow::Result<Ours> {
    // Nothing waits in a pool, and nothing is paused: the microVMs are those of the sandboxes.
    let mesh = Mesh::start(&["--pool-size", "0", "--paused-for", "0"])?;
    let rest = mesh.rest();
    let sandbox = rested(&rest, MEMORY_MB).await?;
    let at_rest = checkpoints(&rest, &sandbox, table).await?;
    let changed = checkpoints_of_changed(&rest, table).await?;
    let (clone_ms, twenty_clones_ms) = forks(&mesh, &rest, &sandbox, table).await?;
    let wake_ms = sleeps(&mesh, &rest, &sandbox, table).await?;
    restores(&rest, &sandbox, table).await?;
    sandbox.delete().await?;
    mesh.stop()?;
    naps(table).await?;
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    let per_100_mib_ms = (changed - at_rest) / CHANGED_MIB as f64 * 100.0;
    Ok(Ours { clone_ms, twenty_clones_ms, checkpoint_ms: at_rest, per_100_mib_ms, wake_ms })
}

async fn checkpoints(rest: &Rest, sandbox: &Sandbox, table: &mut Table) -> anyhow::Result<f64> {
    let taken = checkpoints_of(rest, sandbox, 0, RUNS).await?;
    table.row("checkpoint at rest: REST call answered, p50", taken.call_ms, "ms", Target::None);
    table.row("checkpoint at rest: pause, p50", taken.pause_ms, "ms", Target::Most(30.0));
    table.row("checkpoint at rest: freeze and thaw beside it, p50", taken.freeze_ms, "ms", Target::None);
    Ok(taken.call_ms)
}

async fn checkpoints_of_changed(rest: &Rest, table: &mut Table) -> anyhow::Result<f64> {
    let sandbox = rested(rest, MEMORY_MB).await?;
    let taken = checkpoints_of(rest, &sandbox, CHANGED_MIB, FEWER_RUNS).await?;
    sandbox.delete().await?;
    let what = |what: &str| format!("checkpoint with {CHANGED_MIB} MiB changed: {what}, p50");
    table.row(&what("REST call answered"), taken.call_ms, "ms", Target::None);
    let target = Target::MostTimes(1.2, table.floor.fork.pause_changed_ms);
    table.row(&what("pause"), taken.pause_ms, "ms", target);
    Ok(taken.call_ms)
}

/// Milliseconds until 1 and until 20 children have answered.
async fn forks(mesh: &Mesh, rest: &Rest, sandbox: &Sandbox, table: &mut Table) -> anyhow::Result<(f64, f64)> {
    let one = forks_of(mesh, rest, sandbox, 1, RUNS).await?;
    let what = "live fork × 1 until the child has answered a command, p50";
    table.row(what, one.answered_ms, "ms", Target::Most(200.0));
    table.row("live fork × 1: pause of the parent, p50", one.pause_ms, "ms", Target::None);
    let what = "memory of a live fork that has answered a command (Pss)";
    table.row(what, one.memory_mib, "MiB", Target::Most(40.0));
    let ten = forks_of(mesh, rest, sandbox, 10, FEWER_RUNS).await?;
    let what = "live fork × 10 until all have answered a command, p50";
    table.row(what, ten.answered_ms, "ms", Target::Most(1000.0));
    // What a process shares with others counts the less, the more of them there are.
    table.row("memory of each of ten live forks (Pss)", ten.memory_mib, "MiB", Target::None);
    let twenty = forks_of(mesh, rest, sandbox, 20, FEWER_RUNS).await?;
    let what = "live fork × 20 until all have answered a command, p50";
    table.row(what, twenty.answered_ms, "ms", Target::None);
    Ok((one.answered_ms, twenty.answered_ms))
}

/// Medians of forks.
struct Forks {
    answered_ms: f64,
    pause_ms: f64,
    memory_mib: f64,
}

async fn forks_of(
    mesh: &Mesh,
    rest: &Rest,
    sandbox: &Sandbox,
    count: usize,
    runs: usize,
) -> anyhow::Result<Forks> {
    let (mut answers, mut pauses, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        sleep(REST).await;
        let before = processes::vmms(mesh.state());
        let forked = fork(rest, sandbox, count).await?;
        let mut new = processes::vmms(mesh.state());
        new.retain(|vmm| !before.contains(vmm));
        ensure!(new.len() == count, "{} new microVMs for {count} children", new.len());
        memory.extend(
            new.iter().filter_map(|vmm| processes::memory_kib(vmm.pid, "smaps_rollup", "Pss").map(mib)),
        );
        answers.push(forked.answered_ms);
        pauses.push(forked.pause_ms);
        forked.delete().await?;
    }
    Ok(Forks { answered_ms: median(&answers), pause_ms: median(&pauses), memory_mib: median(&memory) })
}

/// Hibernates and wakes; milliseconds until the first output after it.
async fn sleeps(mesh: &Mesh, rest: &Rest, sandbox: &Sandbox, table: &mut Table) -> anyhow::Result<f64> {
    eventually("nothing but the sandbox", async || {
        let vmms = processes::vmms(mesh.state()).len();
        ensure!(vmms == 1, "{vmms} microVMs");
        Ok(())
    })
    .await?;
    let (mut hibernated, mut woken) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        sleep(REST).await;
        hibernated.push(hibernate(rest, sandbox).await?);
        let left = processes::vmms(mesh.state());
        ensure!(left.is_empty(), "a hibernated sandbox has a process: {left:?}");
        sleep(REST).await;
        woken.push(wake(sandbox, "memory").await?);
    }
    let what = "hibernate at rest until its process is gone, p50";
    table.row(what, median(&hibernated), "ms", Target::Most(250.0));
    let woken = median(&woken);
    table.row("command for a hibernated sandbox → output, p50", woken, "ms", Target::Most(200.0));
    Ok(woken)
}

/// Hibernates and wakes while nothing is done but to pause: the first tier.
async fn naps(table: &mut Table) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "0", "--paused-for", "3600"])?;
    let rest = mesh.rest();
    let sandbox = rested(&rest, MEMORY_MB).await?;
    let (mut hibernated, mut woken) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        sleep(REST).await;
        hibernated.push(hibernate(&rest, &sandbox).await?);
        // It is captured meanwhile.
        sleep(REST).await;
        woken.push(wake(&sandbox, "paused").await?);
    }
    let what = "hibernate at rest until it is answered, paused, p50";
    table.row(what, median(&hibernated), "ms", Target::None);
    table.row("command for a paused sandbox → output, p50", median(&woken), "ms", Target::None);
    sandbox.delete().await?;
    mesh.stop()
}

async fn restores(rest: &Rest, sandbox: &Sandbox, table: &mut Table) -> anyhow::Result<()> {
    let (id, _) = checkpoint(rest, sandbox, "to go back to").await?;
    let path = sandbox.path(&format!("/checkpoints/{id}/restore"));
    let (mut restored, mut outputs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        sleep(REST).await;
        let begun = Instant::now();
        rest.post(&path, json!({})).await?.expect(200)?;
        restored.push(ms_since(begun));
        answered(sandbox).await?;
        outputs.push(ms_since(begun));
    }
    table.row("restore in place: REST call answered, p50", median(&restored), "ms", Target::Most(200.0));
    table.row("restore in place → first output, p50", median(&outputs), "ms", Target::None);
    delete(rest, &id).await
}

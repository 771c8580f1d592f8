//! Checkpoints, live forks, hibernation: what a sandbox at rest takes for each, and one that has changed its memory. First where no
//! clone waits that could take its state on, then where there are some, as there are unless a host is told otherwise.

use std::time::Instant;

use anyhow::{Context as _, ensure};
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
/// Clones that wait: those of a host with enough memory, if it is told nothing.
const WAITING: usize = 24;

pub async fn measure(table: &mut Table) -> anyhow::Result<Ours> {
    let cold = Bench::start(0, 0).await?;
    let at_rest = checkpoints(&cold, table).await?;
    let changed = checkpoints_of_changed(&cold, table).await?;
    let one = forks(&cold, 1, FEWER_RUNS).await?;
    let what = "live fork × 1 until the child has answered a command, no clone waits, p50";
    table.row(what, one.answered_ms, "ms", Target::None);
    let slept = sleeps(&cold, "memory", table).await?;
    table.row("command for a hibernated sandbox → output, no clone waits, p50", slept, "ms", Target::None);
    cold.stop().await?;

    let warm = Bench::start(WAITING, 0).await?;
    let (clone_ms, twenty_clones_ms) = all_forks(&warm, table).await?;
    let wake_ms = sleeps(&warm, "memory", table).await?;
    table.row("command for a hibernated sandbox → output, p50", wake_ms, "ms", Target::Most(200.0));
    restores(&warm, table).await?;
    warm.stop().await?;

    let paused = Bench::start(0, 3600).await?;
    let woken = sleeps(&paused, "paused", table).await?;
    table.row("command for a paused sandbox → output, p50", woken, "ms", Target::None);
    paused.stop().await?;
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    let per_100_mib_ms = (changed - at_rest) / CHANGED_MIB as f64 * 100.0;
    Ok(Ours { clone_ms, twenty_clones_ms, checkpoint_ms: at_rest, per_100_mib_ms, wake_ms })
}

/// A mesh with a sandbox at rest.
struct Bench {
    mesh: Mesh,
    rest: Rest,
    sandbox: Sandbox,
    waiting: usize,
}

impl Bench {
    /// With so many clones of the sandbox's kind that wait, and hibernated sandboxes paused for so many seconds.
    async fn start(waiting: usize, paused_for: u32) -> anyhow::Result<Self> {
        let paused_for = paused_for.to_string();
        let options = ["--pool-size", "0", "--paused-for", &paused_for];
        let pool = format!("base:1:{MEMORY_MB}={waiting}");
        let mesh = Mesh::start_in(None, &options, &[("OC_POOL", &pool)])?;
        let rest = mesh.rest();
        let sandbox = rested(&rest, MEMORY_MB).await?;
        Ok(Self { mesh, rest, sandbox, waiting })
    }

    /// Waits until what the last run has set off is over.
    async fn settle(&self) -> anyhow::Result<()> {
        eventually("a full pool", async || {
            let ready =
                self.rest.get("/api/nodes").await?.json()[0]["poolReady"].as_u64().unwrap_or_default();
            ensure!(ready == self.waiting as u64, "{ready} clones wait");
            Ok(())
        })
        .await?;
        sleep(REST).await;
        Ok(())
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.sandbox.delete().await?;
        self.mesh.stop()
    }
}

async fn checkpoints(bench: &Bench, table: &mut Table) -> anyhow::Result<f64> {
    let taken = checkpoints_of(&bench.rest, &bench.sandbox, 0, RUNS).await?;
    table.row("checkpoint at rest: REST call answered, p50", taken.call_ms, "ms", Target::None);
    table.row("checkpoint at rest: pause, p50", taken.pause_ms, "ms", Target::Most(30.0));
    table.row("checkpoint at rest: freeze and thaw beside it, p50", taken.freeze_ms, "ms", Target::None);
    Ok(taken.call_ms)
}

async fn checkpoints_of_changed(bench: &Bench, table: &mut Table) -> anyhow::Result<f64> {
    let sandbox = rested(&bench.rest, MEMORY_MB).await?;
    let taken = checkpoints_of(&bench.rest, &sandbox, CHANGED_MIB, FEWER_RUNS).await?;
    sandbox.delete().await?;
    let what = |what: &str| format!("checkpoint with {CHANGED_MIB} MiB changed: {what}, p50");
    table.row(&what("REST call answered"), taken.call_ms, "ms", Target::None);
    let target = Target::MostTimes(1.2, table.floor.fork.pause_changed_ms);
    table.row(&what("pause"), taken.pause_ms, "ms", target);
    Ok(taken.call_ms)
}

/// Milliseconds until 1 and until 20 children have answered.
async fn all_forks(bench: &Bench, table: &mut Table) -> anyhow::Result<(f64, f64)> {
    let one = forks(bench, 1, RUNS).await?;
    let what = "live fork × 1 until the child has answered a command, p50";
    table.row(what, one.answered_ms, "ms", Target::Most(200.0));
    table.row("live fork × 1: pause of the parent, p50", one.pause_ms, "ms", Target::None);
    let what = "memory of a live fork that has answered a command (Pss)";
    table.row(what, one.memory_mib, "MiB", Target::Most(40.0));
    let ten = forks(bench, 10, FEWER_RUNS).await?;
    let what = "live fork × 10 until all have answered a command, p50";
    table.row(what, ten.answered_ms, "ms", Target::Most(1000.0));
    // What a process shares with others counts the less, the more of them there are.
    table.row("memory of each of ten live forks (Pss)", ten.memory_mib, "MiB", Target::None);
    let twenty = forks(bench, 20, FEWER_RUNS).await?;
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

async fn forks(bench: &Bench, count: usize, runs: usize) -> anyhow::Result<Forks> {
    let (mut answers, mut pauses, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        bench.settle().await?;
        let forked = fork(&bench.rest, &bench.sandbox, count).await?;
        for child in forked.children() {
            let vmm = processes::vmm_of(bench.mesh.state(), &child.id).context("a child has no microVM")?;
            memory.extend(processes::memory_kib(vmm.pid, "smaps_rollup", "Pss").map(mib));
        }
        answers.push(forked.answered_ms);
        pauses.push(forked.pause_ms);
        forked.delete().await?;
    }
    Ok(Forks { answered_ms: median(&answers), pause_ms: median(&pauses), memory_mib: median(&memory) })
}

/// Hibernates and wakes; milliseconds until the first output after it, where it went on from `from`.
async fn sleeps(bench: &Bench, from: &str, table: &mut Table) -> anyhow::Result<f64> {
    let is_paused = from == "paused";
    let (mut hibernated, mut woken) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        bench.settle().await?;
        hibernated.push(hibernate(&bench.rest, &bench.sandbox).await?);
        let left = processes::vmm_of(bench.mesh.state(), &bench.sandbox.id);
        ensure!(left.is_some() == is_paused, "of a hibernated sandbox there is {left:?}");
        // One that is paused is captured meanwhile.
        sleep(REST).await;
        woken.push(wake(&bench.sandbox, from).await?);
    }
    let hibernated = median(&hibernated);
    match (is_paused, bench.waiting) {
        (true, _) => {
            table.row("hibernate at rest until it is answered, paused, p50", hibernated, "ms", Target::None);
        }
        (false, 0) => {
            let what = "hibernate at rest until its process is gone, p50";
            table.row(what, hibernated, "ms", Target::Most(250.0));
        }
        // As without clones.
        (false, _) => {}
    }
    Ok(median(&woken))
}

async fn restores(bench: &Bench, table: &mut Table) -> anyhow::Result<()> {
    let Bench { rest, sandbox, .. } = bench;
    let (id, _) = checkpoint(rest, sandbox, "to go back to").await?;
    let path = sandbox.path(&format!("/checkpoints/{id}/restore"));
    let (mut restored, mut outputs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        bench.settle().await?;
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

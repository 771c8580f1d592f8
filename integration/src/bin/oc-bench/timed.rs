//! What is done to a sandbox and timed: checkpoints, hibernation, changes of its memory.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::future::try_join_all;
use oc_integration::rest::{Rest, Sandbox};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    memory::mib,
    table::{median, ms_since},
};

/// After the first command and before anything is measured.
const FIRST_REST: Duration = Duration::from_secs(5);
/// Before each run: what the one before has set off is over.
pub const REST: Duration = Duration::from_millis(1500);

/// A sandbox that has answered a command, and done nothing for a while since.
pub async fn rested(rest: &Rest, memory_mb: u64) -> anyhow::Result<Sandbox> {
    let sandbox = rest.create(json!({ "memoryMB": memory_mb, "timeout": 0 })).await?;
    sandbox.run("true").await?;
    sleep(FIRST_REST).await;
    Ok(sandbox)
}

/// What a checkpoint took.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Until the call was answered.
    pub call_ms: f64,
    /// While the guest stood still.
    pub pause_ms: f64,
    /// While the guest froze its disk, and thawed it.
    pub freeze_ms: f64,
    /// Memory that the sandbox had changed.
    pub changed_mib: f64,
}

/// Takes a full checkpoint; its ID, and what it took.
pub async fn checkpoint(rest: &Rest, sandbox: &Sandbox, name: &str) -> anyhow::Result<(String, Taken)> {
    let path = sandbox.path("/checkpoints");
    let begun = Instant::now();
    let answer = rest.post(&path, json!({ "name": name, "kind": "full" })).await?;
    let call_ms = ms_since(begun);
    let facts = answer.expect(201)?.json();
    let changed = facts["memoryChangedBytes"].as_u64().context("no memoryChangedBytes")?;
    let taken = Taken {
        call_ms,
        pause_ms: us(&facts, "pauseUs")?,
        freeze_ms: us(&facts, "freezeUs")?,
        changed_mib: mib(changed >> 10),
    };
    Ok((facts["id"].as_str().context("no id")?.to_owned(), taken))
}

/// Deletes a checkpoint.
pub async fn delete(rest: &Rest, checkpoint: &str) -> anyhow::Result<()> {
    rest.delete(&format!("/api/checkpoints/{checkpoint}")).await?.expect(204).map(drop)
}

/// Takes checkpoints of a sandbox that has changed so much of its memory anew before each and then rested; keeps none.
/// Medians.
pub async fn checkpoints_of(
    rest: &Rest,
    sandbox: &Sandbox,
    changed_mib: u64,
    runs: usize,
) -> anyhow::Result<Taken> {
    let mut all = Vec::new();
    for number in 0..runs {
        change_memory(sandbox, "changed", changed_mib).await?;
        sleep(REST).await;
        let (id, taken) = checkpoint(rest, sandbox, &format!("run {number}")).await?;
        #[allow(clippy::cast_precision_loss, reason = "a small number")]
        let at_least = changed_mib as f64;
        ensure!(taken.changed_mib >= at_least, "{taken:?} where {changed_mib} MiB are changed");
        all.push(taken);
        delete(rest, &id).await?;
    }
    let middle = |figure: fn(&Taken) -> f64| median(&all.iter().map(figure).collect::<Vec<_>>());
    Ok(Taken {
        call_ms: middle(|taken| taken.call_ms),
        pause_ms: middle(|taken| taken.pause_ms),
        freeze_ms: middle(|taken| taken.freeze_ms),
        changed_mib: middle(|taken| taken.changed_mib),
    })
}

/// Fills a file in the guest's memory with random bytes. One that is there is filled anew, in its place.
pub async fn change_memory(sandbox: &Sandbox, file: &str, mib: u64) -> anyhow::Result<()> {
    if mib == 0 {
        return Ok(());
    }
    let script = format!(
        "import os\nfile = os.open('/dev/shm/{file}', os.O_WRONLY | os.O_CREAT)\nfor _ in range({mib}): \
         assert os.write(file, os.urandom(1 << 20)) == 1 << 20"
    );
    let ran = sandbox.run_with(json!({ "cmd": "python3", "args": ["-c", script], "timeout": 300 })).await?;
    ensure!(ran.code == 0, "changing {mib} MiB: {}{}", ran.stdout, ran.stderr);
    Ok(())
}

/// Children of a sandbox.
#[derive(Debug)]
pub struct Forked {
    children: Vec<Sandbox>,
    /// Until all of them had answered a command.
    pub answered_ms: f64,
    /// While their parent stood still.
    pub pause_ms: f64,
}

/// Forks a sandbox live, and has each child run a command.
pub async fn fork(rest: &Rest, sandbox: &Sandbox, count: usize) -> anyhow::Result<Forked> {
    let path = sandbox.path("/fork");
    let begun = Instant::now();
    let answer = rest.post(&path, json!({ "count": count, "mode": "live" })).await?;
    let facts = answer.expect(201)?.json();
    let ids = facts["sandboxes"].as_array().context("no sandboxes")?.iter();
    let children: Vec<_> = ids.filter_map(|one| Some(rest.sandbox(one["sandboxID"].as_str()?))).collect();
    ensure!(children.len() == count, "{} children instead of {count}", children.len());
    try_join_all(children.iter().map(answered)).await?;
    Ok(Forked { children, answered_ms: ms_since(begun), pause_ms: us(&facts, "pauseUs")? })
}

impl Forked {
    /// The children.
    pub fn children(&self) -> &[Sandbox] {
        &self.children
    }

    /// Deletes all of them.
    pub async fn delete(self) -> anyhow::Result<()> {
        try_join_all(self.children.iter().map(Sandbox::delete)).await.map(drop)
    }
}

/// Milliseconds until a sandbox is hibernated.
pub async fn hibernate(rest: &Rest, sandbox: &Sandbox) -> anyhow::Result<f64> {
    let begun = Instant::now();
    rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    Ok(ms_since(begun))
}

/// Milliseconds until a hibernated sandbox has answered a command, which goes on from where `path` says.
pub async fn wake(sandbox: &Sandbox, path: &str) -> anyhow::Result<f64> {
    let begun = Instant::now();
    answered(sandbox).await?;
    let took = ms_since(begun);
    let facts = sandbox.get().await?.expect(200)?.json();
    ensure!(facts["startPath"] == path, "it went on from {}", facts["startPath"]);
    Ok(took)
}

/// Waits until a command's output is there.
pub async fn answered(sandbox: &Sandbox) -> anyhow::Result<()> {
    ensure!(sandbox.run("echo hello").await? == "hello\n");
    Ok(())
}

/// A figure of an answer in microseconds, as milliseconds.
fn us(facts: &Value, name: &str) -> anyhow::Result<f64> {
    let us = facts[name].as_f64().with_context(|| format!("no {name} in {facts}"))?;
    Ok(us / 1000.0)
}

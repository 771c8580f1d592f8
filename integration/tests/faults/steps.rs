//! Whoever dies, at each named step of each operation: every sandbox is as before or as after, and no checkpoint that was
//! answered is lost.
//!
//! The tables say which steps an operation has and what happens there. That a step is in none of them is an error.

mod bed;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use oc_integration::mesh::eventually;
use oc_mesh::fail::Point;
use oc_scheduler::fail as scheduler;
use oc_vmm_agent::fail as agent;
use serde_json::{Value, json};

use self::bed::{
    Bed,
    Fault::{self, Agent, Error, Scheduler, Vmm},
    Found, Subject, pool_is_ready, row,
};

/// Steps, and what happens at each of them.
type Table = [(Point, &'static [Fault])];

const CHECKPOINT: &Table = &[
    (agent::CAPTURE_QUIESCED, &[Agent, Vmm]),
    (agent::CAPTURE_DRAFTED, &[Agent, Vmm, Error]),
    (agent::CAPTURE_PAUSED, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_DEVICES, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_PAGES, &[Agent, Vmm, Error]),
    (agent::CAPTURE_RESUMED, &[Agent, Vmm, Error]),
    (agent::CAPTURE_THAWED, &[Agent, Vmm]),
    (agent::SNAPSHOT_FILLED, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_MANIFEST, &[Agent, Error]),
    (agent::SNAPSHOT_RENAMED, &[Agent]),
    (agent::CAPTURE_KEPT, &[Agent, Vmm]),
    (scheduler::TAKE_RECORDED, &[Scheduler]),
    (scheduler::TAKE_CAPTURED, &[Scheduler]),
    (scheduler::TAKE_WRITTEN, &[Scheduler]),
    (scheduler::TAKE_FOLLOWED, &[Scheduler]),
    // Last: no agent starts afterwards, and would clean up.
    (agent::SNAPSHOT_RENAMED, &[Error]),
];

const STORE: &Table = &[
    (agent::HIBERNATE_QUIESCED, &[Agent, Vmm, Error]),
    (agent::HIBERNATE_HALTED, &[Agent, Vmm, Error]),
    (agent::HIBERNATE_DRAFTED, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_DEVICES, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_PAGES, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_FILLED, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_MANIFEST, &[Agent, Error]),
    (agent::SNAPSHOT_RENAMED, &[Agent, Error]),
    (agent::HIBERNATE_STORED, &[Agent, Vmm, Error]),
    (agent::HIBERNATE_JOURNALLED, &[Agent, Vmm]),
    (agent::HIBERNATE_RELEASED, &[Agent, Error]),
    (scheduler::HIBERNATE_MARKED, &[Scheduler]),
    (scheduler::HIBERNATE_STORED, &[Scheduler]),
    (scheduler::HIBERNATE_WRITTEN, &[Scheduler]),
];

const WAKE: &Table = &[
    (agent::HIBERNATE_RELEASED, &[Agent, Error]),
    (agent::START_PLUGGED, &[Agent, Error]),
    (agent::START_LAUNCHED, &[Agent, Vmm, Error]),
    (agent::START_PAGED, &[Agent, Vmm, Error]),
    (agent::START_LOADED, &[Agent, Vmm, Error]),
    (agent::WAKE_JOURNALLED, &[Agent, Vmm]),
    (agent::WAKE_RESUMED, &[Agent, Vmm]),
    (agent::WAKE_ANSWERED, &[Agent]),
    (agent::WAKE_FORGOTTEN, &[Agent]),
    (scheduler::WAKE_MARKED, &[Scheduler]),
    (scheduler::WAKE_WOKEN, &[Scheduler]),
    (scheduler::WAKE_WRITTEN, &[Scheduler]),
];

/// Of a sandbox that goes on in a clone of the pool. A VMM that dies is that of the clone.
const WAKE_GRAFTED: &Table = &[
    (agent::WAKE_GRAFTED, &[Agent, Vmm, Error]),
    (agent::WAKE_CLAIMED, &[Agent]),
    (agent::WAKE_REPLACED, &[Agent]),
    (agent::WAKE_RESUMED, &[Agent, Vmm]),
    (agent::WAKE_ANSWERED, &[Agent]),
];

const PAUSE: &Table = &[
    (agent::HIBERNATE_HALTED, &[Agent, Vmm, Error]),
    (agent::HIBERNATE_PAUSED, &[Agent, Vmm]),
    (agent::HIBERNATE_DRAFTED, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_PAGES, &[Agent, Vmm, Error]),
    (agent::SNAPSHOT_RENAMED, &[Agent, Error]),
    (agent::HIBERNATE_STORED, &[Agent, Vmm, Error]),
    (agent::HIBERNATE_JOURNALLED, &[Agent, Vmm]),
    (agent::HIBERNATE_RELEASED, &[Agent]),
];

const WAKE_PAUSED: &Table = &[
    (agent::WAKE_JOURNALLED, &[Agent, Vmm]),
    (agent::WAKE_RESUMED, &[Agent, Vmm]),
    (agent::WAKE_ANSWERED, &[Agent]),
];

const FORK: &Table = &[
    (agent::CAPTURE_PAUSED, &[Agent]),
    (agent::SNAPSHOT_RENAMED, &[Agent]),
    (agent::CREATE_HOME, &[Agent, Error]),
    (agent::CREATE_LAYER, &[Agent, Error]),
    (agent::START_PLUGGED, &[Agent, Error]),
    (agent::START_LAUNCHED, &[Agent, Vmm, Error]),
    (agent::START_PAGED, &[Agent, Vmm]),
    (agent::START_LOADED, &[Agent, Vmm, Error]),
    (agent::CREATE_RESUMED, &[Agent, Vmm, Error]),
    (agent::CREATE_ACTIVATED, &[Agent, Error]),
    (agent::CREATE_JOURNALLED, &[Agent]),
    (scheduler::CREATE_RECORDED, &[Scheduler]),
    (scheduler::FORK_CAPTURED, &[Scheduler]),
    (scheduler::CREATE_MADE, &[Scheduler]),
    (scheduler::CREATE_WRITTEN, &[Scheduler]),
    (scheduler::FORK_MADE, &[Scheduler]),
    (scheduler::FORK_REMOVED, &[Scheduler]),
];

const GRAFT: &Table = &[(agent::CREATE_GRAFTED, &[Agent, Vmm, Error])];

const RESTORE: &Table = &[
    (agent::CREATE_HOME, &[Agent]),
    (agent::CREATE_LAYER, &[Agent, Error]),
    (agent::START_LAUNCHED, &[Agent, Vmm]),
    (agent::START_LOADED, &[Agent, Vmm]),
    (agent::CREATE_RESUMED, &[Agent, Vmm, Error]),
    (agent::CREATE_ACTIVATED, &[Agent, Error]),
    (agent::CREATE_JOURNALLED, &[Agent]),
    (agent::CREATE_REPLACED, &[Agent]),
    (scheduler::RESTORE_MARKED, &[Scheduler]),
    (scheduler::RESTORE_MADE, &[Scheduler]),
    (scheduler::RESTORE_WRITTEN, &[Scheduler]),
];

const DELETE: &Table = &[
    (agent::DELETE_UNLISTED, &[Agent, Error]),
    (agent::DELETE_HIDDEN, &[Agent, Error]),
    (agent::DELETE_REMOVED, &[Agent]),
    (scheduler::DELETE_MARKED, &[Scheduler]),
    (scheduler::DELETE_REMOVED, &[Scheduler]),
    (scheduler::DELETE_HANDED_OVER, &[Scheduler]),
    (scheduler::DELETE_FORGOTTEN, &[Scheduler]),
];

fn each(table: &'static Table) -> impl Iterator<Item = (Point, Fault)> {
    table.iter().flat_map(|&(point, faults)| faults.iter().map(move |&fault| (point, fault)))
}

fn id_of(taken: &Value) -> anyhow::Result<String> {
    taken["id"].as_str().map(str::to_owned).with_context(|| format!("no ID: {taken}"))
}

/// Takes a checkpoint at each step.
async fn checkpoints(bed: &mut Bed) -> anyhow::Result<()> {
    let rest = bed.rest();
    // Of checkpoints by name: the state, of which sandbox, and how it was taken.
    let mut unheard: BTreeMap<String, (u32, Subject, (Point, Fault))> = BTreeMap::new();
    for step in each(CHECKPOINT) {
        let (subject, mark) = bed.begin().await?;
        let (path, name) = (subject.sandbox.path("/checkpoints"), format!("state {mark}"));
        let asked = json!({ "name": name });
        let answer = bed.strike(step, async || rest.post(&path, asked.clone()).await).await?;
        let found = bed.find().await?;
        ensure!(found == Found::Whole(mark) || (found, step.1) == (Found::Lost, Vmm), "{step:?}: {found:?}");
        match answer {
            Some(taken) => {
                let id = id_of(&taken)?;
                bed.is_good(&subject, &id, mark).await?;
                rest.delete(&format!("/api/checkpoints/{id}")).await?.expect(204)?;
                row("checkpoint", step.0, step.1.name(), &format!("after (answered); {found:?}"));
            }
            None => drop(unheard.insert(name, (mark, subject, step))),
        }
    }
    // Nobody was told of them: they are there as a whole, or not at all.
    let left = bed.checkpoints().await?;
    for (name, (mark, subject, step)) in unheard {
        let taken = left.iter().find(|(_, checkpoint)| checkpoint["name"] == name.as_str());
        if let Some((id, _)) = taken {
            bed.is_good(&subject, id, mark).await?;
        }
        row("checkpoint", step.0, step.1.name(), if taken.is_some() { "after" } else { "before" });
    }
    Ok(())
}

/// Puts a sandbox to sleep, and wakes it, at each step. `hibernate` and `wake` are the steps.
async fn sleeps(bed: &mut Bed, hibernate: &'static Table, wake: &'static Table) -> anyhow::Result<()> {
    let rest = bed.rest();
    for step in each(hibernate) {
        let (subject, mark) = bed.begin().await?;
        let (path, before) = (subject.sandbox.path("/hibernate"), bed.vmms());
        let answer = bed.strike(step, async || rest.post(&path, json!({})).await).await?;
        let found = bed.find().await?;
        let is_fine = match step.1 {
            Vmm => [Found::Whole(mark), Found::Disk(mark), Found::Lost].contains(&found),
            _ => found == Found::Whole(mark),
        };
        ensure!(is_fine, "{step:?}: {found:?}");
        ensure!(answer.is_none() || found != Found::Lost, "{step:?}: it was told that it is hibernated");
        row("hibernate", step.0, step.1.name(), &bed.told(found, &before));
    }
    for step in each(wake) {
        let (subject, mark) = bed.begin().await?;
        let (path, pool) = (|what: &str| subject.sandbox.path(what), bed.pool);
        let sleeps = async || {
            rest.post(&path("/hibernate"), json!({})).await?.expect(200)?;
            pool_is_ready(&rest, pool).await
        };
        eventually("it sleeps", sleeps).await?;
        let before = bed.vmms();
        let wakes = async || {
            // Awake, and the step was not passed: no clone waited yet when it woke.
            if subject.sandbox.get().await?.expect(200)?.json()["status"] == "running" {
                sleeps().await?;
            }
            rest.post(&path("/wake"), json!({})).await
        };
        bed.strike(step, wakes).await?;
        let found = bed.find().await?;
        // A VMM that dies once its guest may have gone on leaves the disk.
        let is_fine = found == Found::Whole(mark) || (found, step.1) == (Found::Disk(mark), Vmm);
        ensure!(is_fine, "{step:?}: {found:?}");
        row("wake", step.0, step.1.name(), &bed.told(found, &before));
    }
    Ok(())
}

/// Forks a sandbox at each step.
async fn forks(bed: &mut Bed, table: &'static Table) -> anyhow::Result<()> {
    let rest = bed.rest();
    for step in each(table) {
        let (subject, mark) = bed.begin().await?;
        pool_is_ready(&rest, bed.pool).await?;
        let path = subject.sandbox.path("/fork");
        let asked = json!({ "count": 1, "mode": "live" });
        let answer = bed.strike(step, async || rest.post(&path, asked.clone()).await).await?;
        ensure!(bed.find().await? == Found::Whole(mark), "{step:?}: it is not what it was forked from");
        let mut outcome = "before, or after without an answer";
        for fork in answer.iter().flat_map(|made| made["sandboxes"].as_array().into_iter().flatten()) {
            let fork = rest.sandbox(fork["sandboxID"].as_str().unwrap_or_default());
            ensure!(subject.look(&fork).await? == Found::Whole(mark), "{step:?}: a fork that was answered");
            eventually("it is deleted", async || fork.delete().await).await?;
            outcome = "after (answered)";
        }
        row("fork", step.0, step.1.name(), outcome);
    }
    Ok(())
}

/// Goes back to a checkpoint, and deletes one, at each step.
async fn goes_back(bed: &mut Bed) -> anyhow::Result<()> {
    let rest = bed.rest();
    let mut base: Option<(String, String, u32)> = None;
    for step in each(RESTORE) {
        let (subject, mark) = bed.begin().await?;
        let of_it = base.take().filter(|(of, ..)| *of == subject.sandbox.id);
        let (of, id, before) = match of_it {
            Some(base) => base,
            None => {
                let path = subject.sandbox.path("/checkpoints");
                let taken = rest.post(&path, json!({ "name": "base" })).await?.expect(201)?.json();
                (subject.sandbox.id.clone(), id_of(&taken)?, mark)
            }
        };
        // Elsewhere than there.
        let (subject, mark) = if before == mark { bed.begin().await? } else { (subject, mark) };
        let path = subject.sandbox.path(&format!("/checkpoints/{id}/restore"));
        let answer = bed.strike(step, async || rest.post(&path, json!({})).await).await?;
        let found = bed.find().await?;
        ensure!([Found::Whole(mark), Found::Whole(before)].contains(&found), "{step:?}: {found:?}");
        ensure!(answer.is_none() || found == Found::Whole(before), "{step:?}: it was told that it is back");
        let when = if found == Found::Whole(before) { "after" } else { "before" };
        row("restore", step.0, step.1.name(), &format!("{when}; {found:?}"));
        base = Some((of, id, before));
    }
    for step in each(DELETE) {
        let (subject, mark) = bed.begin().await?;
        let path = subject.sandbox.path("/checkpoints");
        let asked = json!({ "name": format!("state {mark}") });
        let taken = eventually("a checkpoint", async || {
            Ok(rest.post(&path, asked.clone()).await?.expect(201)?.json())
        })
        .await?;
        let id = id_of(&taken)?;
        let path = format!("/api/checkpoints/{id}");
        let answer = bed.strike(step, async || rest.delete(&path).await).await?;
        let status = eventually("it is there, or not", async || {
            let status = rest.get(&path).await?.status;
            ensure!([200, 404].contains(&status), "{status}");
            Ok(status)
        })
        .await?;
        ensure!(answer.is_none() || status == 404, "{step:?}: it was told that it is deleted");
        if status == 200 {
            bed.is_good(&subject, &id, mark).await?;
        }
        row("delete", step.0, step.1.name(), if status == 404 { "after" } else { "before" });
    }
    Ok(())
}

pub async fn a_sandbox_is_as_before_or_as_after_at_every_step(_: Arc<()>) -> anyhow::Result<()> {
    let tables = [CHECKPOINT, STORE, WAKE, WAKE_GRAFTED, PAUSE, WAKE_PAUSED, FORK, GRAFT, RESTORE, DELETE];
    let tried: BTreeSet<Point> = tables.into_iter().flatten().map(|(point, _)| *point).collect();
    let all: BTreeSet<Point> = agent::ALL.iter().chain(scheduler::ALL).copied().collect();
    assert_eq!(tried, all, "every step is in a table");
    // Side by side: most of the time is spent waiting for services that were killed.
    let at_once = ["--paused-for", "0"];
    tokio::try_join!(
        Bed::with(0, &[], async |bed| checkpoints(bed).await),
        Bed::with(0, &at_once, async |bed| sleeps(bed, STORE, WAKE).await),
        Bed::with(1, &at_once, async |bed| sleeps(bed, &[], WAKE_GRAFTED).await),
        Bed::with(0, &["--paused-for", "1"], async |bed| sleeps(bed, PAUSE, WAKE_PAUSED).await),
        Bed::with(0, &[], async |bed| forks(bed, FORK).await),
        Bed::with(1, &[], async |bed| forks(bed, GRAFT).await),
        Bed::with(0, &[], async |bed| goes_back(bed).await),
    )?;
    Ok(())
}

pub async fn a_checkpoint_that_is_deleted_while_a_fork_reads_it_is_whole_or_not_found(
    _: Arc<()>,
) -> anyhow::Result<()> {
    Bed::with(0, &[], async |bed| deletes_while_read(bed).await).await
}

async fn deletes_while_read(bed: &mut Bed) -> anyhow::Result<()> {
    let rest = bed.rest();
    for point in [
        scheduler::CREATE_RECORDED,
        agent::CREATE_HOME,
        agent::CREATE_LAYER,
        agent::START_LAUNCHED,
        agent::START_PAGED,
    ] {
        let (subject, mark) = bed.begin().await?;
        let path = subject.sandbox.path("/checkpoints");
        let taken = rest.post(&path, json!({ "name": "read" })).await?.expect(201)?.json();
        let path = format!("/api/checkpoints/{}", id_of(&taken)?);
        let held = bed.hold(point)?;
        let asked = {
            let (rest, path) = (rest.clone(), format!("{path}/fork"));
            tokio::spawn(async move { rest.post(&path, json!({ "mode": "live" })).await })
        };
        held.reached().await?;
        rest.delete(&path).await?.expect(204)?;
        drop(held);
        let answer = asked.await??;
        let outcome = if answer.status == 201 {
            let made = answer.json();
            let fork = rest.sandbox(made["sandboxes"][0]["sandboxID"].as_str().unwrap_or_default());
            assert_eq!(subject.look(&fork).await?, Found::Whole(mark), "{}", point.name());
            fork.delete().await?;
            "the fork works"
        } else {
            assert_eq!(answer.refusal(), (404, "CHECKPOINT_NOT_FOUND".into()), "{}", point.name());
            "not found"
        };
        row("delete", point, "pause", outcome);
        assert_eq!(rest.get(&path).await?.refusal(), (404, "CHECKPOINT_NOT_FOUND".into()));
    }
    Ok(())
}

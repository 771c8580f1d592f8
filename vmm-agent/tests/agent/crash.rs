//! The agent dies at every step that it takes; the next one over the same host finishes or undoes what it finds.

use std::{path::Path, sync::Arc};

use oc_vmm_agent::vm::{decide::Phase, handle::VmError};
use tokio::runtime::Runtime;

use crate::world::{Agent, DEADLINE, World, eventually, id, order, owner};

/// What callers were told.
#[derive(Clone, Debug, Default)]
struct Told {
    created: Vec<String>,
    deleted: Vec<String>,
}

/// A busy agent: some creates, a replacement, deletes, a pool. Returns what callers were told until it died.
async fn busy(world: &Arc<World>, dir: &Path, told: &parking_lot::Mutex<Told>) {
    let agent = Agent::start(world, dir, 2).await;
    agent.pool_holds(2).await;
    for name in ["sb-a", "sb-b", "sb-c"] {
        if agent.host.create(owner(name, 1), order()).await.is_ok() {
            told.lock().created.push(name.into());
        }
    }
    if agent.host.delete(&id("sb-a"), owner("sb-a", 2).epoch, None).await.is_ok() {
        told.lock().deleted.push("sb-a".into());
    }
    let _ = agent.host.create(owner("sb-b", 2), order()).await;
}

/// Starts a second agent and holds what it shows against what callers were told by the first.
async fn check(world: &Arc<World>, dir: &Path, told: &Told, step: usize) {
    let agent = Agent::start(world, dir, 0).await;
    let settled =
        || agent.host.list(std::time::SystemTime::now()).iter().all(|vm| vm.phase == Phase::Running);
    eventually("every sandbox is adopted", settled).await;

    let listed: std::collections::BTreeSet<_> =
        agent.host.list(std::time::SystemTime::now()).iter().map(|vm| vm.owner.sandbox.to_string()).collect();
    assert_eq!(listed, world.sandboxes(), "step {step}: what is listed runs, and what runs is listed");
    assert_eq!(world.vms.lock().len(), listed.len(), "step {step}: no home is left over");
    let journal = std::fs::read_dir(dir.join("journal")).unwrap().count();
    assert_eq!(journal, listed.len(), "step {step}: no record is left over");
    for name in &told.created {
        let gone_or_replaced = told.deleted.contains(name) || name == "sb-a" || name == "sb-b";
        assert!(gone_or_replaced || listed.contains(name), "step {step}: {name} was announced and is lost");
    }
    for name in &told.deleted {
        assert!(!listed.contains(name), "step {step}: {name} came back");
        let late = agent.host.create(owner(name, 1), order()).await;
        assert!(matches!(late, Err(VmError::Denied(_))), "step {step}: a delayed create brought {name} back");
    }
    for (name, epoch) in [("sb-a", 3), ("sb-b", 3), ("sb-c", 1)] {
        agent.host.create(owner(name, epoch), order()).await.unwrap();
    }
    assert_eq!(world.sandboxes().len(), 3, "step {step}: it works on");
    for vm in agent.host.list(std::time::SystemTime::now()) {
        agent.host.delete(&vm.owner.sandbox, vm.owner.epoch, None).await.unwrap();
    }
    agent.stop().await;
    assert!(world.vms.lock().is_empty(), "step {step}: all of it can be deleted");
}

#[test]
fn a_death_at_any_step_is_finished_or_undone() {
    let mut finished = false;
    for step in 0..400 {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let told = Arc::new(parking_lot::Mutex::new(Told::default()));

        // The first agent lives in a runtime of its own, which takes every task of it along when it is dropped.
        let first = Runtime::new().unwrap();
        world.crash_after(step);
        finished = first.block_on(async {
            let crashed = world.crashed.notified();
            tokio::select! {
                () = busy(&world, dir.path(), &told) => true,
                () = crashed => false,
                () = tokio::time::sleep(DEADLINE) => panic!("step {step}: neither dead nor done"),
            }
        });
        // With all that it is still about.
        drop(first);
        world.never_crash();

        let told = told.lock().clone();
        Runtime::new().unwrap().block_on(check(&world, dir.path(), &told, step));
        if finished {
            break;
        }
    }
    assert!(finished, "the steps of a whole life were covered");
}

#[test]
fn a_graceful_end_keeps_sandboxes_and_empties_the_pool() {
    Runtime::new().unwrap().block_on(async {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let agent = Agent::start(&world, dir.path(), 3).await;
        agent.pool_holds(3).await;
        agent.host.create(owner("sb-1", 1), order()).await.unwrap();
        agent.stop().await;
        assert_eq!(world.vms.lock().len(), 1);

        let agent = Agent::start(&world, dir.path(), 0).await;
        let vm = agent.host.find(&id("sb-1")).unwrap();
        eventually("it is adopted", || vm.status().phase == Phase::Running).await;
        assert!(vm.open_call().is_ok());
    });
}

#[test]
fn vms_that_died_meanwhile_have_failed_and_those_of_another_boot_are_gone() {
    Runtime::new().unwrap().block_on(async {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let agent = Agent::start(&world, dir.path(), 0).await;
        agent.host.create(owner("sb-1", 1), order()).await.unwrap();
        agent.stop().await;
        world.vm_of("sb-1").exit.cancel();

        let agent = Agent::start(&world, dir.path(), 0).await;
        let vm = agent.host.find(&id("sb-1")).unwrap();
        eventually("it has failed", || vm.status().phase == Phase::Failed).await;
        assert!(vm.status().failure.unwrap().contains("ended while no agent ran"));
        agent.stop().await;

        let agent = Agent::start_on("another boot", &world, dir.path(), 0).await;
        assert!(agent.host.find(&id("sb-1")).is_none());
        assert!(world.vms.lock().is_empty());
        // The scheduler may place it here again.
        agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    });
}

//! States of sandboxes are taken down, gone back to and branched from, and the agent dies at every step of that.

use std::sync::{Arc, atomic::Ordering};

use oc_vmm_agent::{
    backend::{Captured, Wanted},
    journal::StartPath,
    vm::{
        decide::{Denied, Phase},
        handle::VmError,
        start::{Order, Source, StartError},
    },
};
use tokio::runtime::Runtime;

use crate::world::{Agent, World, id, order, owner};

const NAME: &str = "sb-1";

fn wanted(snapshot_id: &str) -> Wanted {
    Wanted { snapshot_id: snapshot_id.into(), disk_only: false, is_ephemeral: false }
}

async fn capture(agent: &Agent, snapshot_id: &str) -> Result<Captured, VmError> {
    agent.host.capture(&id(NAME), owner(NAME, 1).epoch, wanted(snapshot_id)).await.map(Option::unwrap)
}

fn from(snapshot_id: &str, disk_only: bool) -> Order {
    Order { source: Some(Source { snapshot_id: snapshot_id.into(), disk_only, wakes: false }), ..order() }
}

async fn running(world: &Arc<World>, dir: &std::path::Path) -> Agent {
    let agent = Agent::start(world, dir, 0).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    agent
}

#[tokio::test]
async fn a_sandbox_that_is_captured_goes_on_and_others_begin_there() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = running(&world, dir.path()).await;
    let taken = capture(&agent, "cp-1").await.unwrap();
    assert_eq!(capture(&agent, "cp-1").await.unwrap(), taken, "a repeated call is answered as the first one");
    assert!(agent.host.find(&id(NAME)).unwrap().open_call().is_ok());
    assert!(!world.vm_of(NAME).paused.load(Ordering::SeqCst));
    for (number, (disk_only, path)) in
        [(false, StartPath::Restored), (true, StartPath::RestoredDisk)].into_iter().enumerate()
    {
        let name = format!("sb-fork-{number}");
        assert_eq!(agent.host.create(owner(&name, 1), from("cp-1", disk_only)).await.unwrap(), path);
        assert!(world.sandboxes().contains(&name), "it is told who it is");
    }
    agent.host.delete_snapshot("cp-1").await.unwrap();
    agent.host.delete_snapshot("cp-1").await.unwrap();
    let gone = agent.host.create(owner("sb-late", 1), from("cp-1", false)).await;
    assert!(matches!(gone, Err(VmError::Start(StartError::NoSnapshot(_)))), "{gone:?}");
    assert_eq!(world.sandboxes().len(), 3, "and nothing is left of it");
}

#[tokio::test]
async fn a_clone_that_waits_takes_a_snapshot_on_and_a_new_vm_does_where_it_cannot() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 2).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    capture(&agent, "cp-1").await.unwrap();
    agent.pool_holds(2).await;
    for (fork, fails, grafts) in [("sb-warm", 0, 1), ("sb-new", 1, 1), ("sb-late", 0, 2)] {
        world.failing_grafts.store(fails, Ordering::SeqCst);
        let path = agent.host.create(owner(fork, 1), from("cp-1", false)).await.unwrap();
        assert_eq!(path, StartPath::Restored, "{fork}");
        assert_eq!(world.grafts.load(Ordering::SeqCst), grafts, "{fork}");
        assert!(world.sandboxes().contains(fork), "it is told who it is");
        agent.pool_holds(2).await;
    }
    agent.host.create(owner("sb-boots", 1), from("cp-1", true)).await.unwrap();
    assert_eq!(world.grafts.load(Ordering::SeqCst), 2, "a disk alone is booted");
    agent.stop().await;
    assert_eq!(world.vms.lock().len(), 5, "nothing is left of the clone that failed");
}

#[tokio::test]
async fn a_snapshot_that_is_not_here_is_fetched_before_anything_is_made_or_ended() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = running(&world, dir.path()).await;
    let taken = capture(&agent, "cp-1").await.unwrap();
    world.snapshots.lock().clear();
    world.store.lock().extend([("cp-1".to_owned(), Some(taken)), ("cp-2".to_owned(), None)]);
    let vm = world.vm_of(NAME);
    for (snapshot_id, number) in [("cp-none", 2), ("cp-2", 3)] {
        let refused = agent.host.create(owner(NAME, number), from(snapshot_id, false)).await;
        match refused {
            Err(VmError::Start(StartError::NoSnapshot(_))) => assert_eq!(snapshot_id, "cp-none"),
            Err(VmError::Start(StartError::Unusable(_))) => assert_eq!(snapshot_id, "cp-2"),
            other => panic!("{other:?}"),
        }
        assert!(!vm.exit.is_cancelled() && agent.host.find(&id(NAME)).unwrap().open_call().is_ok());
    }
    let made = agent.host.create(owner("sb-fork", 1), from("cp-1", false)).await;
    assert_eq!(made.unwrap(), StartPath::Restored);
    assert_eq!(agent.host.create(owner(NAME, 4), from("cp-1", false)).await.unwrap(), StartPath::Restored);
    assert!(vm.exit.is_cancelled());
    // One that runs of it already needs it no more.
    world.snapshots.lock().clear();
    world.store.lock().clear();
    assert_eq!(agent.host.create(owner(NAME, 4), from("cp-1", false)).await.unwrap(), StartPath::Restored);
}

#[tokio::test]
async fn what_cannot_be_captured_runs_on() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = running(&world, dir.path()).await;
    world.failing_captures.store(1, Ordering::SeqCst);
    assert!(matches!(capture(&agent, "cp-1").await, Err(VmError::NotCaptured(_))));
    assert!(agent.host.snapshots().is_empty());
    assert!(agent.host.find(&id(NAME)).unwrap().open_call().is_ok());
    let stale = agent.host.capture(&id(NAME), owner(NAME, 0).epoch, wanted("cp-1")).await;
    assert!(matches!(stale, Err(VmError::Denied(Denied::StaleEpoch { .. }))));
    agent.host.hibernate(&id(NAME), owner(NAME, 1).epoch, None).await.unwrap();
    assert!(matches!(capture(&agent, "cp-1").await, Err(VmError::Denied(Denied::NotReady))));
    assert!(agent.host.capture(&id("sb-2"), owner(NAME, 1).epoch, wanted("cp-1")).await.unwrap().is_none());
}

#[tokio::test]
async fn a_restore_replaces_the_sandbox_or_leaves_it_as_it_is() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = running(&world, dir.path()).await;
    capture(&agent, "cp-1").await.unwrap();
    let before = world.vm_of(NAME);
    for attempt in [from("cp-none", false), from("cp-1", false)] {
        world.damaged_snapshots.store(1, Ordering::SeqCst);
        let refused = agent.host.create(owner(NAME, 2), attempt).await;
        assert!(
            matches!(refused, Err(VmError::Start(StartError::NoSnapshot(_) | StartError::Unusable(_)))),
            "{refused:?}"
        );
        let vm = agent.host.find(&id(NAME)).unwrap();
        assert_eq!((vm.owner().epoch, vm.status().phase), (owner(NAME, 1).epoch, Phase::Running));
        assert!(vm.open_call().is_ok() && !before.exit.is_cancelled());
        assert_eq!(world.vms.lock().len(), 1);
    }
    world.damaged_snapshots.store(0, Ordering::SeqCst);
    assert_eq!(agent.host.create(owner(NAME, 3), from("cp-1", false)).await.unwrap(), StartPath::Restored);
    assert!(before.exit.is_cancelled());
    assert_eq!(world.vms.lock().len(), 1);
    let vm = agent.host.find(&id(NAME)).unwrap();
    assert_eq!(vm.owner().epoch, owner(NAME, 3).epoch);
    // One that is hibernated, too.
    agent.host.hibernate(&id(NAME), owner(NAME, 3).epoch, None).await.unwrap();
    let refused = agent.host.create(owner(NAME, 4), from("cp-none", false)).await;
    assert!(refused.is_err());
    assert_eq!(agent.host.find(&id(NAME)).unwrap().status().phase, Phase::Hibernated);
    agent.host.create(owner(NAME, 5), from("cp-1", false)).await.unwrap();
    assert_eq!(world.sandboxes().len(), 1);
    assert_eq!(world.vms.lock().len(), 1);
}

#[tokio::test]
async fn a_sandbox_that_is_deleted_while_it_is_restored_is_gone() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = running(&world, dir.path()).await;
    capture(&agent, "cp-1").await.unwrap();
    let restored = agent.host.create(owner(NAME, 2), from("cp-1", false));
    let name = id(NAME);
    let deleted = agent.host.delete(&name, owner(NAME, 3).epoch, None);
    let (restored, deleted) = tokio::join!(restored, deleted);
    deleted.unwrap();
    assert!(restored.is_ok() || matches!(restored, Err(VmError::Denied(Denied::Deleted))), "{restored:?}");
    assert!(agent.host.find(&id(NAME)).is_none());
    assert!(world.vms.lock().is_empty());
}

/// Whatever the instant, the next agent finds the sandbox running, from before the restore or from after it.
#[test]
fn an_agent_that_dies_while_it_restores_leaves_one_of_the_two() {
    let mut outcomes = std::collections::BTreeSet::new();
    for steps in 0.. {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let first = Runtime::new().unwrap();
        let finished = first.block_on(async {
            let agent = running(&world, dir.path()).await;
            capture(&agent, "cp-1").await.unwrap();
            world.crash_after(steps);
            tokio::select! {
                restored = agent.host.create(owner(NAME, 2), from("cp-1", false)) => { restored.unwrap(); true }
                () = world.crashed.notified() => false,
            }
        });
        // All of the agent's tasks end with it, wherever they are.
        drop(first);
        world.never_crash();
        Runtime::new().unwrap().block_on(async {
            let agent = Agent::start(&world, dir.path(), 0).await;
            let vm = agent.host.find(&id(NAME)).unwrap_or_else(|| panic!("step {steps}: it is gone"));
            vm.join(vm.owner().epoch).await.unwrap();
            assert!(vm.open_call().is_ok(), "step {steps}");
            assert!(!finished || vm.owner().epoch == owner(NAME, 2).epoch, "step {steps}: it was told");
            outcomes.insert(vm.owner().epoch.0);
            assert_eq!(world.vms.lock().len(), 1, "step {steps}: two homes");
            assert_eq!(world.sandboxes().len(), 1, "step {steps}");
            agent.stop().await;
        });
        if finished {
            break;
        }
    }
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [1, 2]);
}

/// Whatever the instant, the sandbox runs on afterwards, and a capture that was answered is there.
#[test]
fn an_agent_that_dies_while_it_captures_leaves_the_sandbox_running() {
    for steps in 0.. {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let first = Runtime::new().unwrap();
        let finished = first.block_on(async {
            let agent = running(&world, dir.path()).await;
            world.crash_after(steps);
            tokio::select! {
                captured = capture(&agent, "cp-1") => { captured.unwrap(); true }
                () = world.crashed.notified() => false,
            }
        });
        drop(first);
        world.never_crash();
        Runtime::new().unwrap().block_on(async {
            let agent = Agent::start(&world, dir.path(), 0).await;
            let vm = agent.host.find(&id(NAME)).unwrap();
            vm.join(owner(NAME, 1).epoch).await.unwrap();
            assert!(vm.open_call().is_ok(), "step {steps}");
            assert!(!world.vm_of(NAME).paused.load(Ordering::SeqCst), "step {steps}: it stands still");
            assert!(!finished || agent.host.snapshots().len() == 1, "step {steps}: what was told is lost");
            capture(&agent, "cp-1").await.unwrap();
            agent.stop().await;
        });
        if finished {
            break;
        }
    }
}

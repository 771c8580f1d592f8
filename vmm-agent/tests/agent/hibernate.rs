//! Sandboxes are stored and woken, and the agent dies at every step of that. Nothing is paused first here: that is in
//! `paused.rs`.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use oc_vmm_agent::{
    journal::StartPath,
    vm::{
        decide::{Denied, Phase},
        handle::VmError,
        start::StartError,
        tier::Tier,
    },
};
use tokio::runtime::Runtime;

use crate::world::{Agent, DEADLINE, World, eventually, id, order, owner};

const NAME: &str = "sb-1";

async fn hibernate(agent: &Agent) -> Result<u64, VmError> {
    let hibernated = agent.host.hibernate(&id(NAME), owner(NAME, 1).epoch, None).await?.unwrap();
    assert_eq!(hibernated.tier, Tier::Stored);
    Ok(hibernated.stored_bytes)
}

async fn wake(agent: &Agent) -> Result<StartPath, VmError> {
    agent.host.wake(&id(NAME), owner(NAME, 1).epoch, &order()).await.map(Option::unwrap)
}

fn phase(agent: &Agent) -> Phase {
    agent.host.find(&id(NAME)).unwrap().status().phase
}

#[tokio::test]
async fn a_stored_sandbox_has_no_process_and_comes_back_as_it_was() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    for _ in 0..3 {
        assert_eq!(hibernate(&agent).await.unwrap(), 4096);
        assert_eq!(hibernate(&agent).await.unwrap(), 4096, "it is already");
        assert!(world.sandboxes().is_empty());
        let vm = agent.host.find(&id(NAME)).unwrap();
        assert!(matches!(vm.open_call(), Err(VmError::Hibernated)));
        // However many ask, it is restored once.
        let made = world.made.load(Ordering::SeqCst);
        for woken in join_all((0..20).map(|_| wake(&agent))).await {
            assert_eq!(woken.unwrap(), StartPath::Memory);
        }
        assert_eq!(world.made.load(Ordering::SeqCst), made + 1);
        assert!(world.sandboxes().contains(NAME));
        assert!(vm.open_call().is_ok());
    }
    let told = world.activations.lock().iter().filter(|(_, told)| told.sandbox_id == NAME).count();
    assert_eq!(told, 1, "it is told once who it is");
    // A create that was late on its way finds it made.
    assert_eq!(agent.host.create(owner(NAME, 1), order()).await.unwrap(), StartPath::Memory);
}

#[tokio::test]
async fn epochs_and_use_are_respected() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner(NAME, 2), order()).await.unwrap();
    let sandbox = id(NAME);
    let at = |epoch| agent.host.hibernate(&sandbox, owner(NAME, epoch).epoch, None);
    assert!(matches!(at(1).await, Err(VmError::Denied(Denied::StaleEpoch { .. }))));
    assert!(matches!(at(3).await, Err(VmError::Denied(Denied::Overtaken { .. }))));
    assert_eq!(agent.host.hibernate(&id("sb-2"), owner(NAME, 1).epoch, None).await.unwrap(), None);

    let vm = agent.host.find(&id(NAME)).unwrap();
    let call = vm.open_call().unwrap();
    let idle = agent.host.hibernate(&id(NAME), owner(NAME, 2).epoch, Some(SystemTime::now())).await;
    assert!(matches!(idle, Err(VmError::Denied(Denied::Active))));
    assert!(vm.open_call().is_ok(), "it was spared");
    drop(call);
    let since = SystemTime::now() + Duration::from_secs(1);
    agent.host.hibernate(&id(NAME), owner(NAME, 2).epoch, Some(since)).await.unwrap().unwrap();
    assert_eq!(phase(&agent), Phase::Hibernated);
}

#[tokio::test]
async fn what_cannot_be_stored_runs_on() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    world.failing_stores.store(1, Ordering::SeqCst);
    assert!(matches!(hibernate(&agent).await, Err(VmError::NotStored(_))));
    assert_eq!(phase(&agent), Phase::Running);
    assert!(agent.host.find(&id(NAME)).unwrap().open_call().is_ok());
    assert!(!world.vm_of(NAME).paused.load(Ordering::SeqCst));
    hibernate(&agent).await.unwrap();
    assert_eq!(wake(&agent).await.unwrap(), StartPath::Memory);
}

#[tokio::test]
async fn a_clone_that_waits_takes_a_stored_sandbox_on() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 1).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    for (fails, grafts) in [(0, 1), (1, 1), (0, 2)] {
        hibernate(&agent).await.unwrap();
        agent.pool_holds(1).await;
        world.failing_grafts.store(fails, Ordering::SeqCst);
        assert_eq!(wake(&agent).await.unwrap(), StartPath::Memory);
        assert_eq!(world.grafts.load(Ordering::SeqCst), grafts);
        assert!(world.sandboxes().contains(NAME));
        agent.pool_holds(1).await;
        eventually("what it was before is gone", || world.vms.lock().len() == 2).await;
    }
    // One whose memory is damaged boots from the disk, as without a clone.
    hibernate(&agent).await.unwrap();
    world.damaged_memories.store(1, Ordering::SeqCst);
    assert_eq!(wake(&agent).await.unwrap(), StartPath::Disk);
    agent.stop().await;
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.find(&id(NAME)).unwrap().join(owner(NAME, 1).epoch).await.unwrap();
    assert_eq!(world.vms.lock().len(), 1);
}

#[tokio::test]
async fn damaged_memory_leads_to_a_boot_from_the_disk() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    hibernate(&agent).await.unwrap();
    world.damaged_memories.store(1, Ordering::SeqCst);
    world.failing_boots.store(1, Ordering::SeqCst);
    // It stays hibernated, and may be tried again.
    assert!(matches!(wake(&agent).await, Err(VmError::Start(StartError::Failed(_)))));
    assert_eq!(phase(&agent), Phase::Hibernated);
    assert_eq!(wake(&agent).await.unwrap(), StartPath::Disk);
    assert!(world.sandboxes().contains(NAME));
    let told = world.activations.lock().iter().filter(|(_, told)| told.sandbox_id == NAME).count();
    assert_eq!(told, 2, "it is told again who it is");
}

#[tokio::test]
async fn a_hibernated_sandbox_is_deleted_with_all_that_is_stored() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    hibernate(&agent).await.unwrap();
    agent.host.delete(&id(NAME), owner(NAME, 2).epoch, None).await.unwrap();
    assert!(world.vms.lock().is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_is_stored_survives_the_machine() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    agent.host.create(owner("sb-2", 1), order()).await.unwrap();
    hibernate(&agent).await.unwrap();
    agent.stop().await;
    let agent = Agent::start_on("another boot", &world, dir.path(), 0).await;
    assert!(agent.host.find(&id("sb-2")).is_none());
    eventually("it is there", || phase(&agent) == Phase::Hibernated).await;
    let listed = agent.host.list(SystemTime::now());
    assert_eq!((listed.len(), listed[0].stored_bytes), (1, 4096));
    assert_eq!(wake(&agent).await.unwrap(), StartPath::Memory);
}

/// What the caller was told last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    Runs,
    IsStored,
}

/// A whole life: stored and woken, stored and booted. Notes what the caller was told until the agent died.
async fn live(world: &Arc<World>, dir: &Path, pool: usize, told: &parking_lot::Mutex<Told>) {
    let agent = Agent::start(world, dir, pool).await;
    let tell = |now: Told| *told.lock() = now;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    tell(Told::Runs);
    for is_damaged in [0, 1] {
        tell(Told::Nothing);
        hibernate(&agent).await.unwrap();
        tell(Told::IsStored);
        tokio::task::yield_now().await;
        world.damaged_memories.store(is_damaged, Ordering::SeqCst);
        agent.pool_holds(pool).await;
        tell(Told::Nothing);
        wake(&agent).await.unwrap();
        tell(Told::Runs);
    }
}

async fn check(world: &Arc<World>, dir: &Path, told: Told, step: usize) {
    let agent = Agent::start(world, dir, 0).await;
    let Some(vm) = agent.host.find(&id(NAME)) else {
        assert_eq!(told, Told::Nothing, "step {step}: it was announced and is lost");
        assert!(world.vms.lock().is_empty(), "step {step}");
        return agent.stop().await;
    };
    eventually("it is settled", || matches!(vm.status().phase, Phase::Running | Phase::Hibernated)).await;
    let is_stored = vm.status().phase == Phase::Hibernated;
    match told {
        Told::Nothing => {}
        Told::Runs => assert!(!is_stored, "step {step}: it runs"),
        Told::IsStored => assert!(is_stored, "step {step}: it is stored"),
    }
    assert_eq!(world.sandboxes().contains(NAME), !is_stored, "step {step}: a process only where it runs");
    assert_eq!(world.vms.lock().len(), 1, "step {step}: no home is left over");
    // The memory that it wakes with is always of its disk: the world looks at that.
    wake(&agent).await.unwrap();
    hibernate(&agent).await.unwrap();
    assert_eq!(wake(&agent).await.unwrap(), StartPath::Memory, "step {step}");
    agent.host.delete(&id(NAME), owner(NAME, 1).epoch, None).await.unwrap();
    agent.stop().await;
    assert!(world.vms.lock().is_empty(), "step {step}: all of it can be deleted");
}

#[test]
fn a_death_at_any_step_leaves_it_running_or_stored() {
    die_at_every_step(0);
}

#[test]
fn a_death_at_any_step_leaves_it_running_or_stored_where_clones_take_it_on() {
    die_at_every_step(1);
}

fn die_at_every_step(pool: usize) {
    let mut finished = false;
    for step in 0..600 {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let told = parking_lot::Mutex::new(Told::Nothing);
        let first = Runtime::new().unwrap();
        world.crash_after(step);
        finished = first.block_on(async {
            let crashed = world.crashed.notified();
            tokio::select! {
                () = live(&world, dir.path(), pool, &told) => true,
                () = crashed => false,
                () = tokio::time::sleep(DEADLINE) => panic!("step {step}: neither dead nor done"),
            }
        });
        // With all that it is still about.
        drop(first);
        world.never_crash();
        world.damaged_memories.store(0, Ordering::SeqCst);
        let told = *told.lock();
        Runtime::new().unwrap().block_on(check(&world, dir.path(), told, step));
        if finished {
            break;
        }
    }
    assert!(finished, "the steps of a whole life were covered");
}

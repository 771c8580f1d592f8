//! Sandboxes that hibernate are paused first and captured meanwhile; they are woken, deleted, crowded out and lost amid
//! that, and the agent and the machine die at every step of it.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use oc_vmm_agent::{
    capacity::{Full, Limits},
    journal::StartPath,
    vm::{
        decide::Phase,
        handle::{Hibernated, VmError},
        start::StartError,
        tier::Tier,
    },
};
use tokio::runtime::Runtime;

use crate::world::{Agent, DEADLINE, LIMITS, World, eventually, id, order, owner};

const NAME: &str = "sb-1";
/// Nothing that a test waits for.
const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(20);

async fn start(world: &Arc<World>, dir: &Path, paused_for: Duration) -> Agent {
    Agent::start_with("boot", world, dir, 0, (LIMITS, paused_for)).await
}

async fn hibernate(agent: &Agent, sandbox: &str) -> Result<Hibernated, VmError> {
    let epoch = owner(sandbox, 1).epoch;
    agent.host.hibernate(&id(sandbox), epoch, None).await.map(Option::unwrap)
}

async fn wake(agent: &Agent, sandbox: &str) -> Result<StartPath, VmError> {
    agent.host.wake(&id(sandbox), owner(sandbox, 1).epoch, &order()).await.map(Option::unwrap)
}

/// An agent with a sandbox that is paused.
async fn paused(world: &Arc<World>, dir: &Path, paused_for: Duration) -> Agent {
    let agent = start(world, dir, paused_for).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    assert_eq!(hibernate(&agent, NAME).await.unwrap().tier, Tier::Paused);
    agent
}

fn stored_bytes(agent: &Agent, sandbox: &str) -> u64 {
    agent.host.find(&id(sandbox)).unwrap().status().stored_bytes
}

async fn captured(agent: &Agent, sandbox: &str) {
    eventually("it is captured", || stored_bytes(agent, sandbox) > 0).await;
}

fn sleeps(agent: &Agent, sandbox: &str) -> bool {
    agent.host.find(&id(sandbox)).unwrap().status().phase == Phase::Hibernated
}

fn is_paused(agent: &Agent, sandbox: &str) -> bool {
    agent.host.find(&id(sandbox)).unwrap().candidate().is_some()
}

#[tokio::test]
async fn a_paused_sandbox_keeps_its_process_and_goes_on_with_it() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = start(&world, dir.path(), LONG).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    let made = world.made.load(Ordering::SeqCst);
    for _ in 0..3 {
        let hibernated = hibernate(&agent, NAME).await.unwrap();
        assert_eq!(hibernated, Hibernated { tier: Tier::Paused, stored_bytes: 0 });
        assert!(world.vm_of(NAME).paused.load(Ordering::SeqCst));
        let vm = agent.host.find(&id(NAME)).unwrap();
        assert!(matches!(vm.open_call(), Err(VmError::Hibernated)));
        captured(&agent, NAME).await;
        let again = Hibernated { tier: Tier::Paused, stored_bytes: 4096 };
        assert_eq!(hibernate(&agent, NAME).await.unwrap(), again, "it is already");
        for woken in join_all((0..20).map(|_| wake(&agent, NAME))).await {
            assert_eq!(woken.unwrap(), StartPath::Paused);
        }
        assert!(vm.open_call().is_ok() && !world.vm_of(NAME).paused.load(Ordering::SeqCst));
        eventually("what was stored is removed", || !world.has_stored(NAME)).await;
    }
    assert_eq!(world.made.load(Ordering::SeqCst), made, "it is the same process");
}

#[tokio::test]
async fn a_process_ends_when_its_time_is_over() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = paused(&world, dir.path(), SHORT).await;
    eventually("its process is gone", || world.sandboxes().is_empty() && !is_paused(&agent, NAME)).await;
    assert_eq!(hibernate(&agent, NAME).await.unwrap(), Hibernated { tier: Tier::Stored, stored_bytes: 4096 });
    assert_eq!(wake(&agent, NAME).await.unwrap(), StartPath::Memory);
}

#[tokio::test]
async fn a_guest_that_does_not_stand_still_is_stored_before_the_answer() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = start(&world, dir.path(), LONG).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    world.restless.store(1, Ordering::SeqCst);
    assert_eq!(hibernate(&agent, NAME).await.unwrap(), Hibernated { tier: Tier::Stored, stored_bytes: 4096 });
    assert!(world.sandboxes().is_empty());
}

#[tokio::test]
async fn a_wake_and_a_delete_wait_for_no_capture() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    world.store_waits.store(true, Ordering::SeqCst);
    let agent = paused(&world, dir.path(), LONG).await;
    eventually("it is being captured", || world.stores.load(Ordering::SeqCst) == 1).await;
    assert_eq!(wake(&agent, NAME).await.unwrap(), StartPath::Paused);
    hibernate(&agent, NAME).await.unwrap();
    eventually("it is being captured anew", || world.stores.load(Ordering::SeqCst) == 2).await;
    assert_eq!(stored_bytes(&agent, NAME), 0);
    agent.host.delete(&id(NAME), owner(NAME, 2).epoch, None).await.unwrap();
    assert!(world.vms.lock().is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_cannot_be_captured_stays_paused_and_is_tried_again() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = start(&world, dir.path(), SHORT).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    world.failing_stores.store(1, Ordering::SeqCst);
    hibernate(&agent, NAME).await.unwrap();
    eventually("it has failed", || world.failing_stores.load(Ordering::SeqCst) == 0).await;
    assert!(is_paused(&agent, NAME) && world.sandboxes().contains(NAME), "though its time is over");
    captured(&agent, NAME).await;
    assert_eq!(world.stores.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_vmm_that_dies_while_it_is_paused_leaves_what_is_stored() {
    for (is_captured, path) in [(true, StartPath::Memory), (false, StartPath::Disk)] {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        world.store_waits.store(!is_captured, Ordering::SeqCst);
        let agent = paused(&world, dir.path(), LONG).await;
        if is_captured {
            captured(&agent, NAME).await;
        }
        world.vm_of(NAME).exit.cancel();
        eventually("it is of the second tier", || !is_paused(&agent, NAME)).await;
        let vm = agent.host.find(&id(NAME)).unwrap();
        assert_eq!(vm.status().phase, Phase::Hibernated);
        assert_eq!(stored_bytes(&agent, NAME) > 0, is_captured);
        assert_eq!(wake(&agent, NAME).await.unwrap(), path);
        assert!(world.sandboxes().contains(NAME));
    }
}

#[tokio::test]
async fn a_vmm_that_dies_in_the_moment_of_a_wake_is_no_loss() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = paused(&world, dir.path(), LONG).await;
    captured(&agent, NAME).await;
    // Nobody has heard of it yet.
    world.vm_of(NAME).exit.cancel();
    assert_eq!(wake(&agent, NAME).await.unwrap(), StartPath::Memory);
}

#[tokio::test]
async fn one_that_does_not_answer_when_it_goes_on_is_booted() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = paused(&world, dir.path(), LONG).await;
    captured(&agent, NAME).await;
    world.failing_wakes.store(1, Ordering::SeqCst);
    // What is stored is of another disk by then: the world would see that it is used.
    assert_eq!(wake(&agent, NAME).await.unwrap(), StartPath::Disk);
}

/// Sandboxes that are paused and captured, the first one longest.
async fn several(agent: &Agent, names: &[&str]) {
    for name in names {
        agent.host.create(owner(name, 1), order()).await.unwrap();
    }
    for name in names {
        assert_eq!(hibernate(agent, name).await.unwrap().tier, Tier::Paused);
        captured(agent, name).await;
    }
}

#[tokio::test]
async fn one_that_is_made_crowds_the_oldest_out() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let limits = Limits { max_sandboxes: 3, ..LIMITS };
    let agent = Agent::start_with("boot", &world, dir.path(), 0, (limits, LONG)).await;
    several(&agent, &["sb-1", "sb-2", "sb-3"]).await;
    // They count for nothing when it comes to places.
    agent.host.create(owner("sb-4", 1), order()).await.unwrap();
    eventually("the oldest goes", || !is_paused(&agent, "sb-1")).await;
    assert!(is_paused(&agent, "sb-2") && is_paused(&agent, "sb-3"));
    assert_eq!(wake(&agent, "sb-1").await.unwrap(), StartPath::Memory);
    eventually("and the next", || !is_paused(&agent, "sb-2")).await;
    assert_eq!(wake(&agent, "sb-3").await.unwrap(), StartPath::Paused);
    // Three are awake: no place is left.
    let full = agent.host.create(owner("sb-5", 1), order()).await;
    assert!(matches!(full, Err(VmError::Start(StartError::Full(Full::Sandboxes { max: 3 })))), "{full:?}");
}

#[tokio::test]
async fn a_host_that_is_short_of_memory_keeps_none_paused() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = start(&world, dir.path(), LONG).await;
    several(&agent, &["sb-1", "sb-2"]).await;
    agent.host.create(owner("sb-3", 1), order()).await.unwrap();
    agent.stop().await;
    // No host has as much.
    let limits = Limits { memory_reserve_mb: u64::MAX, ..LIMITS };
    let agent = Agent::start_with("boot", &world, dir.path(), 0, (limits, LONG)).await;
    eventually("they are taken over", || sleeps(&agent, "sb-1") && sleeps(&agent, "sb-2")).await;
    let refused = agent.host.create(owner("sb-4", 1), order()).await;
    assert!(matches!(refused, Err(VmError::Start(StartError::Full(Full::Memory { .. })))), "{refused:?}");
    for name in ["sb-1", "sb-2"] {
        assert!(!is_paused(&agent, name), "{name} has given way to the one that was to be made");
    }
    eventually("the third is taken over", || world.sandboxes().contains("sb-3")).await;
    assert_eq!(hibernate(&agent, "sb-3").await.unwrap().tier, Tier::Stored, "the first tier is skipped");
}

#[tokio::test]
async fn memory_that_runs_short_is_had_from_paused_ones_without_being_asked_for() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = start(&world, dir.path(), LONG).await;
    several(&agent, &["sb-1", "sb-2"]).await;
    agent.stop().await;
    let limits = Limits { memory_reserve_mb: u64::MAX, ..LIMITS };
    let agent = Agent::start_with("boot", &world, dir.path(), 0, (limits, LONG)).await;
    eventually("both give way", || world.sandboxes().is_empty()).await;
    assert!(["sb-1", "sb-2"].into_iter().all(|name| sleeps(&agent, name) && !is_paused(&agent, name)));
}

#[tokio::test]
async fn a_restarted_agent_takes_over_what_is_paused() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    world.store_waits.store(true, Ordering::SeqCst);
    let agent = paused(&world, dir.path(), LONG).await;
    let since = agent.host.find(&id(NAME)).unwrap().status().asleep_since;
    let made = world.made.load(Ordering::SeqCst);
    agent.stop().await;
    assert!(world.vm_of(NAME).paused.load(Ordering::SeqCst), "it outlives its agent as it is");
    world.store_waits.store(false, Ordering::SeqCst);
    let agent = start(&world, dir.path(), LONG).await;
    captured(&agent, NAME).await;
    let status = agent.host.find(&id(NAME)).unwrap().status();
    assert_eq!((status.phase, status.asleep_since), (Phase::Hibernated, since), "it is as old as it was");
    assert!(world.vm_of(NAME).paused.load(Ordering::SeqCst));
    assert_eq!(wake(&agent, NAME).await.unwrap(), StartPath::Paused);
    assert_eq!(world.made.load(Ordering::SeqCst), made);
    hibernate(&agent, NAME).await.unwrap();
    captured(&agent, NAME).await;
    agent.stop().await;
    // One that keeps none paused.
    let agent = start(&world, dir.path(), Duration::ZERO).await;
    eventually("it is of the second tier", || !is_paused(&agent, NAME) && world.sandboxes().is_empty()).await;
    assert_eq!(wake(&agent, NAME).await.unwrap(), StartPath::Memory);
}

#[tokio::test]
async fn what_was_paused_survives_the_machine_by_what_was_stored() {
    for (is_captured, path) in [(true, StartPath::Memory), (false, StartPath::Disk)] {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        world.store_waits.store(!is_captured, Ordering::SeqCst);
        let agent = paused(&world, dir.path(), LONG).await;
        if is_captured {
            captured(&agent, NAME).await;
        }
        agent.stop().await;
        world.power_off();
        let agent = Agent::start_with("another boot", &world, dir.path(), 0, (LIMITS, LONG)).await;
        eventually("it is there", || sleeps(&agent, NAME)).await;
        let listed = agent.host.list(SystemTime::now());
        assert_eq!((listed.len(), listed[0].stored_bytes > 0), (1, is_captured));
        assert_eq!(wake(&agent, NAME).await.unwrap(), path);
    }
}

/// What the caller was told last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    Runs,
    Sleeps,
}

/// A whole life: woken before it was captured, after, and when it is stored alone. Notes what the caller was told until the
/// agent died.
async fn live(world: &Arc<World>, dir: &Path, told: &parking_lot::Mutex<Told>) {
    let tell = |now: Told| *told.lock() = now;
    let agent = start(world, dir, SHORT).await;
    agent.host.create(owner(NAME, 1), order()).await.unwrap();
    for round in 0..4 {
        tell(Told::Nothing);
        hibernate(&agent, NAME).await.unwrap();
        tell(Told::Sleeps);
        match round {
            0 => {}
            1 => captured(&agent, NAME).await,
            _ => eventually("it is stored", || !is_paused(&agent, NAME)).await,
        }
        tell(Told::Nothing);
        wake(&agent, NAME).await.unwrap();
        tell(Told::Runs);
        // Past what is done when it runs.
        eventually("what was stored is removed", || !world.has_stored(NAME)).await;
    }
}

async fn check(world: &Arc<World>, dir: &Path, told: Told, (step, fails_too): (usize, bool)) {
    let boot = if fails_too { "another boot" } else { "boot" };
    let agent = Agent::start_with(boot, world, dir, 0, (LIMITS, LONG)).await;
    let Some(vm) = agent.host.find(&id(NAME)) else {
        assert!(told == Told::Nothing || (fails_too && told == Told::Runs), "step {step}: it is lost");
        assert!(world.vms.lock().is_empty(), "step {step}");
        return agent.stop().await;
    };
    eventually("it is settled", || matches!(vm.status().phase, Phase::Running | Phase::Hibernated)).await;
    let sleeps = vm.status().phase == Phase::Hibernated;
    match told {
        Told::Nothing => {}
        Told::Runs => assert!(!sleeps, "step {step}: it runs"),
        Told::Sleeps => assert!(sleeps, "step {step}: it sleeps"),
    }
    assert_eq!(world.vms.lock().len(), 1, "step {step}: no home is left over");
    // The memory that it wakes with is always of its disk: the world looks at that.
    let path = wake(&agent, NAME).await.unwrap();
    if sleeps && !fails_too {
        assert_ne!(path, StartPath::Disk, "step {step}: its memory is lost");
    }
    assert!(!world.vm_of(NAME).paused.load(Ordering::SeqCst), "step {step}: it runs");
    hibernate(&agent, NAME).await.unwrap();
    assert_eq!(wake(&agent, NAME).await.unwrap(), StartPath::Paused, "step {step}");
    agent.host.delete(&id(NAME), owner(NAME, 1).epoch, None).await.unwrap();
    agent.stop().await;
    assert!(world.vms.lock().is_empty(), "step {step}: all of it can be deleted");
}

/// The agent dies at every step; with `fails_too` the machine fails in that moment.
fn die_at_every_step(fails_too: bool) {
    let mut finished = false;
    for step in 0..400 {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let told = parking_lot::Mutex::new(Told::Nothing);
        let first = Runtime::new().unwrap();
        world.crash_after(step);
        finished = first.block_on(async {
            let crashed = world.crashed.notified();
            tokio::select! {
                () = live(&world, dir.path(), &told) => true,
                () = crashed => false,
                () = tokio::time::sleep(DEADLINE) => panic!("step {step}: neither dead nor done"),
            }
        });
        // With all that it is still about.
        drop(first);
        world.never_crash();
        if fails_too {
            world.power_off();
        }
        let told = *told.lock();
        Runtime::new().unwrap().block_on(check(&world, dir.path(), told, (step, fails_too)));
        if finished {
            break;
        }
    }
    assert!(finished, "the steps of a whole life were covered");
}

#[test]
fn a_death_of_the_agent_at_any_step_loses_nothing() {
    die_at_every_step(false);
}

#[test]
fn a_failure_of_the_machine_at_any_step_loses_no_sandbox_that_sleeps() {
    die_at_every_step(true);
}

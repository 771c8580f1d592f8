//! Creates, deletes and losses, with every way in which they can meet.

use std::{
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use oc_vmm_agent::{
    journal::StartPath,
    vm::{
        decide::{Denied, Phase},
        handle::VmError,
        start::StartError,
    },
};

use crate::world::{Agent, World, eventually, id, order, owner};

#[tokio::test]
async fn a_create_takes_a_waiting_clone_and_tells_it_who_it_is() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 2).await;
    agent.pool_holds(2).await;
    assert_eq!(agent.host.create(owner("sb-1", 1), order()).await.unwrap(), StartPath::Warm);

    let activations = world.activations.lock();
    let (_, last) = activations.iter().rfind(|(_, activation)| activation.sandbox_id == "sb-1").unwrap();
    assert_eq!((last.hostname.as_str(), last.disk_mb), ("sandbox", 20480));
    assert!(last.entropy.len() >= 32 && last.unix_time_ns > 0);
    assert_eq!(last.envs["A"], "b");
    let entropies: Vec<_> = activations.iter().map(|(_, activation)| &activation.entropy).collect();
    assert!((1..entropies.len()).all(|i| !entropies[..i].contains(&entropies[i])), "no two get the same");
}

#[tokio::test]
async fn the_pool_is_refilled_and_an_empty_one_is_no_obstacle() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 1).await;
    agent.pool_holds(1).await;
    let names: Vec<_> = (0..6).map(|n| format!("sb-{n}")).collect();
    let creates = names.iter().map(|name| agent.host.create(owner(name, 1), order()));
    let paths: Vec<_> = join_all(creates).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(paths.iter().filter(|path| **path == StartPath::Warm).count(), 1);
    assert_eq!(world.sandboxes().len(), 6);
    agent.pool_holds(1).await;
}

#[tokio::test]
async fn repeated_creates_join_one_operation() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    let creates = (0..20).map(|_| agent.host.create(owner("sb-1", 1), order()));
    for created in join_all(creates).await {
        assert_eq!(created.unwrap(), StartPath::Clone);
    }
    assert_eq!(agent.host.create(owner("sb-1", 1), order()).await.unwrap(), StartPath::Clone);
    assert_eq!(world.made.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_create_whose_caller_left_completes() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    world.golden_waits.store(true, Ordering::SeqCst);
    let agent = Agent::start(&world, dir.path(), 0).await;
    let left = tokio::time::timeout(Duration::from_millis(20), agent.host.create(owner("sb-1", 1), order()));
    assert!(left.await.is_err());
    world.golden_waits.store(false, Ordering::SeqCst);
    world.released.notify_waiters();
    eventually("it runs", || world.sandboxes().contains("sb-1")).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    assert_eq!(world.made.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_delete_gives_up_a_start_in_progress_and_is_remembered() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    world.golden_waits.store(true, Ordering::SeqCst);
    let agent = Agent::start(&world, dir.path(), 0).await;
    let host = agent.host.clone();
    let create = tokio::spawn(async move { host.create(owner("sb-1", 1), order()).await });
    eventually("it starts", || agent.host.find(&id("sb-1")).is_some()).await;
    agent.host.delete(&id("sb-1"), owner("sb-1", 2).epoch, None).await.unwrap();
    assert!(matches!(create.await.unwrap(), Err(VmError::Denied(Denied::Deleted))));
    assert!(world.vms.lock().is_empty());
    for epoch in [1, 2] {
        let late = agent.host.create(owner("sb-1", epoch), order()).await;
        assert!(matches!(late, Err(VmError::Denied(Denied::StaleEpoch { .. }))), "{late:?}");
    }
    world.golden_waits.store(false, Ordering::SeqCst);
    agent.host.create(owner("sb-1", 3), order()).await.unwrap();
}

#[tokio::test]
async fn creates_and_deletes_of_one_sandbox_end_in_one_of_both_worlds() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 2).await;
    for epoch in 1..40 {
        let create = agent.host.create(owner("sb-1", epoch), order());
        let sandbox = id("sb-1");
        let delete = async {
            for _ in 0..epoch % 7 {
                tokio::task::yield_now().await;
            }
            agent.host.delete(&sandbox, owner("sb-1", epoch).epoch, None).await
        };
        let (created, deleted) = tokio::join!(create, delete);
        deleted.unwrap();
        if let Err(error) = &created {
            assert!(matches!(error, VmError::Denied(_)), "{error}");
        }
        assert!(agent.host.find(&id("sb-1")).is_none());
        assert!(world.sandboxes().is_empty());
    }
    agent.pool_holds(2).await;
    agent.stop().await;
    assert!(world.vms.lock().is_empty());
}

#[tokio::test]
async fn a_later_epoch_replaces_and_an_earlier_one_is_refused() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 2), order()).await.unwrap();
    let first = world.vm_of("sb-1");
    let stale = agent.host.create(owner("sb-1", 1), order()).await;
    assert!(matches!(stale, Err(VmError::Denied(Denied::StaleEpoch { .. }))));
    let stale = agent.host.delete(&id("sb-1"), owner("sb-1", 1).epoch, None).await;
    assert!(matches!(stale, Err(VmError::Denied(Denied::StaleEpoch { .. }))));

    agent.host.create(owner("sb-1", 3), order()).await.unwrap();
    assert!(first.exit.is_cancelled());
    assert_eq!(world.vms.lock().len(), 1);
    assert_eq!(agent.host.find(&id("sb-1")).unwrap().owner().epoch, owner("sb-1", 3).epoch);
}

#[tokio::test]
async fn a_torn_snapshot_is_tried_again_and_then_the_template_is_booted() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    world.failing_restores.store(1, Ordering::SeqCst);
    assert_eq!(agent.host.create(owner("sb-1", 1), order()).await.unwrap(), StartPath::Clone);
    world.failing_restores.store(2, Ordering::SeqCst);
    assert_eq!(agent.host.create(owner("sb-2", 1), order()).await.unwrap(), StartPath::Cold);
    world.failing_goldens.store(true, Ordering::SeqCst);
    assert_eq!(agent.host.create(owner("sb-3", 1), order()).await.unwrap(), StartPath::Cold);
    assert_eq!(world.vms.lock().len(), 3, "nothing is left of the failed attempts");
}

#[tokio::test]
async fn a_failed_start_leaves_nothing_and_may_be_repeated() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    world.failing_goldens.store(true, Ordering::SeqCst);
    world.failing_boots.store(1, Ordering::SeqCst);
    let failed = agent.host.create(owner("sb-1", 1), order()).await;
    assert!(matches!(failed, Err(VmError::Start(StartError::Failed(_)))), "{failed:?}");
    assert!(world.vms.lock().is_empty());
    assert_eq!(agent.host.create(owner("sb-1", 1), order()).await.unwrap(), StartPath::Cold);
}

#[tokio::test]
async fn an_unknown_template_and_a_full_host_are_named() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    let mut unknown = order();
    unknown.kind.template = "nonesuch".into();
    let refused = agent.host.create(owner("sb-1", 1), unknown).await;
    assert!(matches!(refused, Err(VmError::Start(StartError::NoTemplate(_)))));
    for n in 0..100 {
        agent.host.create(owner(&format!("sb-{n}"), 1), order()).await.unwrap();
    }
    let refused = agent.host.create(owner("sb-100", 1), order()).await;
    assert!(matches!(refused, Err(VmError::Start(StartError::Full(_)))));
    agent.host.create(owner("sb-7", 2), order()).await.unwrap();
}

#[tokio::test]
async fn a_vm_whose_process_dies_has_failed_and_stays_until_it_is_deleted() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    agent.host.create(owner("sb-2", 1), order()).await.unwrap();
    world.vm_of("sb-1").exit.cancel();
    let vm = agent.host.find(&id("sb-1")).unwrap();
    eventually("it has failed", || vm.status().phase == Phase::Failed).await;
    assert!(matches!(vm.open_call(), Err(VmError::Lost(_))));
    assert!(matches!(
        agent.host.create(owner("sb-1", 1), order()).await,
        Err(VmError::Denied(Denied::Failed))
    ));
    assert!(agent.host.find(&id("sb-2")).unwrap().open_call().is_ok(), "nothing else is disturbed");
    agent.stop().await;

    let agent = Agent::start(&world, dir.path(), 0).await;
    let vm = agent.host.find(&id("sb-1")).unwrap();
    eventually("it is still shown as failed", || vm.status().phase == Phase::Failed).await;
    assert!(vm.status().failure.unwrap().contains("VMM process"));
    agent.host.delete(&id("sb-1"), owner("sb-1", 1).epoch, None).await.unwrap();
    assert_eq!(world.vms.lock().len(), 1);
}

#[tokio::test]
async fn a_sandbox_in_use_is_not_deleted_for_being_idle() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    let vm = agent.host.find(&id("sb-1")).unwrap();
    let epoch = owner("sb-1", 1).epoch;
    let (guest, call) = vm.open_call().unwrap();
    let spared = agent.host.delete(&id("sb-1"), epoch, Some(SystemTime::now())).await;
    assert!(matches!(spared, Err(VmError::Denied(Denied::Active))));
    let began = SystemTime::now();
    drop((guest, call));
    let spared = agent.host.delete(&id("sb-1"), epoch, Some(began)).await;
    assert!(matches!(spared, Err(VmError::Denied(Denied::Active))));
    agent.host.delete(&id("sb-1"), epoch, Some(SystemTime::now())).await.unwrap();
    assert!(vm.open_call().is_err());
}

#[tokio::test]
async fn a_clone_that_dies_in_the_pool_is_replaced() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 2).await;
    agent.pool_holds(2).await;
    let victim = world.vms.lock().values().find_map(|vm| vm.process.clone()).unwrap();
    victim.exit.cancel();
    eventually("a third was made", || world.made.load(Ordering::SeqCst) == 3).await;
    agent.pool_holds(2).await;
    assert_eq!(world.vms.lock().len(), 2);
}

#[tokio::test]
async fn a_clone_that_is_dead_on_taking_is_no_obstacle() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 1).await;
    agent.pool_holds(1).await;
    let victim = world.vms.lock().values().find_map(|vm| vm.process.clone()).unwrap();
    victim.exit.cancel();
    let path = agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    assert_eq!(path, StartPath::Clone);
    assert_eq!(world.sandboxes().len(), 1);
}

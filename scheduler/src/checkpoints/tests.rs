//! Checkpoints and forks with a real store and a host that fails as it is told.

use oc_mesh::error::Reason;
use oc_proto::{
    mesh::{SandboxTransition, SnapshotSource, StartPath},
    v1::{CheckpointKind, CheckpointState, RetentionMode, RetentionPolicy, SandboxState},
};

use super::{shown, take::Order};
use crate::{
    checkpoints::tests::{
        host::Mood,
        mesh::{Mesh, TENANT, order, until, wanted},
    },
    refusal::Refusal,
};

mod elsewhere;
mod hibernated;
mod host;
mod mesh;

fn reason<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Reason {
    result.unwrap_err().reason()
}

#[tokio::test]
async fn checkpoints_are_taken_listed_and_deleted_and_outlive_their_sandbox() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let first = shown(&mesh.take(&sandbox, "first").await.unwrap());
    assert_eq!((first.state(), first.size_bytes, first.pause_us), (CheckpointState::Ready, 4096, 1500));
    assert_eq!((first.parent_id.as_str(), first.memory_mb), ("", 1024));
    assert_eq!(mesh.look(&sandbox).await.checkpoint_id, first.checkpoint_id);
    let second = mesh.take(&sandbox, "second").await.unwrap();
    assert_eq!(shown(&second).parent_id, first.checkpoint_id);
    assert_eq!(mesh.names().await, ["first", "second"]);
    assert_eq!(mesh.checkpoints.verify(TENANT, &first.checkpoint_id).await.unwrap(), (4096, 0));

    let (id, checkpoints) = (&first.checkpoint_id, &mesh.checkpoints);
    assert_eq!(reason(checkpoints.get("others", id, "").await), Reason::CheckpointNotFound);
    assert_eq!(reason(checkpoints.delete("others", id, "").await), Reason::CheckpointNotFound);
    let of_another = checkpoints.get(TENANT, id, "sb-00000000000000000000").await;
    assert_eq!(reason(of_another), Reason::CheckpointNotFound);
    assert!(checkpoints.list("others", "").await.is_empty());

    checkpoints.delete(TENANT, id, &sandbox).await.unwrap();
    assert_eq!(reason(checkpoints.get(TENANT, id, "").await), Reason::CheckpointNotFound);
    assert_eq!(reason(checkpoints.delete(TENANT, id, "").await), Reason::CheckpointNotFound);
    assert!(!mesh.host.with(|state| state.snapshots.contains_key(id)));
    // Its child is its parent's, and so is not the child of what is gone.
    let second = checkpoints.get(TENANT, &shown(&second).checkpoint_id, "").await.unwrap();
    assert_eq!(checkpoints.present(&second).await.unwrap().parent_id, "");

    mesh.sandboxes.delete(TENANT, &sandbox).await.unwrap();
    assert_eq!(mesh.names().await, ["second"]);
    mesh.reconcile().await;
    assert_eq!(
        checkpoints.fork(TENANT, &shown(&second).checkpoint_id, wanted(1, false)).await.unwrap().len(),
        1
    );
}

#[tokio::test]
async fn names_are_unique_and_the_eleventh_is_refused_unless_the_oldest_goes() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    for number in 0..10 {
        mesh.take(&sandbox, &format!("n{number}")).await.unwrap();
    }
    assert_eq!(reason(mesh.take(&sandbox, "n3").await), Reason::CheckpointExists);
    assert_eq!(reason(mesh.take(&sandbox, "n10").await), Reason::TooManyCheckpoints);
    let disk = order("disk", CheckpointKind::DiskOnly);
    mesh.take_as(&sandbox, disk).await.unwrap();
    let policy = RetentionPolicy { mode: RetentionMode::DeleteOldest.into(), max_count: 3 };
    let keep = Order::parse("n10".into(), CheckpointKind::Full.into(), Some(policy)).unwrap();
    mesh.take_as(&sandbox, keep).await.unwrap();
    assert_eq!(mesh.names().await, ["n8", "n9", "disk", "n10"]);
    assert_eq!(mesh.host.with(|state| state.snapshots.len()), 4);
    // The same name may be had again in another sandbox, and in this one once it is free.
    let other = mesh.sandbox().await.sandbox_id;
    mesh.take(&other, "n10").await.unwrap();
    mesh.take(&sandbox, "n3").await.unwrap();
}

#[tokio::test]
async fn a_checkpoint_that_its_host_does_not_take_leaves_nothing_behind() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    for reason_given in [Reason::CheckpointFailed, Reason::HostDiskFull] {
        mesh.host.with(|state| state.capture = Mood::Refusing(reason_given));
        assert_eq!(reason(mesh.take(&sandbox, "first").await), reason_given);
        assert!(mesh.names().await.is_empty());
    }
    mesh.host.with(|state| state.capture = Mood::Willing);
    mesh.take(&sandbox, "first").await.unwrap();
    assert_eq!(mesh.look(&sandbox).await.state(), SandboxState::Running);
}

#[tokio::test]
async fn a_hibernated_sandbox_wakes_for_a_checkpoint_and_for_a_fork() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    mesh.sandboxes.hibernate(TENANT, &sandbox).await.unwrap();
    mesh.take(&sandbox, "first").await.unwrap();
    assert_eq!(mesh.look(&sandbox).await.state(), SandboxState::Running);
    mesh.sandboxes.hibernate(TENANT, &sandbox).await.unwrap();
    mesh.checkpoints.fork_sandbox(TENANT, &sandbox, wanted(1, false)).await.unwrap();
    assert_eq!(mesh.look(&sandbox).await.state(), SandboxState::Running);
}

#[tokio::test]
async fn a_scheduler_that_dies_leaves_a_checkpoint_that_is_finished_if_it_was_taken_and_removed_if_not() {
    for (mood, left) in [(Mood::Mute, vec!["first"]), (Mood::Hanging, vec![])] {
        let mesh = Mesh::start().await;
        let sandbox = mesh.sandbox().await.sandbox_id;
        mesh.host.with(|state| state.capture = mood);
        let (checkpoints, of) = (mesh.checkpoints.clone(), sandbox.clone());
        let taking =
            tokio::spawn(
                async move { checkpoints.take(TENANT, &of, order("first", CheckpointKind::Full)).await },
            );
        mesh.host.has_gone_silent().await;
        mesh.glance().await;
        let taken = mesh.checkpoints.list(TENANT, "").await;
        assert_eq!(shown(&taken[0]).state(), CheckpointState::Processing, "left to its flow");

        let mesh = mesh.die_and_start_again().await;
        assert!(taking.await.unwrap().is_err());
        mesh.reconcile().await;
        assert_eq!(mesh.names().await, left, "{mood:?}");
        if let Some(taken) = mesh.checkpoints.list(TENANT, "").await.first() {
            assert_eq!((shown(taken).state(), shown(taken).size_bytes), (CheckpointState::Ready, 4096));
            assert_eq!(mesh.look(&sandbox).await.checkpoint_id, shown(taken).checkpoint_id);
        }
        mesh.host.with(|state| state.capture = Mood::Willing);
        assert_eq!(mesh.take(&sandbox, "first").await.is_ok(), left.is_empty(), "the name is free again");
    }
}

#[tokio::test]
async fn what_a_host_has_lost_fails_and_what_nobody_wants_is_removed() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    let snapshot = mesh.host.with(|state| state.snapshots.remove(&id)).unwrap();
    assert_eq!(reason(mesh.checkpoints.verify(TENANT, &id).await), Reason::CheckpointDamaged);
    assert_eq!(reason(mesh.checkpoints.fork(TENANT, &id, wanted(2, false)).await), Reason::CheckpointDamaged);
    mesh.reconcile().await;
    let failed = shown(&mesh.checkpoints.get(TENANT, &id, "").await.unwrap());
    assert_eq!(failed.state(), CheckpointState::Failed);
    assert!(!failed.failure.is_empty());
    // One that comes back after all, and another that no record knows.
    let stray = oc_proto::mesh::Snapshot { snapshot_id: "cp-stray".into(), ..snapshot.clone() };
    mesh.host.with(|state| {
        state.snapshots.insert(id.clone(), snapshot);
        state.snapshots.insert("cp-stray".into(), stray);
    });
    mesh.reconcile().await;
    assert_eq!(shown(&mesh.checkpoints.get(TENANT, &id, "").await.unwrap()).state(), CheckpointState::Ready);
    assert!(mesh.host.with(|state| state.snapshots.keys().eq([&id])));

    mesh.lose_host().await;
    mesh.reconcile().await;
    assert_eq!(shown(&mesh.checkpoints.get(TENANT, &id, "").await.unwrap()).state(), CheckpointState::Ready);
    assert_eq!(reason(mesh.checkpoints.fork(TENANT, &id, wanted(1, false)).await), Reason::HostUnavailable);
    mesh.checkpoints.delete(TENANT, &id, "").await.unwrap();
    assert!(mesh.names().await.is_empty());
}

#[tokio::test]
async fn forks_of_a_checkpoint_are_made_all_at_once_with_what_it_knows() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    let made = mesh.checkpoints.fork(TENANT, &id, wanted(3, false)).await.unwrap();
    assert_eq!((made.len(), mesh.vms(), mesh.counted().await), (3, 4, 4));
    for fork in &made {
        assert_eq!(fork.state(), SandboxState::Running);
        assert_eq!(
            (fork.from_checkpoint_id.as_str(), fork.checkpoint_id.as_str()),
            (id.as_str(), id.as_str())
        );
        assert_eq!((fork.start_path(), fork.timeout), (StartPath::Restored, 300));
        assert_eq!((fork.envs["A"].as_str(), fork.forked_from.as_str()), ("new", ""));
    }
    // What a fork goes on from is what it was made of.
    let taken = mesh.take(&made[0].sandbox_id, "of a fork").await.unwrap();
    assert_eq!(shown(&taken).parent_id, id);

    let disk = order("disk", CheckpointKind::DiskOnly);
    let disk = shown(&mesh.checkpoints.take(TENANT, &sandbox, disk).await.unwrap()).checkpoint_id;
    let live = mesh.checkpoints.fork(TENANT, &disk, wanted(1, false)).await;
    assert_eq!(reason(live), Reason::CheckpointHasNoMemory);
    let cold = mesh.checkpoints.fork(TENANT, &disk, wanted(1, true)).await.unwrap();
    assert_eq!(cold[0].start_path(), StartPath::RestoredDisk);
    let used = mesh.host.with(|state| state.used.clone());
    assert!(used.iter().all(|source| source.disk_only == (source.snapshot_id == disk)));
}

#[tokio::test]
async fn forks_are_made_all_or_none() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    mesh.host.with(|state| state.creates_left = Some(2));
    assert_eq!(reason(mesh.checkpoints.fork(TENANT, &id, wanted(3, false)).await), Reason::StartFailed);
    mesh.host.with(|state| state.creates_left = Some(2));
    let forked = mesh.checkpoints.fork_sandbox(TENANT, &sandbox, wanted(3, false)).await;
    assert_eq!(reason(forked), Reason::StartFailed);
    // More than its host has room for.
    mesh.host.with(|state| state.creates_left = None);
    assert_eq!(reason(mesh.checkpoints.fork(TENANT, &id, wanted(8, false)).await), Reason::NoCapacity);
    mesh.host.with(|state| state.capture = Mood::Refusing(Reason::CheckpointFailed));
    let forked = mesh.checkpoints.fork_sandbox(TENANT, &sandbox, wanted(3, false)).await;
    assert_eq!(reason(forked), Reason::CheckpointFailed);
    assert_eq!((mesh.sandboxes.list(TENANT).await.len(), mesh.vms(), mesh.counted().await), (1, 1, 1));
    let is_removed = async || mesh.host.with(|state| state.snapshots.keys().eq([&id]));
    until("what the forks were to be made of is removed", is_removed).await;
}

#[tokio::test]
async fn forks_that_nobody_waits_for_are_deleted() {
    for capture in [Mood::Late, Mood::Willing] {
        let mesh = Mesh::start().await;
        let sandbox = mesh.sandbox().await.sandbox_id;
        let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
        mesh.host.with(|state| (state.create, state.capture) = (Mood::Late, capture));
        {
            let of_checkpoint = mesh.checkpoints.fork(TENANT, &id, wanted(3, false));
            let of_sandbox = mesh.checkpoints.fork_sandbox(TENANT, &sandbox, wanted(2, false));
            tokio::select! {
                _ = async { tokio::join!(of_checkpoint, of_sandbox) } => panic!("nothing was made yet"),
                () = until("all are begun", async || mesh.counted().await == 6) => {}
            }
        }
        mesh.host.go_on();
        until("all are gone", async || {
            let is_left = mesh.host.with(|state| (state.vms.len(), state.snapshots.len()));
            is_left == (1, 1) && mesh.counted().await == 1
        })
        .await;
        assert_eq!(mesh.sandboxes.list(TENANT).await.len(), 1);
    }
}

#[tokio::test]
async fn a_fork_waits_for_a_checkpoint_that_is_being_taken() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    mesh.host.with(|state| state.capture = Mood::Late);
    let taking = mesh.take(&sandbox, "first");
    let forking = async {
        mesh.host.has_gone_silent().await;
        let id = shown(&mesh.checkpoints.list(TENANT, "").await[0]).checkpoint_id;
        assert_eq!(reason(mesh.checkpoints.restore(TENANT, &sandbox, &id).await), Reason::CheckpointNotReady);
        let forking = mesh.checkpoints.fork(TENANT, &id, wanted(1, false));
        let (forked, ()) = tokio::join!(forking, async { mesh.host.go_on() });
        forked
    };
    let (taken, forked) = tokio::join!(taking, forking);
    assert_eq!(forked.unwrap()[0].from_checkpoint_id, shown(&taken.unwrap()).checkpoint_id);
}

#[tokio::test]
async fn a_checkpoint_that_is_deleted_while_it_is_taken_leaves_nothing_behind() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    mesh.host.with(|state| state.capture = Mood::Late);
    let deleting = async {
        mesh.host.has_gone_silent().await;
        let id = shown(&mesh.checkpoints.list(TENANT, "").await[0]).checkpoint_id;
        mesh.checkpoints.delete(TENANT, &id, "").await.unwrap();
        mesh.host.go_on();
    };
    let (taken, ()) = tokio::join!(mesh.take(&sandbox, "first"), deleting);
    assert_eq!(reason(taken), Reason::CheckpointNotFound);
    assert_eq!(mesh.host.with(|state| state.snapshots.len()), 0);
    assert!(mesh.names().await.is_empty());
}

#[tokio::test]
async fn a_sandbox_is_forked_as_it_is_and_no_checkpoint_stays() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let parent = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    for (is_cold, start_path) in [(false, StartPath::Restored), (true, StartPath::RestoredDisk)] {
        let forked = mesh.checkpoints.fork_sandbox(TENANT, &sandbox, wanted(2, is_cold)).await;
        let (made, taken) = forked.unwrap();
        assert_eq!((taken.pause_us, taken.freeze_us, taken.has_memory), (1500, 20, !is_cold));
        for fork in &made {
            assert_eq!((fork.forked_from.as_str(), fork.checkpoint_id.as_str()), (&*sandbox, &*parent));
            assert_eq!((fork.from_checkpoint_id.as_str(), fork.timeout), ("", 3600));
            assert_eq!((fork.start_path(), fork.envs["A"].as_str()), (start_path, "new"));
        }
    }
    assert_eq!(mesh.names().await, ["first"]);
    until("what they were made of is removed", async || mesh.host.with(|state| state.snapshots.len() == 1))
        .await;
    assert_eq!(mesh.host.with(|state| state.ephemeral.len()), 2);
    assert_eq!(mesh.look(&sandbox).await.checkpoint_id, parent);
}

#[tokio::test]
async fn a_sandbox_is_put_back_and_goes_on_from_there() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let first = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    mesh.take(&sandbox, "second").await.unwrap();
    let before = mesh.look(&sandbox).await;
    let restored = mesh.checkpoints.restore(TENANT, &sandbox, &first).await.unwrap();
    assert_eq!((restored.epoch, restored.checkpoint_id.as_str()), (2, first.as_str()));
    assert_eq!((restored.state(), restored.start_path()), (SandboxState::Running, StartPath::Restored));
    let third = mesh.take(&sandbox, "third").await.unwrap();
    assert_eq!(shown(&third).parent_id, first, "another branch");
    mesh.sandboxes.hibernate(TENANT, &sandbox).await.unwrap();
    let restored = mesh.checkpoints.restore(TENANT, &sandbox, &first).await.unwrap();
    assert_eq!((restored.epoch, restored.state(), restored.reserved), (3, SandboxState::Running, true));
    // Whoever looked at it before that takes down what runs now.
    let source = SnapshotSource { snapshot_id: "cp-late".into(), disk_only: false, wakes: false };
    mesh.checkpoints.capture(&before, source, false).await.unwrap();
    let other = mesh.sandbox().await.sandbox_id;
    let foreign = mesh.checkpoints.restore(TENANT, &other, &first).await;
    assert_eq!(reason(foreign), Reason::CheckpointNotFound, "of another sandbox");
}

#[tokio::test]
async fn a_sandbox_that_is_not_put_back_is_as_it_was() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let first = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    mesh.host.with(|state| state.create = Mood::Refusing(Reason::CheckpointDamaged));
    for state in [SandboxState::Running, SandboxState::Hibernated] {
        if state == SandboxState::Hibernated {
            mesh.sandboxes.hibernate(TENANT, &sandbox).await.unwrap();
        }
        let before = mesh.look(&sandbox).await;
        let refused = mesh.checkpoints.restore(TENANT, &sandbox, &first).await;
        assert_eq!(reason(refused), Reason::CheckpointDamaged);
        let after = mesh.look(&sandbox).await;
        assert!(after.tried_epoch > before.epoch.max(before.tried_epoch), "never asked for again");
        assert_eq!((after.state(), after.transition()), (state, SandboxTransition::Unspecified));
        assert_eq!((after.epoch, after.reserved), (before.epoch, state == SandboxState::Running));
        assert_eq!((after.checkpoint_id, after.stored_bytes), (before.checkpoint_id, before.stored_bytes));
        assert_eq!((after.active_at, after.start_path), (before.active_at, before.start_path));
    }
}

#[tokio::test]
async fn a_restore_whose_scheduler_dies_is_finished_or_undone_by_what_its_host_has() {
    for (mood, epoch) in [(Mood::Mute, 2), (Mood::Hanging, 1)] {
        let mesh = Mesh::start().await;
        let sandbox = mesh.sandbox().await.sandbox_id;
        let first = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
        mesh.host.with(|state| state.create = mood);
        let (checkpoints, id, of) = (mesh.checkpoints.clone(), first.clone(), sandbox.clone());
        let restoring = tokio::spawn(async move { checkpoints.restore(TENANT, &of, &id).await });
        mesh.host.has_gone_silent().await;
        mesh.glance().await;
        assert_eq!(mesh.look(&sandbox).await.transition(), SandboxTransition::Restoring, "left to its flow");

        let mesh = mesh.die_and_start_again().await;
        assert!(restoring.await.unwrap().is_err());
        mesh.host.with(|state| state.create = Mood::Willing);
        mesh.reconcile().await;
        let settled = mesh.look(&sandbox).await;
        assert_eq!((settled.state(), settled.epoch), (SandboxState::Running, epoch), "{mood:?}");
        assert_eq!(settled.transition(), SandboxTransition::Unspecified);
        assert_eq!(mesh.vms(), 1);
        // Whatever became of it, it can be ended.
        mesh.sandboxes.delete(TENANT, &sandbox).await.unwrap();
        assert_eq!((mesh.vms(), mesh.counted().await), (0, 0));
    }
}

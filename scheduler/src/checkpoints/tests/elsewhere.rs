//! Checkpoints whose host is gone, full, or has lost them.

use oc_mesh::error::Reason;
use oc_proto::{
    mesh::HostRecord,
    v1::{CheckpointKind, CheckpointState},
};

use super::{
    host::Mood,
    mesh::{HOST, KEY, Mesh, STORE, TENANT, member, order, until, wanted},
    reason,
};
use crate::checkpoints::shown;

const OTHER: &str = "host-b";

#[tokio::test]
async fn a_checkpoint_outlives_its_host_once_it_is_in_the_object_store() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    let other = mesh.join(OTHER, STORE).await;
    assert!(!shown(&mesh.checkpoints.get(TENANT, &id, "").await.unwrap()).is_uploaded);
    mesh.upload(&other).await;
    assert!(shown(&mesh.checkpoints.get(TENANT, &id, "").await.unwrap()).is_uploaded);
    assert_eq!(mesh.checkpoints.verify(TENANT, &id).await.unwrap(), (4096, 4096));
    // As long as its host takes it, that one makes what is wanted.
    let made = mesh.checkpoints.fork(TENANT, &id, wanted(2, false)).await.unwrap();
    assert!(made.iter().all(|record| record.host_id == HOST));

    mesh.lose_host().await;
    mesh.reconcile().await;
    let kept = shown(&mesh.checkpoints.get(TENANT, &id, "").await.unwrap());
    assert_eq!((kept.state(), kept.worker_id.as_str()), (CheckpointState::Ready, HOST));
    assert_eq!(mesh.checkpoints.verify(TENANT, &id).await.unwrap(), (0, 4096));
    for is_cold in [false, true] {
        let made = mesh.checkpoints.fork(TENANT, &id, wanted(2, is_cold)).await.unwrap();
        assert!(made.iter().all(|record| record.host_id == OTHER && record.from_checkpoint_id == id));
    }
    // Its copy there is nobody's stray.
    mesh.reconciler.look_at_host(OTHER).await;
    assert!(other.with(|state| state.snapshots.contains_key(&id)));

    mesh.checkpoints.delete(TENANT, &id, "").await.unwrap();
    assert!(mesh.names().await.is_empty());
    assert!(other.with(|state| !state.store.contains_key(&id)));
}

#[tokio::test]
async fn what_its_host_has_no_room_for_goes_to_another_that_is_like_it() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    let stranger = mesh.join("host-x", "store-x").await;
    // One runs there; seven more have room, on a host that takes eight.
    assert_eq!(reason(mesh.checkpoints.fork(TENANT, &id, wanted(9, false)).await), Reason::NoCapacity);
    let other = mesh.join(OTHER, STORE).await;
    mesh.upload(&other).await;
    until("those that were in vain are gone", async || mesh.counted().await == 1).await;
    let made = mesh.checkpoints.fork(TENANT, &id, wanted(9, false)).await.unwrap();
    let there = made.iter().filter(|record| record.host_id == OTHER).count();
    assert_eq!((made.len(), there), (9, 2));
    // Its host has room by its record, and says that it has none.
    mesh.host.with(|state| state.create = Mood::Refusing(Reason::NoCapacity));
    let made = mesh.checkpoints.fork(TENANT, &id, wanted(1, false)).await.unwrap();
    assert_eq!(made[0].host_id, OTHER);
    assert_eq!(stranger.with(|state| state.vms.len()), 0);
}

#[tokio::test]
async fn in_a_mixed_fleet_a_checkpoint_goes_only_where_it_can_be_restored() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    // One of another processor, kernel or VMM; and one that has not the base image of its disk.
    let other = mesh.join_as(OTHER, STORE, "key-b").await;
    let bare = HostRecord { base_digests: vec!["base-b".into()], ..member("host-y", STORE, KEY) };
    let bare = mesh.join_with(bare).await;
    mesh.upload(&other).await;
    bare.with(|state| state.store = other.with(|state| state.store.clone()));
    mesh.lose_host().await;
    let live = mesh.checkpoints.fork(TENANT, &id, wanted(1, false)).await;
    assert_eq!(reason(live), Reason::NoCapacity);
    let booted = mesh.checkpoints.fork(TENANT, &id, wanted(3, true)).await.unwrap();
    assert!(booted.iter().all(|record| record.host_id == OTHER));
    assert!(other.with(|state| state.used.iter().all(|source| source.disk_only)));
    assert_eq!(bare.with(|state| state.vms.len()), 0);
    // One that is like its own.
    mesh.join("host-z", STORE).await.with(|state| state.store = other.with(|state| state.store.clone()));
    let live = mesh.checkpoints.fork(TENANT, &id, wanted(3, false)).await.unwrap();
    assert!(live.iter().all(|record| record.host_id == "host-z"));
}

#[tokio::test]
async fn what_its_host_has_lost_is_fetched_and_what_no_store_has_is_lost() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let kept = shown(&mesh.take(&sandbox, "kept").await.unwrap()).checkpoint_id;
    let other = mesh.join(OTHER, STORE).await;
    mesh.upload(&other).await;
    let lost = shown(&mesh.take(&sandbox, "lost").await.unwrap()).checkpoint_id;
    mesh.host.with(|state| state.snapshots.clear());
    mesh.reconcile().await;
    assert_eq!(
        reason(mesh.checkpoints.fork(TENANT, &lost, wanted(1, false)).await),
        Reason::CheckpointDamaged
    );
    mesh.checkpoints.restore(TENANT, &sandbox, &kept).await.unwrap();
    assert_eq!(mesh.look(&sandbox).await.checkpoint_id, kept);
    assert!(mesh.host.with(|state| state.snapshots.contains_key(&kept)));
}

#[tokio::test]
async fn a_checkpoint_stays_marked_until_the_object_store_has_let_go_of_it() {
    let mesh = Mesh::start().await;
    let sandbox = mesh.sandbox().await.sandbox_id;
    let id = shown(&mesh.take(&sandbox, "first").await.unwrap()).checkpoint_id;
    let other = mesh.join(OTHER, STORE).await;
    mesh.upload(&other).await;
    mesh.lose_host().await;
    other.with(|state| state.delete = Mood::Refusing(Reason::Internal));
    mesh.checkpoints.delete(TENANT, &id, "").await.unwrap();
    assert!(mesh.names().await.is_empty());
    mesh.reconcile().await;
    assert!(other.with(|state| state.store.contains_key(&id)));
    other.with(|state| state.delete = Mood::Willing);
    mesh.reconcile().await;
    assert!(other.with(|state| state.store.is_empty()));
    let order = order("first", CheckpointKind::Full);
    assert!(mesh.take_as(&sandbox, order).await.is_err(), "its sandbox is where its host is");
}

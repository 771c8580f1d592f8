//! Hibernated sandboxes whose host is gone, or has lost them, and that an object store has.

use oc_mesh::error::Reason;
use oc_proto::{
    mesh::{HostRecord, SandboxRecord, Snapshot, SnapshotSource},
    v1::SandboxState,
};

use super::{
    host::{FakeHost, Mood},
    mesh::{BASE, HOST, KEY, Mesh, STORE, TENANT, member, until},
    reason,
};

const OTHER: &str = "host-b";

/// Hibernates a sandbox; the object store of its host and of `others` has it.
async fn hibernated(mesh: &Mesh, id: String, others: &[&FakeHost]) -> SandboxRecord {
    mesh.sandboxes.hibernate(TENANT, &id).await.unwrap();
    let snapshot_id = format!("hibernated-{id}-1");
    mesh.host.with(|state| {
        let vm = state.vms.get_mut(&id).unwrap();
        (vm.stored_bytes, vm.snapshot_id, vm.object_store_id) = (7, snapshot_id.clone(), STORE.into());
        (vm.snapshot_key, vm.base_digest) = (KEY.into(), BASE.into());
    });
    let snapshot = Snapshot { snapshot_id: snapshot_id.clone(), ..Default::default() };
    for host in [&mesh.host].into_iter().chain(others.iter().copied()) {
        host.with(|state| state.store.insert(snapshot_id.clone(), snapshot.clone()));
    }
    mesh.glance().await;
    let noted = mesh.look(&id).await;
    assert_eq!(
        (noted.stored_snapshot_id.as_str(), noted.object_store_id.as_str()),
        (snapshot_id.as_str(), STORE)
    );
    assert_eq!(
        (noted.stored_snapshot_key.as_str(), noted.stored_base_digest.as_str(), noted.stored_bytes),
        (KEY, BASE, 7)
    );
    noted
}

fn source(record: &SandboxRecord, disk_only: bool) -> SnapshotSource {
    SnapshotSource { snapshot_id: record.stored_snapshot_id.clone(), disk_only, wakes: true }
}

#[tokio::test]
async fn it_wakes_where_its_object_store_is_and_nothing_of_it_is_left_elsewhere() {
    let mesh = Mesh::start().await;
    let id = mesh.sandbox().await.sandbox_id;
    let other = mesh.join(OTHER, STORE).await;
    let asleep = hibernated(&mesh, id, &[&other]).await;
    let (id, snapshot_id) = (&asleep.sandbox_id, &asleep.stored_snapshot_id);
    mesh.lose_host().await;
    let woken = mesh.sandboxes.wake(TENANT, id, None).await.unwrap();
    assert_eq!((woken.state(), woken.host_id.as_str(), woken.epoch), (SandboxState::Running, OTHER, 2));
    assert_eq!((woken.stored_snapshot_id.as_str(), woken.in_store_alone, woken.reserved), ("", false, true));
    assert_eq!(other.with(|state| state.used.clone()), [source(&asleep, false)]);
    // What it was made of is of no use any more, and goes without delay.
    mesh.reconciler.look_at_host(OTHER).await;
    assert!(other.with(|state| state.snapshots.is_empty() && !state.store.contains_key(snapshot_id)));
    // The first host was not gone for ever.
    mesh.find_host().await;
    mesh.glance().await;
    assert_eq!(mesh.vms(), 0, "it would run twice");
    assert_eq!(mesh.look(id).await.host_id, OTHER);
}

#[tokio::test]
async fn its_disk_boots_where_its_memory_does_not_go_on() {
    let mesh = Mesh::start().await;
    let id = mesh.sandbox().await.sandbox_id;
    let other = mesh.join_as(OTHER, STORE, "key-b").await;
    let stranger = mesh.join("host-x", "store-x").await;
    // Its memory goes on there, which is of no use without the disk.
    let another = HostRecord { base_digests: vec!["base-b".into()], ..member("host-y", STORE, KEY) };
    let another = mesh.join_with(another).await;
    let asleep = hibernated(&mesh, id, &[&other]).await;
    mesh.lose_host().await;
    let woken = mesh.sandboxes.wake(TENANT, &asleep.sandbox_id, None).await.unwrap();
    assert_eq!(woken.host_id, OTHER);
    assert_eq!(other.with(|state| state.used.clone()), [source(&asleep, true)]);
    assert_eq!([&stranger, &another].map(|host| host.with(|state| state.vms.len())), [0, 0]);
}

#[tokio::test]
async fn a_wake_that_fails_half_way_leaves_it_hibernated() {
    let mesh = Mesh::start().await;
    let id = mesh.sandbox().await.sandbox_id;
    let other = mesh.join(OTHER, STORE).await;
    let asleep = hibernated(&mesh, id, &[&other]).await;
    let id = asleep.sandbox_id.as_str();
    mesh.lose_host().await;
    other.with(|state| state.create = Mood::Refusing(Reason::NoCapacity));
    assert_eq!(reason(mesh.sandboxes.wake(TENANT, id, None).await), Reason::NoCapacity);
    let left = mesh.look(id).await;
    assert_eq!((left.state(), left.in_store_alone, left.reserved), (SandboxState::Hibernated, true, false));
    // The scheduler dies while the other host makes it.
    other.with(|state| state.create = Mood::Hanging);
    let sandboxes = mesh.sandboxes.clone();
    let waking = {
        let id = id.to_owned();
        tokio::spawn(async move { sandboxes.wake(TENANT, &id, None).await })
    };
    other.has_gone_silent().await;
    let mesh = mesh.die_and_start_again().await;
    waking.abort();
    mesh.reconciler.look_at_host(OTHER).await;
    until("nobody wakes it", async || !mesh.look(id).await.reserved).await;
    other.with(|state| state.create = Mood::Willing);
    let woken = mesh.sandboxes.wake(TENANT, id, None).await.unwrap();
    assert_eq!((woken.host_id.as_str(), woken.epoch), (OTHER, 4));
}

#[tokio::test]
async fn what_its_host_has_lost_the_object_store_has() {
    let mesh = Mesh::start().await;
    let id = mesh.sandbox().await.sandbox_id;
    let asleep = hibernated(&mesh, id, &[]).await;
    mesh.host.with(|state| state.vms.clear());
    mesh.glance().await;
    let left = mesh.look(&asleep.sandbox_id).await;
    assert_eq!((left.state(), left.in_store_alone), (SandboxState::Hibernated, true));
    let woken = mesh.sandboxes.wake(TENANT, &asleep.sandbox_id, None).await.unwrap();
    assert_eq!((woken.host_id.as_str(), woken.epoch), (HOST, 2));
}

#[tokio::test]
async fn what_is_deleted_goes_from_the_object_store_though_its_host_is_gone() {
    let mesh = Mesh::start().await;
    let id = mesh.sandbox().await.sandbox_id;
    let other = mesh.join(OTHER, STORE).await;
    let asleep = hibernated(&mesh, id, &[&other]).await;
    mesh.lose_host().await;
    mesh.sandboxes.delete(TENANT, &asleep.sandbox_id).await.unwrap();
    assert!(other.with(|state| state.store.is_empty()));
}

//! Registrations under leases.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt as _;
use oc_mesh::{
    membership::Registration,
    store::{Event, LeaseId, Op, Revision, SharedStore, Txn, Watch},
};

use crate::{faulty::Faulty, store, until, within};

/// Soon over, where that is to be seen.
const SHORT: Duration = Duration::from_secs(2);
/// Not over before the test is, also where the machine stands still for a while.
const LONG: Duration = Duration::from_secs(20);

async fn join(store: &SharedStore, key: &str, value: &'static str, ttl: Duration) -> Registration {
    let value = Bytes::from_static(value.as_bytes());
    Registration::start(Arc::clone(store), key.into(), value, ttl).await.unwrap()
}

async fn value(store: &SharedStore, key: &str) -> Option<String> {
    let found = store.get(key).await.unwrap()?;
    Some(String::from_utf8(found.value.to_vec()).unwrap())
}

/// The next change of one key: its value, or nothing if it was removed.
async fn change(watch: &mut Watch) -> Option<String> {
    let events = within("a change", watch.next()).await.unwrap().unwrap();
    match events.as_slice() {
        [Event::Put(entry)] => Some(String::from_utf8(entry.value.to_vec()).unwrap()),
        [Event::Delete { .. }] => None,
        other => panic!("one change of one key is {other:?}"),
    }
}

/// A record stays for longer than a short lease lasts by itself, and is not written anew. Where the machine stands still for
/// so long, nobody renews the lease in time: then it is looked at again.
async fn assert_stays(store: &SharedStore, key: &str, expected: &str) {
    for _ in 0..3 {
        until("the record to be there", async || value(store, key).await.as_deref() == Some(expected)).await;
        let before = store.get(key).await.unwrap();
        tokio::time::sleep(SHORT + SHORT / 2).await;
        if before.is_some() && store.get(key).await.unwrap() == before {
            return;
        }
    }
    panic!("{key} lapses though there is a member");
}

#[tokio::test]
async fn members_stay() {
    let (store, _directory) = store().await;
    let member = join(&store, "m/1", "one", SHORT).await;
    assert_stays(&store, "m/1", "one").await;
    member.leave().await;
    assert_eq!(value(&store, "m/1").await, None);
}

#[tokio::test]
async fn members_are_updated_and_leave() {
    let (store, _directory) = store().await;
    let one = join(&store, "m/1", "one", LONG).await;
    let two = join(&store, "m/2", "two", LONG).await;
    assert_eq!(value(&store, "m/1").await.as_deref(), Some("one"));
    one.update(Bytes::from_static(b"more")).await.unwrap();
    assert_eq!(value(&store, "m/1").await.as_deref(), Some("more"));
    let before = store.range("m/", None, 1).await.unwrap().revision;
    one.update(Bytes::from_static(b"more")).await.unwrap();
    assert_eq!(store.range("m/", None, 1).await.unwrap().revision, before, "nothing new, nothing written");
    one.leave().await;
    assert_eq!(value(&store, "m/1").await, None, "gone when leaving returns");
    assert_eq!(value(&store, "m/2").await.as_deref(), Some("two"));
    two.leave().await;
}

#[tokio::test]
async fn a_member_that_is_dropped_lapses() {
    let (store, _directory) = store().await;
    drop(join(&store, "m/1", "one", SHORT).await);
    until("the record to lapse", async || value(&store, "m/1").await.is_none()).await;
}

#[tokio::test]
async fn a_lost_lease_is_replaced() {
    let (store, _directory) = store().await;
    let member = join(&store, "m/1", "one", SHORT).await;
    // The only lease there is. The member may find it lost at once: that the record was gone, history tells.
    store.revoke_lease(LeaseId(1)).await.unwrap();
    let mut changes = store.watch("m/1", Revision(0)).await.unwrap();
    for expected in [Some("one"), None, Some("one")] {
        assert_eq!(change(&mut changes).await.as_deref(), expected);
    }
    assert_stays(&store, "m/1", "one").await;
    member.leave().await;
    assert_eq!(value(&store, "m/1").await, None);
}

#[tokio::test]
async fn an_update_replaces_a_lost_lease_too() {
    let (store, _directory) = store().await;
    let member = join(&store, "m/1", "one", LONG).await;
    // Found lost by a renewal: until the next one, nobody but the update can find that its successor is lost.
    store.revoke_lease(LeaseId(1)).await.unwrap();
    until("the member to be back", async || value(&store, "m/1").await.as_deref() == Some("one")).await;
    store.revoke_lease(LeaseId(2)).await.unwrap();
    member.update(Bytes::from_static(b"new")).await.unwrap();
    assert_eq!(value(&store, "m/1").await.as_deref(), Some("new"));
    member.leave().await;
    assert_eq!(value(&store, "m/1").await, None);
}

#[tokio::test]
async fn a_record_that_somebody_removed_comes_back() {
    let (store, _directory) = store().await;
    let member = join(&store, "m/1", "one", SHORT).await;
    let then = vec![Op::Delete { key: "m/1".into() }];
    store.txn(Txn { compare: vec![], then }).await.unwrap();
    until("the member to be back", async || value(&store, "m/1").await.is_some()).await;
    member.leave().await;
}

#[tokio::test]
async fn a_successor_of_the_same_name_outlives_its_predecessor() {
    let (store, _directory) = store().await;
    let old = join(&store, "m/1", "old", LONG).await;
    let new = join(&store, "m/1", "new", LONG).await;
    old.leave().await;
    assert_eq!(value(&store, "m/1").await.as_deref(), Some("new"));
    new.leave().await;
    assert_eq!(value(&store, "m/1").await, None);
}

#[tokio::test]
async fn a_member_outlives_an_outage_and_tells_what_changed_in_it() {
    let (inner, _directory) = store().await;
    let faulty = Faulty::new(Arc::clone(&inner));
    let store: SharedStore = faulty.clone();
    let member = join(&store, "m/1", "one", SHORT).await;
    faulty.set_down(true);
    assert!(member.update(Bytes::from_static(b"two")).await.unwrap_err().retryable());
    until("the lease to lapse", async || value(&inner, "m/1").await.is_none()).await;
    faulty.set_down(false);
    until("the member to be back", async || value(&inner, "m/1").await.as_deref() == Some("two")).await;
    // It leaves nothing behind, and does not wait for a store that is down.
    faulty.set_down(true);
    within("leaving", member.leave()).await;
    until("the lease to lapse", async || value(&inner, "m/1").await.is_none()).await;
}

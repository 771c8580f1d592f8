//! Registrations under leases.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use oc_mesh::{
    membership::Registration,
    store::{LeaseId, Op, SharedStore, Txn},
};

use crate::{faulty::Faulty, store, until, within};

const TTL: Duration = Duration::from_secs(2);

async fn join(store: &SharedStore, key: &str, value: &'static str) -> Registration {
    let value = Bytes::from_static(value.as_bytes());
    Registration::start(Arc::clone(store), key.into(), value, TTL).await.unwrap()
}

async fn value(store: &SharedStore, key: &str) -> Option<String> {
    let found = store.get(key).await.unwrap()?;
    Some(String::from_utf8(found.value.to_vec()).unwrap())
}

#[tokio::test]
async fn members_stay_are_updated_and_leave() {
    let (store, _directory) = store().await;
    let one = join(&store, "m/1", "one").await;
    let two = join(&store, "m/2", "two").await;
    assert_eq!(value(&store, "m/1").await.as_deref(), Some("one"));
    // Longer than a lease lasts by itself.
    tokio::time::sleep(TTL + TTL / 2).await;
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
    drop(join(&store, "m/1", "one").await);
    until("the record to lapse", async || value(&store, "m/1").await.is_none()).await;
}

#[tokio::test]
async fn a_lost_lease_is_replaced() {
    let (store, _directory) = store().await;
    let member = join(&store, "m/1", "one").await;
    // The only lease there is.
    store.revoke_lease(LeaseId(1)).await.unwrap();
    assert_eq!(value(&store, "m/1").await, None);
    until("the member to be back", async || value(&store, "m/1").await.as_deref() == Some("one")).await;
    // It is found lost by an update, too, which does not fail for it.
    store.revoke_lease(LeaseId(2)).await.unwrap();
    member.update(Bytes::from_static(b"new")).await.unwrap();
    assert_eq!(value(&store, "m/1").await.as_deref(), Some("new"));
    tokio::time::sleep(TTL + TTL / 2).await;
    assert_eq!(value(&store, "m/1").await.as_deref(), Some("new"));
    member.leave().await;
    assert_eq!(value(&store, "m/1").await, None);
}

#[tokio::test]
async fn a_record_that_somebody_removed_comes_back() {
    let (store, _directory) = store().await;
    let member = join(&store, "m/1", "one").await;
    let then = vec![Op::Delete { key: "m/1".into() }];
    store.txn(Txn { compare: vec![], then }).await.unwrap();
    until("the member to be back", async || value(&store, "m/1").await.is_some()).await;
    member.leave().await;
}

#[tokio::test]
async fn a_successor_of_the_same_name_outlives_its_predecessor() {
    let (store, _directory) = store().await;
    let old = join(&store, "m/1", "old").await;
    let new = join(&store, "m/1", "new").await;
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
    let member = join(&store, "m/1", "one").await;
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

//! What only the store in a server has: the server may go and come back.

use std::time::Duration;

use oc_mesh::{
    keys, record,
    store::{SharedStore, StoreError, Txn, open},
    view::View,
};
use oc_proto::mesh::HostRecord;
use tokio_util::sync::CancellationToken;

use super::{
    fixture::{Fixture, committed, next, put_under, within},
    leases::leased,
};

async fn write_host(store: &SharedStore, id: &str) {
    let host = HostRecord { host_id: id.into(), ..HostRecord::default() };
    let then = vec![record::put(keys::host(id), &host)];
    committed(store.txn(Txn { compare: vec![], then }).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_watches_views_and_leases_outlive_a_restart_of_the_server() {
    let mut fixture = Fixture::etcd().await;
    let store = fixture.store.clone();
    fixture.put("key", "before").await;
    write_host(&store, "one").await;
    let lease = store.grant_lease(Duration::from_secs(600)).await.unwrap();
    committed(fixture.txn(vec![], vec![put_under(lease, "leased")]).await);
    leased(&fixture, |short| vec![put_under(short, "short")]).await;
    let cancel = CancellationToken::new();
    let view = View::<HostRecord>::start(store.clone(), keys::HOSTS, cancel.clone()).await.unwrap();
    let mut watch = store.watch("key", fixture.revision().await).await.unwrap();
    within("the view", async {
        while !view.is_current() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;

    fixture.server().kill();
    let error = store.get("key").await.unwrap_err();
    assert!(error.retryable(), "{error:?}");
    let error = fixture.txn(vec![], vec![]).await.unwrap_err();
    assert!(error.retryable(), "{error:?}");
    let error = store.keep_alive(lease).await.unwrap_err();
    assert!(error.retryable(), "a server that is gone says nothing about leases: {error:?}");
    assert!(matches!(next(&mut watch).await, Err(StoreError::Unavailable(_))));
    within("the view to notice", async {
        while view.is_current() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(view.get("one").is_some(), "what was seen last is still shown");

    fixture.server().restart().await.unwrap();
    within("calls to work again", async {
        while store.get("key").await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert_eq!(fixture.get("key").await.as_deref(), Some("before"));
    write_host(&store, "two").await;
    within("the view to go on", async {
        while view.get("two").is_none() || !view.is_current() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    store.keep_alive(lease).await.unwrap();
    assert!(fixture.get("leased").await.is_some());
    fixture.gone("short").await;
    cancel.cancel();
}

#[tokio::test]
async fn an_address_where_nothing_answers_is_unavailable() {
    let opened = open("etcd://127.0.0.1:1").await;
    assert!(matches!(opened, Err(StoreError::Unavailable(_))), "{opened:?}");
}

//! Mirrors of a prefix.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use oc_mesh::{
    keys, record,
    store::{Op, Revision, SharedStore, StoreError, Txn, TxnOutcome},
    view::View,
};
use oc_proto::mesh::HostRecord;
use tokio_util::sync::CancellationToken;

use crate::{faulty::Faulty, store, until, within};

type Hosts = View<HostRecord>;

async fn run(store: &SharedStore, then: Vec<Op>) -> Revision {
    match store.txn(Txn { compare: vec![], then }).await.unwrap() {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict => panic!("conflict"),
    }
}

fn host(id: &str, pool_ready: i32) -> Op {
    record::put(keys::host(id), &HostRecord { host_id: id.into(), pool_ready, ..HostRecord::default() })
}

fn removed(id: &str) -> Op {
    Op::Delete { key: keys::host(id) }
}

async fn start(store: &SharedStore) -> (Hosts, tokio_util::sync::DropGuard) {
    let cancel = CancellationToken::new();
    let view = Hosts::start(Arc::clone(store), keys::HOSTS, cancel.clone()).await.unwrap();
    (view, cancel.drop_guard())
}

fn shown(view: &Hosts) -> Vec<(String, i32)> {
    view.all().into_iter().map(|(id, host)| (id, host.pool_ready)).collect()
}

#[tokio::test]
async fn a_view_lists_then_follows() {
    let (store, _directory) = store().await;
    run(&store, vec![host("b", 1), host("a", 1), record::put("other/x", &HostRecord::default())]).await;
    let (view, _cancel) = start(&store).await;
    assert_eq!(shown(&view), [("a".into(), 1), ("b".into(), 1)]);
    assert_eq!(view.get("a").unwrap().host_id, "a");
    assert!(view.get("members/hosts/a").is_none());
    until("the view to be current", async || view.is_current()).await;

    let mut changes = view.changes();
    let changed = changes.next();
    tokio::pin!(changed);
    assert!(futures_util::poll!(&mut changed).is_pending());
    let written = run(&store, vec![host("c", 1), host("a", 2), removed("b")]).await;
    within("the change", changed).await;
    within("the revision", view.reached(written)).await;
    assert_eq!(shown(&view), [("a".into(), 2), ("c".into(), 1)]);
}

#[tokio::test]
async fn changes_are_told_to_who_was_busy_when_they_came() {
    let (store, _directory) = store().await;
    let (view, _cancel) = start(&store).await;
    let mut changes = view.changes();
    for _ in 0..2 {
        let written = run(&store, vec![host("a", 1)]).await;
        within("the revision", view.reached(written)).await;
        within("the change", changes.next()).await;
        assert!(futures_util::poll!(std::pin::pin!(changes.next())).is_pending(), "it is told once");
    }
}

#[tokio::test]
async fn who_catches_up_is_shown_what_is_stored() {
    let (store, _directory) = store().await;
    let (view, _cancel) = start(&store).await;
    for number in 1..30 {
        run(&store, vec![host("a", number)]).await;
        let stored = within("the record", view.caught_up(&*store, "a")).await.unwrap().unwrap();
        assert_eq!((shown(&view), stored), (vec![("a".into(), number)], (*view.get("a").unwrap()).clone()));
    }
    assert_eq!(within("nothing", view.caught_up(&*store, "b")).await.unwrap(), None);
}

#[tokio::test]
async fn a_view_shows_whole_transactions() {
    let (store, _directory) = store().await;
    run(&store, vec![host("a", 0), host("b", 0)]).await;
    let (view, _cancel) = start(&store).await;
    let reader = tokio::spawn({
        let view = view.clone();
        async move {
            while view.get("a").unwrap().pool_ready < 50 {
                let shown = shown(&view);
                assert_eq!(shown[0].1, shown[1].1);
                tokio::task::yield_now().await;
            }
        }
    });
    for count in 1..=50 {
        run(&store, vec![host("a", count), host("b", count)]).await;
    }
    within("the reader", reader).await.unwrap();
}

#[tokio::test]
async fn a_view_longer_than_a_page_never_goes_back() {
    let (inner, _directory) = store().await;
    for chunk in (0..1200).collect::<Vec<_>>().chunks(60) {
        run(&inner, chunk.iter().map(|number| host(&format!("{number:04}"), 0)).collect()).await;
    }
    // While it is listed another one counts up on the last page, which therefore shows the end of it, and the watch
    // begins before it.
    let faulty = Faulty::new(Arc::clone(&inner));
    let counts = (1..=3).map(|count| Txn { compare: vec![], then: vec![host("1199", count)] });
    faulty.interlope(counts.collect());
    let store: SharedStore = faulty;
    let (view, _cancel) = start(&store).await;
    assert_eq!(view.all().len(), 1200);
    let newest = store.get(&keys::host("1199")).await.unwrap().unwrap().mod_revision;
    let reached = view.reached(newest);
    tokio::pin!(reached);
    within("the newest revision", async {
        loop {
            assert_eq!(view.get("1199").unwrap().pool_ready, 3);
            if futures_util::poll!(&mut reached).is_ready() {
                return;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(view.get("1199").unwrap().pool_ready, 3);
}

#[tokio::test]
async fn a_view_resumes_after_an_outage() {
    let (inner, _directory) = store().await;
    let faulty = Faulty::new(Arc::clone(&inner));
    let store: SharedStore = faulty.clone();
    run(&inner, vec![host("a", 1), host("b", 1)]).await;
    let (view, _cancel) = start(&store).await;
    until("the view to be current", async || view.is_current()).await;

    faulty.set_down(true);
    until("the view to notice", async || !view.is_current()).await;
    let missed = run(&inner, vec![host("a", 2), removed("b"), host("c", 2)]).await;
    assert_eq!(shown(&view), [("a".into(), 1), ("b".into(), 1)], "what was seen last is still shown");
    faulty.set_down(false);
    within("the missed changes", view.reached(missed)).await;
    assert_eq!(shown(&view), [("a".into(), 2), ("c".into(), 2)]);
    until("the view to be current", async || view.is_current()).await;
}

#[tokio::test]
async fn a_view_lists_anew_after_compaction() {
    let (inner, _directory) = store().await;
    let faulty = Faulty::new(Arc::clone(&inner));
    let store: SharedStore = faulty.clone();
    run(&inner, vec![host("a", 1), host("b", 1)]).await;
    let (view, _cancel) = start(&store).await;
    until("the view to be current", async || view.is_current()).await;

    faulty.set_down(true);
    let missed = run(&inner, vec![host("a", 2), removed("b")]).await;
    let newest = run(&inner, vec![record::put("other/x", &HostRecord::default())]).await;
    faulty.compact(newest);
    let mut changes = view.changes();
    let changed = changes.next();
    tokio::pin!(changed);
    assert!(futures_util::poll!(&mut changed).is_pending());
    faulty.set_down(false);
    within("the change", changed).await;
    within("the missed changes", view.reached(missed)).await;
    assert_eq!(shown(&view), [("a".into(), 2)], "what was removed meanwhile is gone");
    let after = run(&inner, vec![host("d", 1)]).await;
    within("later changes", view.reached(after)).await;
    assert!(view.is_current());
}

#[tokio::test]
async fn a_view_recovers_from_a_record_that_cannot_be_read() {
    let (store, _directory) = store().await;
    run(&store, vec![host("a", 1)]).await;
    let (view, _cancel) = start(&store).await;
    until("the view to be current", async || view.is_current()).await;
    let garbage = Op::Put { key: keys::host("a"), value: Bytes::from_static(b"\xff\xff"), lease: None };
    run(&store, vec![garbage]).await;
    until("the view to notice", async || !view.is_current()).await;
    let second = Hosts::start(Arc::clone(&store), keys::HOSTS, CancellationToken::new()).await;
    assert!(matches!(second, Err(StoreError::Corrupt(_))));
    let repaired = run(&store, vec![host("a", 2)]).await;
    within("the repaired record", view.reached(repaired)).await;
    assert_eq!(shown(&view), [("a".into(), 2)]);
}

#[tokio::test]
async fn a_cancelled_view_lets_go_of_the_store() {
    let (store, _directory) = store().await;
    let (view, cancel) = start(&store).await;
    assert!(Arc::strong_count(&store) > 1);
    drop(cancel);
    until("the view to let go", async || Arc::strong_count(&store) == 1).await;
    tokio::time::timeout(Duration::from_millis(50), view.changes().next()).await.unwrap_err();
}

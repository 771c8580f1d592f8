//! Following changes.

use std::{collections::BTreeMap, sync::Arc};

use oc_mesh::store::{Op, Revision, StoreError};
use tokio::task::JoinSet;

use super::fixture::{Change, Fixture, committed, next, put_op, within};

pub async fn changes_come_in_order_one_revision_at_a_time(fixture: Fixture) {
    let start = fixture.revision().await;
    let mut watch = fixture.store.watch("w/", start).await.unwrap();
    let first = fixture.put("w/1", "a").await;
    let both = vec![put_op("w/1", "b"), put_op("w/2", "b")];
    let second = committed(fixture.txn(vec![], both).await);
    let mixed = vec![Op::Delete { key: "w/1".into() }, put_op("w/2", "c"), Op::Delete { key: "w/9".into() }];
    let third = committed(fixture.txn(vec![], mixed).await);
    // From the past and as they happen: the same.
    let mut later = fixture.store.watch("w/", start).await.unwrap();
    for watch in [&mut watch, &mut later] {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(next(watch).await.unwrap(), [("w/1".to_owned(), text("a"), first)]);
        let mut item = next(watch).await.unwrap();
        item.sort();
        assert_eq!(item, [("w/1".to_owned(), text("b"), second), ("w/2".to_owned(), text("b"), second)]);
        let mut item = next(watch).await.unwrap();
        item.sort();
        assert_eq!(item, [("w/1".to_owned(), None, third), ("w/2".to_owned(), text("c"), third)]);
    }
}

pub async fn a_watch_resumes_where_it_was_left(fixture: Fixture) {
    let mut written = Vec::new();
    for number in 0..40 {
        written.push(fixture.put("w/key", &number.to_string()).await);
    }
    for (seen, revision) in written.iter().enumerate() {
        let mut watch = fixture.store.watch("w/", *revision).await.unwrap();
        for expected in &written[seen + 1..] {
            let item = next(&mut watch).await.unwrap();
            assert_eq!(item.len(), 1);
            assert_eq!(item[0].2, *expected);
        }
    }
    // From a revision that is still to come.
    let mut watch = fixture.store.watch("w/", Revision(written[39].0 + 1)).await.unwrap();
    fixture.put("w/key", "missed").await;
    let seen = fixture.put("w/key", "seen").await;
    assert_eq!(next(&mut watch).await.unwrap()[0].2, seen);
}

pub async fn a_watch_sees_its_prefix_alone(fixture: Fixture) {
    let start = fixture.revision().await;
    let mut watch = fixture.store.watch("w/", start).await.unwrap();
    let mut all = fixture.store.watch("", start).await.unwrap();
    for key in ["v/1", "w", "w.", "w/", "w/1", "w0", "x/1"] {
        fixture.put(key, "").await;
    }
    let mixed = committed(fixture.txn(vec![], vec![put_op("v/2", ""), put_op("w/2", "")]).await);
    let mut seen = Vec::new();
    while seen.last() != Some(&"w/2".to_owned()) {
        seen.extend(next(&mut watch).await.unwrap().into_iter().map(|(key, _, _)| key));
    }
    assert_eq!(seen, ["w/", "w/1", "w/2"]);
    let mut seen: Vec<Change> = Vec::new();
    while seen.last().is_none_or(|(_, _, revision)| *revision < mixed) {
        seen.extend(next(&mut all).await.unwrap());
    }
    assert_eq!(seen.len(), 9);
}

pub async fn a_watch_amid_writers_sees_all_of_history(fixture: Fixture) {
    const WRITERS: usize = 8;
    const WRITES: usize = 50;
    let fixture = Arc::new(fixture);
    let start = fixture.revision().await;
    let mut early = fixture.store.watch("w/", start).await.unwrap();
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let fixture = Arc::clone(&fixture);
        writers.spawn(async move {
            let mut history: Vec<Change> = Vec::new();
            for write in 0..WRITES {
                let key = format!("w/{writer}");
                history.push(if write % 10 == 9 {
                    let revision = fixture.delete(&key).await;
                    (key, None, revision)
                } else {
                    let revision = fixture.put(&key, &write.to_string()).await;
                    (key, Some(write.to_string()), revision)
                });
            }
            history
        });
    }
    let mut late = fixture.store.watch("w/", start).await.unwrap();
    let history = within("the writers", writers.join_all()).await;
    let history: BTreeMap<Revision, Change> =
        history.into_iter().flatten().map(|change| (change.2, change)).collect();
    assert_eq!(history.len(), WRITERS * WRITES, "every change has a revision of its own");
    for watch in [&mut early, &mut late] {
        let mut collected = Vec::new();
        while collected.len() < history.len() {
            collected.extend(next(watch).await.unwrap());
        }
        assert_eq!(collected, history.values().cloned().collect::<Vec<_>>());
    }
}

pub async fn a_compacted_past_is_refused(fixture: Fixture) {
    let old = fixture.put("w/1", "old").await;
    let newer = fixture.put("w/1", "newer").await;
    fixture.compact().await;
    // The embedded store compacts in the background.
    let oldest = within("compaction", async {
        loop {
            let mut watch = fixture.store.watch("w/", Revision(old.0 - 1)).await.unwrap();
            match next(&mut watch).await {
                Err(StoreError::Compacted { oldest }) => return oldest,
                Ok(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await;
    assert!(oldest >= newer);
    // What is named as the oldest can be resumed from, and so can what a list says.
    let mut watch = fixture.store.watch("w/", oldest).await.unwrap();
    let listed = fixture.store.range("w/", None, 10).await.unwrap();
    assert_eq!(listed.items.len(), 1, "compaction forgets history, not keys");
    let mut resumed = fixture.store.watch("w/", listed.revision).await.unwrap();
    let last = fixture.put("w/1", "last").await;
    for watch in [&mut watch, &mut resumed] {
        assert_eq!(next(watch).await.unwrap()[0].2, last);
    }
}

pub async fn a_dropped_watch_leaves_others_alone(fixture: Fixture) {
    let start = fixture.revision().await;
    let mut kept = fixture.store.watch("w/", start).await.unwrap();
    for _ in 0..50 {
        drop(fixture.store.watch("w/", start).await.unwrap());
    }
    let revision = fixture.put("w/1", "").await;
    assert_eq!(next(&mut kept).await.unwrap()[0].2, revision);
}

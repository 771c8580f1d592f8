//! Compare and set.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use oc_mesh::store::{Compare, MAX_TXN_OPS, MAX_VALUE_BYTES, Op, Revision, StoreError, Txn, TxnOutcome};
use tokio::task::JoinSet;

use super::fixture::{Fixture, committed, put_op, within};

const RACERS: usize = 16;
const ROUNDS: usize = 10;

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

pub async fn absent_has_one_winner(fixture: Fixture) {
    let mut racers = JoinSet::new();
    for racer in 0..RACERS {
        let store = fixture.open_again().await;
        racers.spawn(async move {
            let compare = vec![Compare::Absent("prize".into())];
            let then = vec![put_op("prize", &racer.to_string())];
            (racer, store.txn(Txn { compare, then }).await.unwrap())
        });
    }
    let outcomes = within("the race", racers.join_all()).await;
    let winners: Vec<_> = outcomes.iter().filter(|(_, outcome)| *outcome != TxnOutcome::Conflict).collect();
    assert_eq!(winners.len(), 1);
    assert_eq!(fixture.get("prize").await, Some(winners[0].0.to_string()));
}

pub async fn racing_increments_are_all_counted(fixture: Fixture) {
    fixture.put("counter", "0").await;
    let mut racers = JoinSet::new();
    for _ in 0..RACERS {
        let store = Arc::clone(&fixture.store);
        racers.spawn(async move {
            for _ in 0..ROUNDS {
                loop {
                    let entry = store.get("counter").await.unwrap().unwrap();
                    let count: usize = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                    let compare = vec![Compare::Unchanged("counter".into(), entry.mod_revision)];
                    let then = vec![put_op("counter", &(count + 1).to_string())];
                    match store.txn(Txn { compare, then }).await.unwrap() {
                        TxnOutcome::Committed(_) => break,
                        TxnOutcome::Conflict => {}
                    }
                }
            }
        });
    }
    within("the race", racers.join_all()).await;
    assert_eq!(fixture.get("counter").await, Some((RACERS * ROUNDS).to_string()));
}

pub async fn an_old_revision_conflicts(fixture: Fixture) {
    let old = fixture.put("key", "1").await;
    let new = fixture.put("key", "2").await;
    let write_at =
        |revision| fixture.txn(vec![Compare::Unchanged("key".into(), revision)], vec![put_op("key", "3")]);
    assert_eq!(write_at(old).await.unwrap(), TxnOutcome::Conflict);
    assert_eq!(write_at(Revision(new.0 + 1)).await.unwrap(), TxnOutcome::Conflict);
    committed(write_at(new).await);

    // A key that was removed and made again is another one.
    let old = fixture.put("key", "4").await;
    fixture.delete("key").await;
    assert_eq!(write_at(old).await.unwrap(), TxnOutcome::Conflict, "a removed key is changed");
    fixture.put("key", "5").await;
    assert_eq!(write_at(old).await.unwrap(), TxnOutcome::Conflict);
    assert_eq!(fixture.get("key").await.as_deref(), Some("5"));
}

pub async fn a_conflict_changes_nothing(fixture: Fixture) {
    fixture.put("taken", "1").await;
    let before = fixture.revision().await;
    let compare = vec![Compare::Absent("free".into()), Compare::Absent("taken".into())];
    let outcome = fixture.txn(compare, vec![put_op("free", "2"), delete("taken")]).await;
    assert_eq!(outcome.unwrap(), TxnOutcome::Conflict);
    assert_eq!(fixture.get("free").await, None);
    assert_eq!(fixture.get("taken").await.as_deref(), Some("1"));
    assert_eq!(fixture.revision().await, before);
}

pub async fn many_keys_change_at_one_revision(fixture: Fixture) {
    fixture.put("many/old", "1").await;
    let mut then: Vec<Op> = (1..MAX_TXN_OPS).map(|key| put_op(&format!("many/{key:02}"), "x")).collect();
    then.push(delete("many/old"));
    let revision = committed(fixture.txn(vec![], then).await);
    let page = fixture.store.range("many/", None, 100).await.unwrap();
    assert_eq!(page.items.len(), MAX_TXN_OPS - 1);
    assert!(page.items.iter().all(|entry| entry.mod_revision == revision));
    assert_eq!(page.revision, revision);
}

pub async fn readers_never_see_half_a_transaction(fixture: Fixture) {
    let fixture = Arc::new(fixture);
    let done = Arc::new(AtomicBool::new(false));
    let write = |value: usize| {
        vec![put_op("pair/left", &value.to_string()), put_op("pair/right", &value.to_string())]
    };
    committed(fixture.txn(vec![], write(0)).await);
    let reader = tokio::spawn({
        let (fixture, done) = (Arc::clone(&fixture), Arc::clone(&done));
        async move {
            while !done.load(Ordering::Relaxed) {
                let page = fixture.store.range("pair/", None, 2).await.unwrap();
                assert_eq!(page.items[0].value, page.items[1].value);
                assert_eq!(page.items[0].mod_revision, page.items[1].mod_revision);
            }
        }
    });
    for value in 1..100 {
        committed(fixture.txn(vec![], write(value)).await);
    }
    done.store(true, Ordering::Relaxed);
    within("the reader", reader).await.unwrap();
}

pub async fn what_changes_nothing_has_no_revision(fixture: Fixture) {
    let before = fixture.put("key", "1").await;
    assert_eq!(committed(fixture.txn(vec![], vec![]).await), before, "an empty transaction");
    assert_eq!(committed(fixture.txn(vec![], vec![delete("none")]).await), before, "nothing to remove");
    let compare = vec![Compare::Unchanged("key".into(), before)];
    assert_eq!(committed(fixture.txn(compare, vec![]).await), before, "a mere comparison");
    let conflict = fixture.txn(vec![Compare::Absent("key".into())], vec![]).await;
    assert_eq!(conflict.unwrap(), TxnOutcome::Conflict);
    assert_eq!(fixture.revision().await, before);
}

pub async fn what_no_store_takes_is_refused(fixture: Fixture) {
    let before = fixture.put("key", "1").await;
    let bytes = |length: usize| Bytes::from(vec![0; length]);
    let put = |key: &str, value: Bytes| Op::Put { key: key.into(), value, lease: None };
    let too_many = (0..=MAX_TXN_OPS).map(|key| put(&key.to_string(), bytes(0))).collect();
    let too_large = (0..2).map(|key| put(&key.to_string(), bytes(MAX_VALUE_BYTES))).collect();
    for (what, then) in [
        ("a value too large", vec![put("key", bytes(MAX_VALUE_BYTES + 1))]),
        ("values too large together", too_large),
        ("a key too long", vec![put(&"k".repeat(4096), bytes(0))]),
        ("too many steps", too_many),
        ("no key", vec![put("", bytes(0))]),
        ("a key written twice", vec![put("twice", bytes(1)), put("twice", bytes(2))]),
        ("a key written and removed", vec![put("twice", bytes(1)), delete("twice")]),
    ] {
        let outcome = fixture.txn(vec![], then).await;
        assert!(matches!(outcome, Err(StoreError::Invalid(_))), "{what}: {outcome:?}");
    }
    let compare = (0..=MAX_TXN_OPS).map(|key| Compare::Absent(key.to_string())).collect();
    assert!(matches!(fixture.txn(compare, vec![]).await, Err(StoreError::Invalid(_))));
    assert_eq!(fixture.revision().await, before);

    committed(fixture.txn(vec![], vec![put("key", bytes(MAX_VALUE_BYTES))]).await);
    assert_eq!(fixture.store.get("key").await.unwrap().unwrap().value.len(), MAX_VALUE_BYTES);
}

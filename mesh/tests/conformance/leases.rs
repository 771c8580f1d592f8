//! Keys that end with those who hold them. etcd counts leases in seconds, and at least one election's time: no case
//! says when exactly a lease ends.

use std::time::{Duration, Instant};

use oc_mesh::store::{LeaseId, Op, Revision, StoreError};

use super::fixture::{Fixture, committed, next, put_op, put_under, within};

const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(600);

/// A short lease, when it was asked for, and the revision of what was written under it. Where the machine stands still for as
/// long as it lasts it ends before anything is written: then there is another.
pub async fn leased(fixture: &Fixture, keys: impl Fn(LeaseId) -> Vec<Op>) -> (LeaseId, Instant, Revision) {
    within("a lease that lives", async {
        loop {
            let asked = Instant::now();
            let lease = fixture.store.grant_lease(SHORT).await.unwrap();
            match fixture.txn(vec![], keys(lease)).await {
                Err(StoreError::LeaseNotFound) => {}
                outcome => return (lease, asked, committed(outcome)),
            }
        }
    })
    .await
}

async fn ended(fixture: &Fixture) -> LeaseId {
    let (lease, _, _) = leased(fixture, |lease| vec![put_under(lease, "ended")]).await;
    // Keeping it alive would keep it alive: its key tells.
    fixture.gone("ended").await;
    lease
}

pub async fn keys_end_with_their_lease(fixture: Fixture) {
    let keys = |lease| vec![put_under(lease, "l/1"), put_under(lease, "l/2"), put_op("l/3", "stays")];
    let (_, asked, written) = leased(&fixture, keys).await;
    let mut watch = fixture.store.watch("l/", written).await.unwrap();
    let mut removed = next(&mut watch).await.unwrap();
    if removed.len() == 1 {
        removed.extend(next(&mut watch).await.unwrap());
    }
    assert!(asked.elapsed() >= SHORT, "a lease lasts as long as was asked for");
    removed.sort();
    let removed: Vec<_> = removed.into_iter().map(|(key, value, _)| (key, value)).collect();
    assert_eq!(removed, [("l/1".to_owned(), None), ("l/2".to_owned(), None)]);
    assert_eq!(fixture.get("l/1").await, None);
    assert_eq!(fixture.get("l/3").await.as_deref(), Some("stays"));
}

pub async fn a_lease_kept_alive_stays(fixture: Fixture) {
    for _ in 0..3 {
        match keep_one_of_two(&fixture).await {
            // The machine stood still for as long as a lease lasts: nothing was kept alive.
            Err(StoreError::LeaseNotFound) => {}
            kept => return kept.unwrap(),
        }
    }
    panic!("a lease that is kept alive ends all the same");
}

/// Keeps a lease alive until another one, which is as long, has lapsed.
async fn keep_one_of_two(fixture: &Fixture) -> Result<(), StoreError> {
    let (kept, left) =
        (fixture.store.grant_lease(SHORT * 3).await?, fixture.store.grant_lease(SHORT * 3).await?);
    fixture.txn(vec![], vec![put_under(kept, "kept"), put_under(left, "left")]).await?;
    within("the lease that is left alone to lapse", async {
        while fixture.get("left").await.is_some() {
            fixture.store.keep_alive(kept).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok::<_, StoreError>(())
    })
    .await?;
    let stays = fixture.get("kept").await.is_some();
    fixture.store.keep_alive(kept).await?;
    assert!(stays, "the key is gone before its lease");
    Ok(())
}

pub async fn a_revoked_lease_takes_its_keys(fixture: Fixture) {
    let lease = fixture.store.grant_lease(LONG).await.unwrap();
    let other = fixture.store.grant_lease(LONG).await.unwrap();
    assert_ne!(lease, other);
    let keys = vec![put_under(lease, "l/1"), put_under(lease, "l/2"), put_under(other, "l/3")];
    let written = committed(fixture.txn(vec![], keys).await);
    let mut watch = fixture.store.watch("l/", written).await.unwrap();
    fixture.store.revoke_lease(lease).await.unwrap();
    assert_eq!(fixture.get("l/1").await, None);
    assert_eq!(fixture.get("l/2").await, None);
    assert!(fixture.get("l/3").await.is_some());
    assert!(next(&mut watch).await.unwrap().iter().all(|(_, value, _)| value.is_none()));
}

pub async fn an_ended_lease_is_not_found(fixture: Fixture) {
    let lapsed = ended(&fixture).await;
    let revoked = fixture.store.grant_lease(LONG).await.unwrap();
    fixture.store.revoke_lease(revoked).await.unwrap();
    for lease in [lapsed, revoked, LeaseId(i64::MAX - 1)] {
        let kept = fixture.store.keep_alive(lease).await;
        assert!(matches!(kept, Err(StoreError::LeaseNotFound)), "{kept:?}");
        fixture.store.revoke_lease(lease).await.unwrap();
    }
}

pub async fn a_dead_lease_takes_no_keys(fixture: Fixture) {
    let dead = ended(&fixture).await;
    let before = fixture.revision().await;
    let outcome = fixture.txn(vec![], vec![put_op("first", ""), put_under(dead, "second")]).await;
    assert!(matches!(outcome, Err(StoreError::LeaseNotFound)), "{outcome:?}");
    assert_eq!(fixture.get("first").await, None, "nothing of the transaction happened");
    assert_eq!(fixture.revision().await, before);
}

pub async fn a_key_written_anew_leaves_its_lease(fixture: Fixture) {
    let (old, new) =
        (fixture.store.grant_lease(LONG).await.unwrap(), fixture.store.grant_lease(LONG).await.unwrap());
    for key in ["free", "moved", "removed"] {
        committed(fixture.txn(vec![], vec![put_under(old, key)]).await);
    }
    fixture.put("free", "mine").await;
    committed(fixture.txn(vec![], vec![put_under(new, "moved")]).await);
    fixture.delete("removed").await;
    fixture.put("removed", "made again").await;
    fixture.store.revoke_lease(old).await.unwrap();
    for key in ["free", "moved", "removed"] {
        assert!(fixture.get(key).await.is_some(), "{key}");
    }
    fixture.store.revoke_lease(new).await.unwrap();
    assert_eq!(fixture.get("moved").await, None);
}

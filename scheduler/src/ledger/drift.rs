//! Puts counts right that disagree with the records. They change together, so nothing of ours makes them differ; a
//! store that was restored from a backup in part, or edited by hand, does.

use std::collections::HashSet;

use oc_mesh::{
    keys, record,
    store::{Store, StoreError, Txn, TxnOutcome},
};
use oc_proto::mesh::SandboxRecord;

use super::account::{self, Account, Count};

/// Whether the counts differ from these records: a first look, by records that may be old.
///
/// # Errors
///
/// The counts cannot be read.
pub async fn is_suspected<'a>(
    store: &dyn Store,
    records: impl Iterator<Item = &'a SandboxRecord>,
) -> Result<bool, StoreError> {
    let due = account::sum(records);
    let stored = account::load_all(store).await?;
    let differs = |account: &Account| {
        let entry = stored.get(account).map(|entry| entry.count).unwrap_or_default();
        entry != due.get(account).copied().unwrap_or_default()
    };
    Ok(stored.keys().chain(due.keys()).any(differs))
}

/// Repairs the counts that differ from the records; returns how many.
///
/// The counts are read before the records. Whatever happens to a record in between changes its counts too, and then
/// the comparison with their revision fails: the next repair looks again.
///
/// # Errors
///
/// The store cannot be read or written.
pub async fn repair(store: &dyn Store) -> Result<usize, StoreError> {
    let stored = account::load_all(store).await?;
    let (records, _) = record::list::<SandboxRecord>(store, keys::SANDBOXES).await?;
    let due = account::sum(records.iter().map(|(_, record, _)| record));
    let accounts: HashSet<&Account> = stored.keys().chain(due.keys()).collect();
    let mut repaired = 0;
    for account in accounts {
        let entry = stored.get(account).copied().unwrap_or_default();
        let count: Count = due.get(account).copied().unwrap_or_default();
        if entry.count == count {
            continue;
        }
        let txn = Txn { compare: vec![account.unchanged(entry.revision)], then: vec![account.put(count)] };
        if let TxnOutcome::Committed(_) = store.txn(txn).await? {
            tracing::warn!(?account, stored = ?entry.count, due = ?count, "a count was wrong and is repaired");
            repaired += 1;
        }
    }
    Ok(repaired)
}

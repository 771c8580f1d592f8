//! The one way by which the records of checkpoints change: by compare-and-set, with the index of their sandbox where that
//! changes too.

use std::{sync::Arc, time::Duration};

use oc_mesh::{
    keys, record,
    store::{Compare, Op, Revision, SharedStore, StoreError, Txn, TxnOutcome},
    view::View,
};
use oc_proto::mesh::{CheckpointEntry, CheckpointIndex, CheckpointRecord};
use tokio::sync::watch;

use super::{index, shown};
use crate::{ledger::LedgerError, random, refusal::Refusal, sandboxes::CATCH_UP};

/// How often a change is tried from what is stored by then.
const ATTEMPTS: u32 = 12;

/// The records.
#[derive(Clone, Debug)]
pub struct Book {
    store: SharedStore,
    written: Arc<watch::Sender<Revision>>,
}

impl Book {
    /// Those in `store`.
    pub fn new(store: SharedStore) -> Self {
        Self { store, written: Arc::new(watch::Sender::new(Revision::default())) }
    }

    /// One record, with its revision.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub async fn read(
        &self,
        checkpoint_id: &str,
    ) -> Result<Option<(CheckpointRecord, Revision)>, StoreError> {
        record::get(self.store.as_ref(), &keys::checkpoint(checkpoint_id)).await
    }

    /// What checkpoints a sandbox has.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub async fn index(&self, sandbox_id: &str) -> Result<CheckpointIndex, StoreError> {
        let found = record::get(self.store.as_ref(), &keys::checkpoint_index(sandbox_id)).await?;
        Ok(found.map(|(index, _)| index).unwrap_or_default())
    }

    /// Adds a record, if its sandbox may have one more.
    ///
    /// # Errors
    ///
    /// [`Refusal::Inadmissible`]; failures of the store.
    pub async fn add(&self, record: &CheckpointRecord) -> Result<(), Refusal> {
        let checkpoint = shown(record);
        let entry = CheckpointEntry {
            checkpoint_id: checkpoint.checkpoint_id.clone(),
            name: checkpoint.name.clone(),
            kind: checkpoint.kind,
        };
        let index_key = keys::checkpoint_index(&checkpoint.sandbox_id);
        let record_key = keys::checkpoint(&checkpoint.checkpoint_id);
        for attempt in 0..ATTEMPTS {
            let found = record::get::<CheckpointIndex>(self.store.as_ref(), &index_key).await?;
            let (known, unchanged) = expected(found, &index_key);
            // A commit whose answer was lost is found to be made.
            let is_in = known.entries.iter().any(|other| other.checkpoint_id == entry.checkpoint_id);
            if attempt > 0 && is_in {
                return Ok(());
            }
            let next = index::admit(&known, entry.clone(), record.retention_policy.as_ref())?;
            let txn = Txn {
                compare: vec![unchanged, Compare::Absent(record_key.clone())],
                then: vec![record::put(index_key.clone(), &next), record::put(record_key.clone(), record)],
            };
            if self.commit(txn, attempt).await? {
                return Ok(());
            }
        }
        Err(LedgerError::Busy.into())
    }

    /// Changes a record; what it is then, or `None` if there is none.
    ///
    /// # Errors
    ///
    /// Failures of the store.
    pub async fn update(
        &self,
        checkpoint_id: &str,
        change: impl Fn(&CheckpointRecord) -> CheckpointRecord,
    ) -> Result<Option<CheckpointRecord>, Refusal> {
        let key = keys::checkpoint(checkpoint_id);
        for attempt in 0..ATTEMPTS {
            let Some((found, revision)) = self.read(checkpoint_id).await? else { return Ok(None) };
            let next = change(&found);
            if next == found {
                return Ok(Some(found));
            }
            let txn = Txn {
                compare: vec![Compare::Unchanged(key.clone(), revision)],
                then: vec![record::put(key.clone(), &next)],
            };
            if self.commit(txn, attempt).await? {
                return Ok(Some(next));
            }
        }
        Err(LedgerError::Busy.into())
    }

    /// Removes a record, and its entry in the index, if the record as it is by then may go. Fine if there is none.
    ///
    /// # Errors
    ///
    /// Failures of the store.
    pub async fn remove_if(
        &self,
        checkpoint_id: &str,
        may_go: impl Fn(&CheckpointRecord) -> bool,
    ) -> Result<(), Refusal> {
        let record_key = keys::checkpoint(checkpoint_id);
        for attempt in 0..ATTEMPTS {
            let Some((found, revision)) = self.read(checkpoint_id).await? else { return Ok(()) };
            if !may_go(&found) {
                return Ok(());
            }
            let index_key = keys::checkpoint_index(&shown(&found).sandbox_id);
            let index = record::get::<CheckpointIndex>(self.store.as_ref(), &index_key).await?;
            let (known, unchanged) = expected(index, &index_key);
            let next = index::without(&known, checkpoint_id);
            let rest = match next.entries.is_empty() {
                true => Op::Delete { key: index_key },
                false => record::put(index_key, &next),
            };
            let txn = Txn {
                compare: vec![Compare::Unchanged(record_key.clone(), revision), unchanged],
                then: vec![Op::Delete { key: record_key.clone() }, rest],
            };
            if self.commit(txn, attempt).await? {
                return Ok(());
            }
        }
        Err(LedgerError::Busy.into())
    }

    /// Waits until a copy of the records shows what this process has written.
    pub async fn caught_up(&self, records: &View<CheckpointRecord>) {
        let written = *self.written.borrow();
        if tokio::time::timeout(CATCH_UP, records.reached(written)).await.is_err() {
            tracing::warn!("the list of checkpoints may be old: the store's changes do not arrive");
        }
    }

    /// Whether it was made; if not, after a pause, it is to be tried again from what is stored by then.
    async fn commit(&self, txn: Txn, attempt: u32) -> Result<bool, StoreError> {
        match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => {
                self.written.send_modify(|written| *written = (*written).max(revision));
                Ok(true)
            }
            Ok(TxnOutcome::Conflict) => {
                random::pause(Duration::from_millis(2), attempt).await;
                Ok(false)
            }
            Err(error) if error.retryable() && attempt + 1 < ATTEMPTS => {
                tracing::warn!(%error, attempt, "a checkpoint's record was not written, trying again");
                random::pause(Duration::from_millis(20), attempt).await;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// An index as it is stored, and that it is still.
fn expected(found: Option<(CheckpointIndex, Revision)>, key: &str) -> (CheckpointIndex, Compare) {
    match found {
        Some((index, revision)) => (index, Compare::Unchanged(key.to_owned(), revision)),
        None => (CheckpointIndex::default(), Compare::Absent(key.to_owned())),
    }
}

//! A store that can be cut off, and changes while it is listed.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use oc_mesh::store::{
    KeyValue, LeaseId, Page, Revision, SharedStore, Store, StoreError, Txn, TxnOutcome, Watch,
};
use parking_lot::Mutex;
use tokio::sync::watch;

/// What is wrong with it.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    /// It cannot be reached.
    is_down: bool,
    /// Grows when all watches break.
    breaks: u64,
    /// History up to here is gone.
    compacted: Revision,
}

/// A store in front of another.
#[derive(Debug)]
pub struct Faulty {
    inner: SharedStore,
    faults: watch::Sender<Faults>,
    interlopers: Mutex<Vec<Txn>>,
}

impl Faulty {
    pub fn new(inner: SharedStore) -> Arc<Self> {
        Arc::new(Self { inner, faults: watch::Sender::default(), interlopers: Mutex::default() })
    }

    /// Has others write between the first and the second page of the next list.
    pub fn interlope(&self, writes: Vec<Txn>) {
        *self.interlopers.lock() = writes;
    }

    /// Makes everything fail, or work again.
    pub fn set_down(&self, is_down: bool) {
        self.faults.send_modify(|faults| {
            faults.is_down = is_down;
            faults.breaks += 1;
        });
    }

    /// Breaks all watches, and forgets history up to `revision`.
    pub fn compact(&self, revision: Revision) {
        self.faults.send_modify(|faults| {
            faults.compacted = revision;
            faults.breaks += 1;
        });
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.faults.borrow().is_down { Err(StoreError::Unavailable("cut off".into())) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl Store for Faulty {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        self.check()?;
        self.inner.get(key).await
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        self.check()?;
        if after.is_some() {
            let writes = std::mem::take(&mut *self.interlopers.lock());
            for write in writes {
                self.inner.txn(write).await?;
            }
        }
        self.inner.range(prefix, after, limit).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.check()?;
        self.inner.txn(txn).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.check()?;
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.check()?;
        self.inner.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.check()?;
        self.inner.revoke_lease(lease).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.check()?;
        let oldest = self.faults.borrow().compacted;
        if after < oldest {
            return Ok(stream::iter([Err(StoreError::Compacted { oldest })]).boxed());
        }
        let breaks = self.faults.borrow().breaks;
        let mut faults = self.faults.subscribe();
        let broken = async move {
            let _ = faults.wait_for(|faults| faults.breaks > breaks).await;
        };
        let error = stream::iter([Err(StoreError::Unavailable("cut off".into()))]);
        // Others run between any two items.
        let watch = self.inner.watch(prefix, after).await?.then(|item| async {
            tokio::task::yield_now().await;
            item
        });
        Ok(watch.take_until(Box::pin(broken)).chain(error).boxed())
    }
}

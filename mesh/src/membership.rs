//! Being a member: a record under a lease that is kept alive. When the process dies the lease lapses, and the record
//! with it; others see that by a [`View`](crate::view::View) of the members' prefix.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::store::{LeaseId, Op, SharedStore, StoreError, Txn, TxnOutcome};

/// How long a member that died is still shown: long enough for a busy machine, short enough for users.
pub const DEFAULT_TTL: Duration = Duration::from_secs(10);

/// Shortest time between two renewals.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// One member's registration.
#[derive(Debug)]
pub struct Registration {
    member: Arc<Member>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Member {
    store: SharedStore,
    key: String,
    ttl: Duration,
    /// What is registered, and under which lease. Held over the write, so that an old value never follows a new one.
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    value: Bytes,
    /// Kept when a write fails: what may have been written under it goes with it.
    lease: Option<LeaseId>,
    is_registered: bool,
}

impl Registration {
    /// Registers `value` under `key`; from then on in the background, through failures of the store, too.
    pub async fn start(
        store: SharedStore,
        key: String,
        value: Bytes,
        ttl: Duration,
    ) -> Result<Self, StoreError> {
        let current = Mutex::new(Current { value, lease: None, is_registered: false });
        let member = Arc::new(Member { store, key, ttl, current });
        member.register(&mut *member.current.lock().await).await?;
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        tasks.spawn({
            let (member, stop) = (Arc::clone(&member), stop.clone());
            async move { stop.run_until_cancelled(member.keep_alive()).await }
        });
        tasks.close();
        Ok(Self { member, stop, tasks })
    }

    /// Registers another value. If the store cannot be reached the value follows when it can.
    pub async fn update(&self, value: Bytes) -> Result<(), StoreError> {
        let mut current = self.member.current.lock().await;
        if current.value == value && current.is_registered {
            return Ok(());
        }
        current.value = value;
        self.member.register(&mut current).await
    }

    /// Ends the membership at once.
    pub async fn leave(self) {
        self.stop.cancel();
        self.tasks.wait().await;
        let lease = self.member.current.lock().await.lease.take();
        if let Some(lease) = lease
            && let Err(error) = self.member.store.revoke_lease(lease).await
        {
            tracing::warn!(key = self.member.key, %error, "membership ends when its lease lapses");
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Member {
    /// Writes the current value under the current lease, or under a new one if there is none any more.
    async fn register(&self, current: &mut Current) -> Result<(), StoreError> {
        current.is_registered = false;
        let lapsed = match current.lease {
            Some(lease) => self.write(current, lease).await,
            None => Err(StoreError::LeaseNotFound),
        };
        if !matches!(lapsed, Err(StoreError::LeaseNotFound)) {
            return lapsed;
        }
        let lease = self.store.grant_lease(self.ttl).await?;
        current.lease = Some(lease);
        self.write(current, lease).await
    }

    async fn write(&self, current: &mut Current, lease: LeaseId) -> Result<(), StoreError> {
        let put = Op::Put { key: self.key.clone(), value: current.value.clone(), lease: Some(lease) };
        match self.store.txn(Txn { compare: Vec::new(), then: vec![put] }).await? {
            TxnOutcome::Committed(_) => {
                current.is_registered = true;
                Ok(())
            }
            TxnOutcome::Conflict => {
                Err(StoreError::Invalid("a transaction without conditions conflicted".into()))
            }
        }
    }

    async fn keep_alive(&self) {
        let mut tick = tokio::time::interval((self.ttl / 4).max(MIN_INTERVAL));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let mut current = self.current.lock().await;
            if let Err(error) = self.renew(&mut current).await {
                tracing::warn!(key = self.key, %error, "membership could not be renewed");
            }
        }
    }

    /// Keeps the lease, and registers anew what is not there.
    async fn renew(&self, current: &mut Current) -> Result<(), StoreError> {
        if let Some(lease) = current.lease
            && current.is_registered
        {
            match self.store.keep_alive(lease).await {
                // A predecessor of the same name that left late may have taken the record with it.
                Ok(()) if self.store.get(&self.key).await?.is_some() => return Ok(()),
                Ok(()) => tracing::warn!(key = self.key, "record is gone, registering anew"),
                Err(StoreError::LeaseNotFound) => {
                    tracing::warn!(key = self.key, "lease is lost, registering anew");
                    current.lease = None;
                }
                Err(error) => return Err(error),
            }
        }
        self.register(current).await
    }
}

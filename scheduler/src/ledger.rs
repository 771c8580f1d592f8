//! The one way by which sandboxes' records change. A change moves a record from what it was to what it is to be, and
//! the counts of host and tenant with it, in one transaction: so no room is promised twice, and none is lost.
//!
//! ```text
//!   create, delete, reconcile ──► Change ──► queue ──► writer: draft ──► Txn ──► store
//!                                                        ▲   quota, placement     │
//!                                                        └── read again, retry ◄──┘ conflict
//! ```
//!
//! One [writer](writer) task owns the copies of the counts. What waits for it is [drafted](draft) as one transaction, so
//! that twenty concurrent creates neither fight over a host's count nor wait for twenty `fsync`s. Other schedulers may
//! write at the same time: comparing with the revisions it knows finds that out, and then it reads and drafts again.
//!
//! What a share is follows from the record alone ([`account`]): the counts change by the difference of before and after.
//! A release can therefore not happen twice, whoever asks for it.

use std::time::Duration;

use oc_mesh::{
    keys, record,
    store::{Revision, SharedStore, StoreError},
    view::View,
};
use oc_proto::mesh::{HostRecord, SandboxRecord};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    lifecycle::Denied,
    placement::{Like, Unplaceable},
    quota::{Quota, QuotaExceeded},
    random,
};

pub mod account;
mod draft;
pub mod drift;
mod writer;

/// Changes that may wait for the writer.
const QUEUE: usize = 1024;
/// How often [`Ledger::update`] starts from the newest record again.
const UPDATE_ATTEMPTS: u32 = 10;

/// A record and the revision that wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Versioned {
    /// The record.
    pub record: SandboxRecord,
    /// Its revision.
    pub revision: Revision,
}

/// What a record is to become.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// The same on a host that is chosen when it is written.
    Placed {
        /// What is to be placed.
        record: SandboxRecord,
        /// Hosts not to choose.
        avoid: Vec<String>,
        /// What the host must have.
        like: Option<Like>,
    },
    /// This, on the host that it is on, if there is room for its share.
    Reserved(SandboxRecord),
    /// This.
    Record(SandboxRecord),
    /// Nothing: it is removed.
    Removed,
}

/// A step of one sandbox's record.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The sandbox.
    pub sandbox_id: String,
    /// What the record is now; `None` if there must be none.
    pub from: Option<Versioned>,
    /// What it is to become.
    pub to: Next,
}

/// Why a change was not made.
#[derive(Debug, Error)]
pub enum LedgerError {
    /// The tenant has enough.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// No host takes it.
    #[error(transparent)]
    Unplaceable(#[from] Unplaceable),
    /// The step cannot be taken from where the record is.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The record is not what the change starts from.
    #[error("the sandbox's record was changed at the same time")]
    Conflict,
    /// There is no such record.
    #[error("there is no such sandbox")]
    NotFound,
    /// Too much waits.
    #[error("too many changes wait to be written")]
    Busy,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A handle to the ledger. The writer ends when the last one is dropped.
#[derive(Clone, Debug)]
pub struct Ledger {
    store: SharedStore,
    queue: mpsc::Sender<writer::Job>,
    written: watch::Receiver<Revision>,
}

impl Ledger {
    /// Starts the writer: a future to be spawned, that ends when all handles are dropped.
    ///
    /// # Errors
    ///
    /// The counts cannot be read.
    pub async fn start(
        store: SharedStore,
        hosts: View<HostRecord>,
        quota: Quota,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), StoreError> {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let (publish, written) = watch::channel(Revision::default());
        let accounts = account::load_all(store.as_ref()).await?;
        let writer = writer::Writer::new(store.clone(), hosts, quota, accounts, publish);
        Ok((Self { store, queue, written }, writer.run(jobs)))
    }

    /// The record as it is stored.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub async fn read(&self, sandbox_id: &str) -> Result<Option<Versioned>, StoreError> {
        let found = record::get(self.store.as_ref(), &keys::sandbox(sandbox_id)).await?;
        Ok(found.map(|(record, revision)| Versioned { record, revision }))
    }

    /// Makes a change, durably. Answers with the record as it is then; `None` if it was removed.
    ///
    /// Safe to give up on: the change is made or not, but never in part.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]; after [`LedgerError::Store`] the change may or may not have been made.
    pub async fn commit(&self, change: Change) -> Result<Option<Versioned>, LedgerError> {
        let (reply, answer) = oneshot::channel();
        self.queue.try_send(writer::Job::new(change, reply)).map_err(|_| LedgerError::Busy)?;
        answer.await.unwrap_or_else(|_| Err(StoreError::Unavailable("the ledger has stopped".into()).into()))
    }

    /// Like [`commit`](Self::commit), for a record that is there afterwards.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn write(&self, change: Change) -> Result<Versioned, LedgerError> {
        self.commit(change).await?.ok_or(LedgerError::NotFound)
    }

    /// Takes a step from the newest record, again if somebody else was quicker.
    ///
    /// # Errors
    ///
    /// What `step` denies; [`LedgerError`].
    pub async fn update(
        &self,
        sandbox_id: &str,
        step: impl Fn(&SandboxRecord) -> Result<SandboxRecord, Denied>,
    ) -> Result<Versioned, LedgerError> {
        for attempt in 0..UPDATE_ATTEMPTS {
            let from = self.read(sandbox_id).await?.ok_or(LedgerError::NotFound)?;
            match self.step(from, &step).await {
                Err(LedgerError::Conflict) => random::pause(Duration::from_millis(2), attempt).await,
                settled => return settled,
            }
        }
        Err(LedgerError::Conflict)
    }

    /// Takes a step from exactly this record.
    ///
    /// # Errors
    ///
    /// What `step` denies; [`LedgerError::Conflict`] if the record has changed; others of [`LedgerError`].
    pub async fn step(
        &self,
        from: Versioned,
        step: impl Fn(&SandboxRecord) -> Result<SandboxRecord, Denied>,
    ) -> Result<Versioned, LedgerError> {
        let next = step(&from.record)?;
        if next == from.record {
            return Ok(from);
        }
        let sandbox_id = next.sandbox_id.clone();
        self.write(Change { sandbox_id, from: Some(from), to: Next::Record(next) }).await
    }

    /// Removes exactly this record.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Conflict`] if it has changed; others of [`LedgerError`].
    pub async fn remove(&self, from: Versioned) -> Result<(), LedgerError> {
        let sandbox_id = from.record.sandbox_id.clone();
        self.commit(Change { sandbox_id, from: Some(from), to: Next::Removed }).await.map(|_| ())
    }

    /// The newest revision at which this ledger wrote: what a live copy must show for its reader to see all that this
    /// process has answered.
    pub fn written(&self) -> Revision {
        *self.written.borrow()
    }
}

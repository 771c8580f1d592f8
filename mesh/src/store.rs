//! The record store: keys with values under revisions, changed by compare-and-set transactions, expired by leases,
//! followed by watches. What etcd offers, cut down to what the mesh needs; [`embedded`] offers the same in one file
//! for a single machine, and one conformance suite holds both to it.

use std::{collections::HashSet, fmt::Debug, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::Stream;
use thiserror::Error;

pub mod embedded;
pub mod etcd;

/// Most operations and comparisons in one transaction; etcd's default limit is 128.
pub const MAX_TXN_OPS: usize = 64;
/// Longest key, bytes.
pub const MAX_KEY_BYTES: usize = 1 << 10;
/// Largest value, bytes.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// All keys and values of one transaction together, bytes; etcd's default request limit is 1.5 MiB.
pub const MAX_TXN_BYTES: usize = 5 << 18;

/// A point in the store's history. Every committed change has a higher one than all before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

/// Names a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(pub i64);

/// A key, its value, and the revision that last changed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Bytes,
    /// Revision of the last change.
    pub mod_revision: Revision,
}

/// What must hold for a transaction to commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key has no value.
    Absent(String),
    /// The key was last changed by exactly this revision.
    Unchanged(String, Revision),
}

/// What a transaction does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets a key; with a lease, until that ends. A key written without one outlives any lease it had.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Bytes,
        /// The lease that the key ends with.
        lease: Option<LeaseId>,
    },
    /// Removes a key; fine if there is none.
    Delete {
        /// The key.
        key: String,
    },
}

/// All of `then` at one revision if all of `compare` holds, else nothing. A key may be in `then` once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// What must hold.
    pub compare: Vec<Compare>,
    /// What is done then.
    pub then: Vec<Op>,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Done, durably, at this revision; what changed nothing has the newest revision of all.
    Committed(Revision),
    /// A comparison did not hold; nothing was changed.
    Conflict,
}

/// A part of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// In the order of their keys.
    pub items: Vec<KeyValue>,
    /// The store's revision when it was read: a watch from here misses nothing.
    pub revision: Revision,
    /// Whether keys follow after the last one.
    pub more: bool,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key has this value now.
    Put(KeyValue),
    /// The key has no value any more.
    Delete {
        /// The key.
        key: String,
        /// Revision that removed it.
        revision: Revision,
    },
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision that changed it.
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// Changes in the order of their revisions; the changes of one revision come in one item. Ends after an error.
pub type Watch = Pin<Box<dyn Stream<Item = Result<Vec<Event>, StoreError>> + Send>>;

/// Why the store could not do it.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It cannot be reached, or is too busy; what was asked may or may not have happened.
    #[error("record store unavailable: {0}")]
    Unavailable(String),
    /// A watch asked for changes that are no longer kept: list again, then watch from there.
    #[error("changes up to revision {} are no longer kept", oldest.0)]
    Compacted {
        /// Everything up to here is gone.
        oldest: Revision,
    },
    /// The lease has expired or was never granted.
    #[error("lease not found: it expired or was revoked")]
    LeaseNotFound,
    /// What is stored cannot be read.
    #[error("record store corrupt: {0}")]
    Corrupt(String),
    /// The request can never succeed.
    #[error("invalid store request: {0}")]
    Invalid(String),
}

impl StoreError {
    /// Whether the same request may succeed later.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// The record store.
#[tonic::async_trait]
pub trait Store: Send + Sync + Debug + 'static {
    /// The value of one key.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError>;

    /// Keys that begin with `prefix`, after the key `after`, in order, `limit` at most; fewer, with `more`, where the
    /// values are large.
    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError>;

    /// Runs a transaction; durable once it returns.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Grants a lease that lapses `ttl` after the last [`keep_alive`](Self::keep_alive), with all keys under it.
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Starts the lease's time anew.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease at once, with all keys under it. Fine if it has ended.
    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Follows all changes after revision `after` to keys that begin with `prefix`.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError>;
}

/// A store that many hold.
pub type SharedStore = Arc<dyn Store>;

/// Opens the store that `url` names: `file:///path/store.db`, or `etcd://host:port[,host:port…]`.
pub async fn open(url: &str) -> Result<SharedStore, StoreError> {
    match url.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => {
            Ok(Arc::new(embedded::EmbeddedStore::open(path.into()).await?))
        }
        Some(("etcd", endpoints)) if !endpoints.is_empty() => {
            Ok(Arc::new(etcd::EtcdStore::connect(endpoints).await?))
        }
        _ => Err(StoreError::Invalid(format!("{url}: want file:///path or etcd://host:port[,host:port]"))),
    }
}

/// Where the members of the store listen that `url` names, `host:port`; nowhere, if it is a file.
pub fn members(url: &str) -> Vec<String> {
    let members = url.strip_prefix("etcd://").map(|members| members.split(','));
    members.into_iter().flatten().map(str::to_owned).collect()
}

/// Refuses what no store should be asked.
fn check_txn(txn: &Txn) -> Result<(), StoreError> {
    if txn.compare.len() > MAX_TXN_OPS || txn.then.len() > MAX_TXN_OPS {
        return Err(StoreError::Invalid(format!("a transaction has at most {MAX_TXN_OPS} steps")));
    }
    let mut bytes = 0;
    for compare in &txn.compare {
        let (Compare::Absent(key) | Compare::Unchanged(key, _)) = compare;
        bytes += check_key(key)?;
    }
    let mut keys = HashSet::new();
    for op in &txn.then {
        let key = match op {
            Op::Put { key, value, .. } => {
                if value.len() > MAX_VALUE_BYTES {
                    return Err(StoreError::Invalid(format!(
                        "{key}: a value has at most {MAX_VALUE_BYTES} bytes"
                    )));
                }
                bytes += value.len();
                key
            }
            Op::Delete { key } => key,
        };
        bytes += check_key(key)?;
        if !keys.insert(key) {
            return Err(StoreError::Invalid(format!("key {key:?} is written twice")));
        }
    }
    if bytes > MAX_TXN_BYTES {
        return Err(StoreError::Invalid(format!("a transaction has at most {MAX_TXN_BYTES} bytes")));
    }
    Ok(())
}

/// The length of a key that may be written or compared.
fn check_key(key: &str) -> Result<usize, StoreError> {
    match key.len() {
        0 => Err(StoreError::Invalid("a key is not empty".into())),
        1..=MAX_KEY_BYTES => Ok(key.len()),
        _ => Err(StoreError::Invalid(format!("a key has at most {MAX_KEY_BYTES} bytes"))),
    }
}

/// The first key after all keys that begin with `prefix`; `None` if there is none.
///
/// Keys are compared as bytes, so it is the prefix with its last byte below 0xff incremented.
fn prefix_end(prefix: &str) -> Option<Vec<u8>> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

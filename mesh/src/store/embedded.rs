//! The store in one SQLite file, for a single machine. Several processes open the file at once; there is no server.
//!
//! - One thread per process writes. What waits for it is committed together, with one `fsync` (`synchronous=FULL`), so
//!   that concurrent transactions share its cost; each still gets a revision of its own.
//! - Readers are connections of their own and never wait for the writer (WAL).
//! - Every change is also a row of `changes`, from which watches are served, and resumed. The newest
//!   [`schema::KEPT_REVISIONS`] are kept.
//! - A watcher wakes when this process commits, or when another one tells of its commit by touching the WAL file
//!   (inotify; a slow poll is the fallback).
//! - Leases run on `CLOCK_BOOTTIME`, which all processes of a machine share and nobody can set. Any process sweeps
//!   those that lapsed. After a reboot every lease has lapsed: nobody who held one is alive.
//!
//! Killed at any instruction, SQLite's WAL recovery leaves exactly the committed transactions; a transaction is
//! acknowledged after its commit.

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::{Semaphore, watch};

use super::{KeyValue, LeaseId, Page, Revision, Store, StoreError, Txn, TxnOutcome, Watch};

mod apply;
mod follow;
mod read;
mod schema;
mod write;

use write::{Job, Writer};

/// Reads at once.
const MAX_READERS: usize = 4;

/// An open store file.
pub struct EmbeddedStore {
    path: PathBuf,
    writer: Writer,
    readers: Arc<Readers>,
    /// The newest revision that this process knows of.
    revision: watch::Receiver<Revision>,
    /// Ends the thread that follows the file when dropped.
    _follower: follow::Follower,
}

impl std::fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedStore").field("path", &self.path).finish_non_exhaustive()
    }
}

impl EmbeddedStore {
    /// Opens the file, and makes it if there is none.
    pub async fn open(path: PathBuf) -> Result<Self, StoreError> {
        blocking(move || {
            let connection = schema::open(&path)?;
            let (publish, revision) = watch::channel(read::revision(&connection)?);
            let publish = Arc::new(publish);
            let follower = follow::Follower::start(&path, Arc::clone(&publish))?;
            let writer = Writer::start(connection, &path, publish)?;
            let permits = Arc::new(Semaphore::new(MAX_READERS));
            let readers = Arc::new(Readers { path: path.clone(), idle: Mutex::default(), permits });
            Ok(Self { path, writer, readers, revision, _follower: follower })
        })
        .await
    }
}

#[tonic::async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let key = key.to_owned();
        self.readers.run(move |connection| read::get(connection, &key)).await
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        let (prefix, after) = (prefix.to_owned(), after.map(String::from));
        self.readers.run(move |connection| read::range(connection, &prefix, after.as_deref(), limit)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        super::check_txn(&txn)?;
        self.writer.run(|reply| Job::Txn(txn, reply)).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let ttl_ms = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX / 2);
        self.writer.run(|reply| Job::Grant(ttl_ms, reply)).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.writer.run(|reply| Job::KeepAlive(lease, reply)).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.writer.run(|reply| Job::Revoke(lease, reply)).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let changes = follow::changes(Arc::clone(&self.readers), self.revision.clone(), prefix.into(), after);
        Ok(changes.boxed())
    }
}

/// Connections for reading, opened as needed.
struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Connection>>,
    /// One permit per connection: each holds files open.
    permits: Arc<Semaphore>,
}

impl Readers {
    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        // Never closed. It goes with the work, which goes on when its caller has gone.
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let readers = Arc::clone(self);
        blocking(move || {
            let _permit = permit;
            let idle = readers.idle.lock().pop();
            let mut connection = match idle {
                Some(connection) => connection,
                None => schema::open_reader(&readers.path)?,
            };
            let result = read(&mut connection);
            // A connection that failed is not used again.
            if !matches!(result, Err(StoreError::Unavailable(_) | StoreError::Corrupt(_))) {
                readers.idle.lock().push(connection);
            }
            result
        })
        .await
    }
}

/// Runs SQLite off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::Unavailable(format!("store thread: {error}"))),
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt(error.to_string()),
            Some(_) => Self::Unavailable(error.to_string()),
            // Not SQLite but what it found: a row is missing, or is no text or number where one must be.
            None => Self::Corrupt(error.to_string()),
        }
    }
}

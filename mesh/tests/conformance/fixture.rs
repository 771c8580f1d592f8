//! An empty store, either of both, and the few steps that all cases share.

use std::{future::Future, path::PathBuf, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt as _;
use oc_integration::etcd::EtcdServer;
use oc_mesh::store::{
    Compare, Event, LeaseId, Op, Revision, SharedStore, StoreError, Txn, TxnOutcome, Watch, open,
};
use tempfile::TempDir;

/// Nothing here takes that long unless it is broken.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Revisions that the embedded store keeps, and waits for before it compacts: more than both together make it.
const KEPT: usize = 11_000;

/// A store, and what it lives in.
pub struct Fixture {
    /// The store.
    pub store: SharedStore,
    pub home: Home,
}

/// What a store lives in.
pub enum Home {
    Directory(TempDir),
    Server(EtcdServer),
}

impl Fixture {
    /// A store in a file of its own.
    pub async fn embedded() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = open(&format!("file://{}", directory.path().join("store.db").display())).await.unwrap();
        Self { store, home: Home::Directory(directory) }
    }

    /// A store in a server of its own.
    pub async fn etcd() -> Self {
        let server = EtcdServer::start().await.unwrap();
        let store = open(&format!("etcd://{}", server.address())).await.unwrap();
        Self { store, home: Home::Server(server) }
    }

    /// The store's file.
    pub fn file(&self) -> PathBuf {
        match &self.home {
            Home::Directory(directory) => directory.path().join("store.db"),
            Home::Server(_) => panic!("etcd has no file of ours"),
        }
    }

    /// The store's server.
    pub fn server(&mut self) -> &mut EtcdServer {
        match &mut self.home {
            Home::Directory(_) => panic!("the embedded store has no server"),
            Home::Server(server) => server,
        }
    }

    /// Opens the same store once more, as another service would.
    pub async fn open_again(&self) -> SharedStore {
        let url = match &self.home {
            Home::Directory(_) => format!("file://{}", self.file().display()),
            Home::Server(server) => format!("etcd://{}", server.address()),
        };
        open(&url).await.unwrap()
    }

    /// Writes a key and has all changes before it forgotten.
    pub async fn compact(&self) {
        let newest = match &self.home {
            Home::Server(_) => self.put("filler/key", "").await,
            Home::Directory(_) => {
                let writes = (0..=KEPT).map(|_| self.put("filler/key", ""));
                let written: Vec<Revision> =
                    futures_util::stream::iter(writes).buffer_unordered(256).collect().await;
                written.into_iter().max().unwrap()
            }
        };
        if let Home::Server(server) = &self.home {
            let mut client = etcd_client::Client::connect([server.address()], None).await.unwrap();
            client.compact(i64::try_from(newest.0).unwrap(), None).await.unwrap();
        }
    }

    /// Writes one key.
    pub async fn put(&self, key: &str, value: &str) -> Revision {
        put(&self.store, key, value).await
    }

    /// Removes one key.
    pub async fn delete(&self, key: &str) -> Revision {
        committed(self.txn(vec![], vec![Op::Delete { key: key.into() }]).await)
    }

    /// Runs a transaction.
    pub async fn txn(&self, compare: Vec<Compare>, then: Vec<Op>) -> Result<TxnOutcome, StoreError> {
        self.store.txn(Txn { compare, then }).await
    }

    /// The value of one key, as text.
    pub async fn get(&self, key: &str) -> Option<String> {
        let found = self.store.get(key).await.unwrap()?;
        Some(String::from_utf8(found.value.to_vec()).unwrap())
    }

    /// The store's revision now.
    pub async fn revision(&self) -> Revision {
        self.store.range("none/", None, 1).await.unwrap().revision
    }

    /// Waits until a key is gone.
    pub async fn gone(&self, key: &str) {
        within(format!("{key} to go"), async {
            while self.get(key).await.is_some() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

/// Writes one key.
pub async fn put(store: &SharedStore, key: &str, value: &str) -> Revision {
    committed(store.txn(Txn { compare: vec![], then: vec![put_op(key, value)] }).await)
}

/// The step that writes one key.
pub fn put_op(key: &str, value: &str) -> Op {
    Op::Put { key: key.into(), value: Bytes::copy_from_slice(value.as_bytes()), lease: None }
}

/// The step that writes one key under a lease.
pub fn put_under(lease: LeaseId, key: &str) -> Op {
    Op::Put { key: key.into(), value: Bytes::from_static(b"leased"), lease: Some(lease) }
}

/// The revision of what must have been committed.
pub fn committed(outcome: Result<TxnOutcome, StoreError>) -> Revision {
    match outcome.unwrap() {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict => panic!("conflict"),
    }
}

/// An event in short: key, value unless it was removed, revision.
pub type Change = (String, Option<String>, Revision);

/// The event in short.
pub fn change(event: &Event) -> Change {
    match event {
        Event::Put(entry) => {
            let value = String::from_utf8(entry.value.to_vec()).unwrap();
            (entry.key.clone(), Some(value), entry.mod_revision)
        }
        Event::Delete { key, revision } => (key.clone(), None, *revision),
    }
}

/// The next item of a watch.
pub async fn next(watch: &mut Watch) -> Result<Vec<Change>, StoreError> {
    let item = within("the watch", watch.next()).await.expect("a watch ends with an error");
    item.map(|events| events.iter().map(change).collect())
}

/// Waits, but not for ever.
pub async fn within<T>(what: impl std::fmt::Display, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

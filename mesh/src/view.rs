//! A live mirror of all records under a prefix: listed once, then followed by a watch. Readers ask memory.
//!
//! When the watch ends, for whatever reason, the mirror goes on from the last revision it saw; when that is compacted,
//! or on a record that cannot be read, it lists anew. What it shows lags the store by milliseconds: whoever decides by
//! it must compare-and-set.

use std::{collections::BTreeMap, marker::PhantomData, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use parking_lot::RwLock;
use prost::Message;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    record,
    store::{Event, Revision, SharedStore, Store, StoreError},
};

/// Pause before a broken watch is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Records by ID, which is their key without the prefix, with the revisions that wrote them.
type Records<M> = BTreeMap<String, (Revision, Arc<M>)>;

/// The mirror. Clones show the same.
pub struct View<M> {
    shared: Arc<Shared<M>>,
    prefix: &'static str,
}

struct Shared<M> {
    records: RwLock<Records<M>>,
    state: watch::Sender<State>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    revision: Revision,
    is_current: bool,
}

impl<M> Clone for View<M> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), prefix: self.prefix }
    }
}

impl<M> std::fmt::Debug for View<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View")
            .field("prefix", &self.prefix)
            .field("state", &*self.shared.state.borrow())
            .finish()
    }
}

impl<M: Message + Default + Send + Sync + 'static> View<M> {
    /// Lists the prefix, then follows it until `cancel`. What it holds when this returns is complete.
    pub async fn start(
        store: SharedStore,
        prefix: &'static str,
        cancel: CancellationToken,
    ) -> Result<Self, StoreError> {
        let (records, revision) = list(&store, prefix).await?;
        let state = watch::Sender::new(State { revision, is_current: false });
        let shared = Arc::new(Shared { records: RwLock::new(records), state });
        let mirror = Mirror { store, prefix, shared: Arc::clone(&shared), message: PhantomData };
        // Ends with the token, and holds nothing that anybody must wait for.
        tokio::spawn(async move { cancel.run_until_cancelled_owned(mirror.follow(revision)).await });
        Ok(Self { shared, prefix })
    }

    /// The record under the prefix and `id`.
    pub fn get(&self, id: &str) -> Option<Arc<M>> {
        self.shared.records.read().get(id).map(|(_, record)| Arc::clone(record))
    }

    /// All records, with their IDs, in order.
    pub fn all(&self) -> Vec<(String, Arc<M>)> {
        let records = self.shared.records.read();
        records.iter().map(|(id, (_, record))| (id.clone(), Arc::clone(record))).collect()
    }

    /// Whether the watch is connected. What is shown while it is not may be old.
    pub fn is_current(&self) -> bool {
        self.shared.state.borrow().is_current
    }

    /// Tells of changes from here on.
    pub fn changes(&self) -> Changes<M> {
        let state = self.shared.state.subscribe();
        let told = state.borrow().revision;
        Changes { state, told, _view: self.clone() }
    }

    /// Waits until `revision` is shown: after a write of one's own that changed something under the prefix.
    pub async fn reached(&self, revision: Revision) {
        let mut state = self.shared.state.subscribe();
        let _ = state.wait_for(|state| state.revision >= revision).await;
    }

    /// Waits until the record under the prefix and `id` is shown as `store` has it now, if it has one; that record. One that was removed may
    /// be shown a little longer.
    pub async fn caught_up(&self, store: &dyn Store, id: &str) -> Result<Option<M>, StoreError> {
        let Some((record, revision)) = record::get(store, &format!("{}{id}", self.prefix)).await? else {
            return Ok(None);
        };
        self.reached(revision).await;
        Ok(Some(record))
    }
}

/// The changes of a view. None is left out, whatever whoever asks does meanwhile; several may be told as one.
#[derive(Debug)]
pub struct Changes<M> {
    state: watch::Receiver<State>,
    told: Revision,
    /// What sends them lives as long as this.
    _view: View<M>,
}

impl<M> Changes<M> {
    /// Waits until there is one that was not told yet. Nothing is lost if this is dropped.
    pub async fn next(&mut self) {
        let told = self.told;
        if let Ok(state) = self.state.wait_for(|state| state.revision != told).await {
            self.told = state.revision;
        }
    }
}

async fn list<M: Message + Default>(
    store: &SharedStore,
    prefix: &str,
) -> Result<(Records<M>, Revision), StoreError> {
    let (records, revision) = record::list::<M>(store.as_ref(), prefix).await?;
    let records =
        records.into_iter().map(|(key, record, written)| (id_of(prefix, &key), (written, Arc::new(record))));
    Ok((records.collect(), revision))
}

fn id_of(prefix: &str, key: &str) -> String {
    key.strip_prefix(prefix).unwrap_or(key).to_owned()
}

/// What keeps a view current.
struct Mirror<M> {
    store: SharedStore,
    prefix: &'static str,
    shared: Arc<Shared<M>>,
    message: PhantomData<fn() -> M>,
}

impl<M: Message + Default + Send + Sync + 'static> Mirror<M> {
    async fn follow(self, mut seen: Revision) {
        let mut is_told = false;
        loop {
            let error = match self.watch(&mut seen).await {
                Err(error) => error,
                Ok(()) => StoreError::Unavailable("watch ended".into()),
            };
            let was_current =
                self.shared.state.send_if_modified(|state| std::mem::replace(&mut state.is_current, false));
            if was_current || !is_told {
                tracing::warn!(prefix = self.prefix, %error, "following the store anew");
                is_told = true;
            }
            tokio::time::sleep(RETRY).await;
            if matches!(error, StoreError::Compacted { .. } | StoreError::Corrupt(_)) {
                match list(&self.store, self.prefix).await {
                    Ok((records, revision)) => {
                        *self.shared.records.write() = records;
                        seen = revision;
                        self.shared.state.send_modify(|state| state.revision = revision);
                    }
                    Err(error) => tracing::warn!(prefix = self.prefix, %error, "store cannot be listed"),
                }
            }
        }
    }

    async fn watch(&self, seen: &mut Revision) -> Result<(), StoreError> {
        let mut watch = self.store.watch(self.prefix, *seen).await?;
        self.shared.state.send_modify(|state| state.is_current = true);
        while let Some(events) = watch.next().await {
            let mut revision = *seen;
            {
                let events = events?;
                let mut decoded = Vec::with_capacity(events.len());
                for event in events {
                    revision = revision.max(event.revision());
                    decoded.push(match event {
                        Event::Put(entry) => {
                            let record = record::decode::<M>(&entry)?;
                            (id_of(self.prefix, &entry.key), entry.mod_revision, Some(Arc::new(record)))
                        }
                        Event::Delete { key, revision } => (id_of(self.prefix, &key), revision, None),
                    });
                }
                // All of one revision at once: nobody sees half a transaction.
                let mut records = self.shared.records.write();
                for (id, changed, record) in decoded {
                    // A long list is not of one moment: what it showed late is newer than the first changes after it.
                    if records.get(&id).is_some_and(|(shown, _)| *shown > changed) {
                        continue;
                    }
                    match record {
                        Some(record) => records.insert(id, (changed, record)),
                        None => records.remove(&id),
                    };
                }
            }
            *seen = revision;
            self.shared.state.send_modify(|state| state.revision = revision);
        }
        Ok(())
    }
}

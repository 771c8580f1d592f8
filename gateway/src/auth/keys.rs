//! API keys, looked up by their SHA-256.
//!
//! No secret is ever compared byte by byte: the store knows only hashes, a hash is looked up as a whole, and a
//! caller who can observe how long a look-up takes learns about a hash that he can compute himself.
//!
//! Keys are found in a live copy of the store's. One that is not there may be too new for the copy, so the store
//! itself is asked, by few at a time, and its "no" is believed for a little while: whoever sends wrong keys costs
//! the store next to nothing.

use std::{collections::HashMap, sync::Arc, time::Duration};

use oc_mesh::{
    api_key::ApiKey,
    error::{Reason, status},
    keys, record,
    store::SharedStore,
    view::View,
};
use oc_proto::mesh::KeyRecord;
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::Instant};
use tonic::Status;

/// How long the store's "no" is believed.
const REFUSED_FOR: Duration = Duration::from_secs(5);

/// Refused keys that are remembered at most.
const MAX_REFUSED: usize = 8192;

/// Look-ups in the store at the same time.
const MAX_LOOKUPS: usize = 8;

/// How long a look-up waits for its turn, and the store for its answer.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(2);

/// The API keys of the mesh.
#[derive(Debug)]
pub struct ApiKeys {
    store: SharedStore,
    view: View<KeyRecord>,
    refused: Mutex<HashMap<String, Instant>>,
    lookups: Semaphore,
}

impl ApiKeys {
    /// Keys as `store` has them, `view` being its live copy of [`keys::API_KEYS`].
    #[must_use]
    pub fn new(store: SharedStore, view: View<KeyRecord>) -> Self {
        Self { store, view, refused: Mutex::default(), lookups: Semaphore::new(MAX_LOOKUPS) }
    }

    /// The record of a key; `None` if there is no such key, or none any more.
    ///
    /// # Errors
    /// `OVERLOADED` or `HOST_UNAVAILABLE` if it cannot be looked up now.
    pub async fn find(&self, text: &str) -> Result<Option<Arc<KeyRecord>>, Status> {
        let Ok(key) = text.parse::<ApiKey>() else { return Ok(None) };
        let hash = key.hash();
        if let Some(record) = self.view.get(&hash) {
            return Ok(Some(record).filter(|record| !record.revoked));
        }
        if self.was_refused(&hash) {
            return Ok(None);
        }
        let found = tokio::time::timeout(LOOKUP_DEADLINE, self.look_up(&hash))
            .await
            .map_err(|_| status(Reason::Overloaded, "too many unknown API keys are being looked up"))??;
        if found.is_none() {
            self.refuse(hash);
        }
        Ok(found)
    }

    async fn look_up(&self, hash: &str) -> Result<Option<Arc<KeyRecord>>, Status> {
        // The semaphore is never closed.
        let _turn = self.lookups.acquire().await;
        record::get::<KeyRecord>(&*self.store, &keys::api_key(hash))
            .await
            .map(|found| found.map(|(record, _)| Arc::new(record)).filter(|record| !record.revoked))
            .map_err(|error| {
                tracing::warn!(%error, "an API key could not be looked up");
                status(Reason::HostUnavailable, "the record store cannot be reached")
            })
    }

    fn was_refused(&self, hash: &str) -> bool {
        self.refused.lock().get(hash).is_some_and(|at| at.elapsed() < REFUSED_FOR)
    }

    fn refuse(&self, hash: String) {
        let mut refused = self.refused.lock();
        if refused.len() >= MAX_REFUSED {
            refused.retain(|_, at| at.elapsed() < REFUSED_FOR);
        }
        if refused.len() < MAX_REFUSED {
            refused.insert(hash, Instant::now());
        }
    }
}

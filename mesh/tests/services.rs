//! What services are made of: mirrors, membership, tokens; servers, channels and their layers on real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something is not as expected")]

#[path = "services/faulty.rs"]
mod faulty;
#[path = "services/file_url.rs"]
mod file_url;
#[path = "services/handoff.rs"]
mod handoff;
#[path = "services/layers.rs"]
mod layers;
#[path = "services/membership.rs"]
mod membership;
#[path = "services/relay.rs"]
mod relay;
#[path = "services/serve.rs"]
mod serve;
#[path = "services/slow.rs"]
mod slow;
#[path = "services/token.rs"]
mod token;
#[path = "services/view.rs"]
mod view;

use std::{fmt::Display, future::Future, time::Duration};

use oc_mesh::store::{SharedStore, open};
use tempfile::TempDir;

/// Nothing here takes that long unless it is broken.
const DEADLINE: Duration = Duration::from_secs(30);

/// An empty store, and the directory that it lives in.
async fn store() -> (SharedStore, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&format!("file://{}", directory.path().join("store.db").display())).await.unwrap();
    (store, directory)
}

/// Waits, but not for ever.
async fn within<T>(what: impl Display, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Waits until something holds.
async fn until(what: impl Display, holds: impl AsyncFn() -> bool) {
    within(what, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

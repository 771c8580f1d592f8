//! What is stored of one VM beside its disk, and who writes to it at the moment.
//!
//! A capture works on threads that nothing can stop, and whoever waits for it may go away. So each of them holds the
//! [writing](Stored::write) of its VM until it has ended, and whatever else is done with what is written waits for that.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::{home::Home, running::on_disk, snapshot::Place};
use crate::{fail, microvm::MakeError};

/// Held by whoever writes a snapshot of a VM.
pub type Writing = OwnedMutexGuard<()>;

/// What is stored of the VM in a home.
#[derive(Clone, Debug)]
pub struct Stored {
    home: Home,
    writing: Arc<Mutex<()>>,
}

impl Stored {
    /// Of the VM in `home`, whether or not there is anything.
    pub fn of(home: Home) -> Self {
        Self { home, writing: Arc::default() }
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        Place::stored(&self.home)
    }

    /// Waits until nobody writes a snapshot of the VM. Nobody begins to as long as the answer is held.
    pub async fn write(&self) -> Writing {
        self.writing.clone().lock_owned().await
    }

    /// Removes it for good, once nobody writes to it. Fine if there is nothing.
    pub fn forget(&self) -> BoxFuture<'static, Result<(), MakeError>> {
        let this = self.clone();
        Box::pin(async move {
            let writing = this.write().await;
            let remove = move |home: &Home| {
                let removed = Place::stored(home).remove();
                fail::reached(fail::WAKE_FORGOTTEN, home.vm());
                drop(writing);
                removed
            };
            on_disk(&this.home, remove).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn nothing_is_removed_while_somebody_writes() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::of(dir.path(), "vm-000000000001");
        home.create().unwrap();
        let stored = Stored::of(home.clone());
        let path = home.dir().join("stored");
        fs::create_dir(&path).unwrap();
        let writing = stored.write().await;
        let mut forgetting = stored.forget();
        assert!(timeout(Duration::from_millis(20), &mut forgetting).await.is_err());
        assert!(path.exists());
        drop(writing);
        forgetting.await.unwrap();
        assert!(!path.exists());
        stored.forget().await.unwrap();
    }
}

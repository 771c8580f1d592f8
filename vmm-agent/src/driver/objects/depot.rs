//! What a host does with its object store: it puts its snapshots there, one after the other and after they were answered
//! for, gets others from there when something is to be made of them, and sweeps now and then.
//!
//! There is no queue: what is on the shelf and not in the store is still to be put there. So an agent that died amid an
//! upload begins it again at its next start, and finds the chunks that were put.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, watch},
    task::spawn_blocking,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use super::{
    ObjectError, Objects,
    chunk_lists::ChunkLists,
    upload::{Local, Uploaded},
};
use crate::{backend::Captured, capacity, driver::parts::Parts, microvm::MakeError, telemetry};

/// Before a snapshot that was just taken is uploaded: whoever took it has the machine to himself meanwhile.
const QUIET: Duration = Duration::from_secs(2);
/// However often one is taken.
const QUIET_AT_MOST: Duration = Duration::from_secs(60);
/// Between two attempts, at first and at last.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// How often it is looked whether a sweep is due, which it is far less often.
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// Snapshots that are fetched at once.
const FETCHES: usize = 2;
/// How long the removal of a snapshot waits for its own upload to end.
const UPLOAD_ENDS_WITHIN: Duration = Duration::from_secs(15);

/// Why a snapshot cannot be had from the store.
#[derive(Clone, Debug)]
enum NotFetched {
    NotThere,
    Unusable(String),
    Failed(String),
}

type Fetch = Shared<BoxFuture<'static, Result<(), NotFetched>>>;

/// The dealings of one host with its object store.
#[derive(Debug)]
pub struct Depot {
    parts: Arc<Parts>,
    objects: Objects,
    lists: ChunkLists,
    /// Free disk below which nothing is put into a directory of this host, MiB.
    disk_reserve_mb: u64,
    /// What the store is called, once it has said so.
    store_id: watch::Sender<Option<Arc<str>>>,
    /// Snapshots of the shelf that are in the store.
    uploaded: Mutex<HashSet<String>>,
    /// Those that cannot be put there: they are damaged.
    unfit: Mutex<HashSet<String>>,
    /// The one that is being put there.
    uploading: watch::Sender<Option<String>>,
    fetching: Mutex<HashMap<String, Fetch>>,
    fetches: Arc<Semaphore>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl Depot {
    /// The dealings of the host of `parts` with `objects`. [`Depot::start`] begins them.
    ///
    /// # Errors
    ///
    /// If the lists of chunks cannot be swept.
    pub fn open(parts: Arc<Parts>, objects: Objects, disk_reserve_mb: u64) -> io::Result<Arc<Self>> {
        let lists = ChunkLists::in_directory(&parts.places.chunk_lists);
        lists.keep_only(&parts.places.snapshots)?;
        Ok(Arc::new(Self {
            parts,
            objects,
            lists,
            disk_reserve_mb,
            store_id: watch::Sender::new(None),
            uploaded: Mutex::default(),
            unfit: Mutex::default(),
            uploading: watch::Sender::new(None),
            fetching: Mutex::default(),
            fetches: Arc::new(Semaphore::new(FETCHES)),
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
        }))
    }

    /// Begins to upload, until [`Depot::close`].
    pub fn start(self: &Arc<Self>) {
        let (this, cancel) = (Arc::clone(self), self.cancel.clone());
        self.tasks.spawn(async move { cancel.run_until_cancelled(this.keep_up()).await });
    }

    /// Gives up what is under way, and waits until it has ended.
    pub async fn close(&self) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// What the store is called, once it has said so.
    pub fn store_id(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.store_id.subscribe()
    }

    /// The store that has this snapshot of the shelf, too.
    pub fn store_with(&self, snapshot_id: &str) -> Option<Arc<str>> {
        let is_there = self.uploaded.lock().contains(snapshot_id);
        is_there.then(|| self.store_id.borrow().clone())?
    }

    async fn keep_up(&self) {
        let mut added = self.parts.shelf.watch();
        let attempts =
            ExponentialBuilder::new().with_jitter().with_min_delay(RETRY.0).with_max_delay(RETRY.1);
        let mut waits = attempts.without_max_times().build();
        loop {
            added.mark_unchanged();
            let next = match self.catch_up().await {
                Ok(()) => {
                    waits = attempts.without_max_times().build();
                    LOOK_EVERY
                }
                Err(error) => {
                    let wait = waits.next().unwrap_or(RETRY.1);
                    warn!(%error, again_ms = wait.as_millis(), "not all is in the object store yet");
                    wait
                }
            };
            if let Ok(Ok(())) = timeout(next, added.changed()).await {
                let quiet = async { while let Ok(Ok(())) = timeout(QUIET, added.changed()).await {} };
                let _ = timeout(QUIET_AT_MOST, quiet).await;
            }
        }
    }

    /// Puts into the store whatever is not there, and sweeps if that is due.
    ///
    /// # Errors
    ///
    /// [`ObjectError`]: the rest is tried again.
    pub async fn catch_up(&self) -> Result<(), ObjectError> {
        if self.store_id.borrow().is_none() {
            let id = self.objects.id().await?;
            self.store_id.send_replace(Some(id.into()));
        }
        while let Some(captured) = self.next() {
            let id = captured.snapshot_id.as_str();
            self.uploading.send_replace(Some(id.to_owned()));
            // From here on who removes it waits for us; who did so before is seen now.
            let put = match self.parts.shelf.has(id) {
                true => self.put(&captured).await,
                false => Err(ObjectError::Unwanted),
            };
            self.uploading.send_replace(None);
            match put {
                _ if !self.parts.shelf.has(id) => {}
                Ok(Uploaded { chunks, put }) => {
                    self.uploaded.lock().insert(id.to_owned());
                    telemetry::uploaded(put);
                    info!(snapshot_id = id, chunks, put, "snapshot is in the object store");
                }
                Err(ObjectError::Local(error)) if is_damage(&error) => {
                    self.unfit.lock().insert(id.to_owned());
                    warn!(snapshot_id = id, %error, "a snapshot is damaged, and goes to no object store");
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(swept) = self.objects.sweep_if_due().await? {
            info!(chunks = swept.chunks, removed = swept.removed, "swept the object store");
        }
        Ok(())
    }

    /// A snapshot of the shelf that is still to be put into the store.
    fn next(&self) -> Option<Captured> {
        let (uploaded, unfit) = (self.uploaded.lock(), self.unfit.lock());
        let is_due = |captured: &Captured| {
            let id = &captured.snapshot_id;
            !captured.circumstances.is_ephemeral && !uploaded.contains(id) && !unfit.contains(id)
        };
        self.parts.shelf.all().into_iter().find(is_due)
    }

    async fn put(&self, captured: &Captured) -> Result<Uploaded, ObjectError> {
        if let Some(directory) = self.objects.directory() {
            // Whatever is wrong with it, it is not the snapshot that is.
            let free_mb = capacity::measure(directory).map_err(io::Error::other)?.disk_mb;
            if free_mb < self.disk_reserve_mb {
                return Err(io::Error::from(io::ErrorKind::StorageFull).into());
            }
        }
        let place = self.parts.places.snapshot(&captured.snapshot_id);
        let manifest = {
            let place = place.clone();
            spawn_blocking(move || place.read()).await.map_err(io::Error::other)??
        };
        let manifest = manifest.ok_or(io::ErrorKind::NotFound).map_err(io::Error::from)?;
        let local = Local {
            snapshot_id: captured.snapshot_id.clone(),
            dir: place.dir().to_owned(),
            origin: manifest.origin,
            manifest_digest: captured.manifest_digest.clone(),
        };
        match self.objects.has(&local).await? {
            true => Ok(Uploaded::default()),
            false => {
                let is_wanted = || self.parts.shelf.has(&local.snapshot_id);
                self.objects.upload(&local, &self.lists, is_wanted).await
            }
        }
    }

    /// Sees that a snapshot is on the shelf, and gets it from the store if it is not. Many may wait for the same one, and go
    /// away.
    ///
    /// # Errors
    ///
    /// [`MakeError::NoSnapshot`]; [`MakeError::Unusable`] if the store's copy is damaged, or of a base image that is not
    /// here; that the store does not answer.
    pub async fn provide(self: &Arc<Self>, snapshot_id: &str) -> Result<(), MakeError> {
        let fetch = {
            let mut fetching = self.fetching.lock();
            if self.parts.shelf.has(snapshot_id) {
                return Ok(());
            }
            let begin = || {
                let (this, id) = (Arc::clone(self), snapshot_id.to_owned());
                let task = self.tasks.spawn(async move {
                    let cancel = this.cancel.clone();
                    let fetched = cancel.run_until_cancelled(this.fetch(&id)).await;
                    // The next one begins anew.
                    this.fetching.lock().remove(&id);
                    fetched.unwrap_or_else(|| {
                        Err(NotFetched::Failed("the host's agent is shutting down".into()))
                    })
                });
                async { task.await.unwrap_or_else(|panic| Err(NotFetched::Failed(panic.to_string()))) }
                    .boxed()
                    .shared()
            };
            fetching.entry(snapshot_id.to_owned()).or_insert_with(begin).clone()
        };
        fetch.await.map_err(|error| match error {
            NotFetched::NotThere => MakeError::NoSnapshot(snapshot_id.to_owned()),
            NotFetched::Unusable(reason) => MakeError::Unusable(reason),
            NotFetched::Failed(reason) => MakeError::Backend(reason),
        })
    }

    async fn fetch(&self, id: &str) -> Result<(), NotFetched> {
        let place = self.parts.places.snapshot(id);
        // What is there and not on the shelf is damaged. It is told by who uses it, and not replaced.
        if place.dir().exists() {
            return Ok(());
        }
        let failed = |error: io::Error| NotFetched::Failed(error.to_string());
        let _one_of_few =
            self.fetches.acquire().await.map_err(|closed| NotFetched::Failed(closed.to_string()))?;
        let inventory = self.objects.inventory(id).await?;
        if self.parts.bootable_with_base_of(&inventory.origin).is_none() {
            let reason = "the base image of its disk is not on this host";
            return Err(NotFetched::Unusable(reason.to_owned()));
        }
        let (parts, origin) = (Arc::clone(&self.parts), inventory.origin.clone());
        spawn_blocking(move || parts.pin(&origin))
            .await
            .map_err(io::Error::other)
            .map_err(failed)?
            .map_err(failed)?;
        let others: Vec<_> =
            self.parts.shelf.all().into_iter().map(|captured| captured.snapshot_id).collect();
        let others: Vec<_> =
            others.iter().map(|other| self.parts.places.snapshot(other).dir().to_owned()).collect();
        self.objects.fetch(&inventory, place.dir(), &others).await?;
        let (parts, of) = (Arc::clone(&self.parts), id.to_owned());
        telemetry::fetched();
        self.uploaded.lock().insert(id.to_owned());
        let added =
            spawn_blocking(move || parts.shelf.add(&of)).await.map_err(io::Error::other).map_err(failed)?;
        let captured = added.map_err(failed)?;
        info!(snapshot_id = id, bytes = captured.bytes, "fetched a snapshot from the object store");
        Ok(())
    }

    /// Removes a snapshot from the store. It is not on the shelf any more.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the store does not answer.
    pub async fn remove(&self, snapshot_id: &str) -> Result<(), MakeError> {
        // Its upload ends as soon as it finds that it is not on the shelf; what that has put by then goes here.
        let mut uploading = self.uploading.subscribe();
        let ended = uploading.wait_for(|current| current.as_deref() != Some(snapshot_id));
        if timeout(UPLOAD_ENDS_WITHIN, ended).await.is_err() {
            return Err(MakeError::Late);
        }
        self.objects.remove(snapshot_id).await.map_err(|error| MakeError::Backend(error.to_string()))?;
        self.uploaded.lock().remove(snapshot_id);
        self.unfit.lock().remove(snapshot_id);
        Ok(())
    }

    /// Reads all of a snapshot in the store and compares it with its digests. Returns how much that was, bytes; `None` if
    /// it is not there.
    ///
    /// # Errors
    ///
    /// [`MakeError::Unusable`] says what is damaged.
    pub async fn verify(&self, snapshot_id: &str) -> Result<Option<u64>, MakeError> {
        match self.objects.verify(snapshot_id).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(ObjectError::NotFound(_)) => Ok(None),
            Err(error @ ObjectError::Damaged(_)) => Err(MakeError::Unusable(error.to_string())),
            Err(error) => Err(MakeError::Backend(error.to_string())),
        }
    }
}

impl From<ObjectError> for NotFetched {
    fn from(error: ObjectError) -> Self {
        match error {
            ObjectError::NotFound(_) => Self::NotThere,
            ObjectError::Damaged(_) => Self::Unusable(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

fn is_damage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound
    )
}

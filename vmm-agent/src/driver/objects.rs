//! The object store: a second place for snapshots, from which any host that uses it can make something of them.
//!
//! ```text
//!   store-id          names the store; put once, never changed
//!   chunks/ab/cd…     a piece of a file, called by its SHA-256
//!   snapshots/ID      the files of a snapshot and the chunks that they are made of; put last, removed first
//!   sweeps/N          the last time that chunks which no snapshot names were removed
//! ```
//!
//! - [`chunk`], [`inventory`]: what is put there, and how it is told from anything else. Pure, or nearly.
//! - [`chunk_lists`]: the chunks of images that many snapshots share are not computed twice.
//! - [`upload`], [`fetch`]: there, and back; [`sweep`], [`unfinished`]: removing what nothing names any more.
//! - [`depot`]: who does that on this host, and when.
//!
//! A snapshot is in the store when its inventory is, which comes after all that it names. So a crash at any moment leaves
//! chunks at worst, which the next upload finds, or a sweep.

pub mod chunk;
pub mod chunk_lists;
pub mod depot;
pub mod fetch;
pub mod inventory;
pub mod sweep;
#[cfg(test)]
pub(in crate::driver) mod tests;
pub mod unfinished;
pub mod upload;

use std::{
    fmt, fs::DirBuilder, io, os::unix::fs::DirBuilderExt as _, path::PathBuf, sync::Arc, time::Duration,
};

use object_store::{
    ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, RetryConfig, aws::AmazonS3Builder,
    local::LocalFileSystem, path::Path, prefix::PrefixStore,
};
use oc_mesh::clock::SharedClock;

const STORE_ID: &str = "store-id";
/// Bytes of a store's name at most.
const MAX_STORE_ID: u64 = 64;

/// Chunks that are put or fetched at once, for one snapshot.
const AT_ONCE: usize = 4;

/// How often one request is repeated, and for how long: whoever makes it tries again himself.
const RETRIES: usize = 4;
const RETRIES_WITHIN: Duration = Duration::from_secs(20);

/// How long things may take, and how long they are left alone.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Chunks younger than this are never swept, whatever names them. See [`sweep`].
    pub grace: Duration,
    /// How long a sweep may take from its last look at a chunk to its removal.
    pub settle: Duration,
    /// Between two sweeps, whichever host's.
    pub sweep_every: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(4 * 3600),
            settle: Duration::from_secs(60),
            sweep_every: Duration::from_secs(3600),
        }
    }
}

/// Why the object store does not do it.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// No store can be told from the URL.
    #[error("{url:?} is no object store: give file:///PATH or s3://BUCKET[/PREFIX], without credentials")]
    Url {
        /// The URL.
        url: String,
    },
    /// It does not answer, or refuses.
    #[error("the object store does not do it: {0}")]
    Store(#[from] object_store::Error),
    /// It has no such snapshot.
    #[error("the object store has no snapshot {0:?}")]
    NotFound(String),
    /// What it has is not what was put there.
    #[error("the object store's copy is damaged: {0}")]
    Damaged(String),
    /// This host's files.
    #[error(transparent)]
    Local(#[from] io::Error),
    /// Nobody wants it there any more.
    #[error("the snapshot was removed meanwhile")]
    Unwanted,
    /// It took so long that what was found at the beginning may be gone.
    #[error("not done within {0:?}")]
    Late(Duration),
}

/// An object store. Clones are the same one.
#[derive(Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    clock: SharedClock,
    pace: Pace,
    /// Where it is, if that is a directory of this host.
    directory: Option<PathBuf>,
}

impl fmt::Debug for Objects {
    // Of the store itself its name alone: it holds credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Objects").field(&self.store.to_string()).finish()
    }
}

impl Objects {
    /// The store at `url`: `file:///PATH`, made if it is not there, or `s3://BUCKET[/PREFIX]` with what the environment
    /// says about it (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT` and so on). Nothing is asked of it yet.
    ///
    /// # Errors
    ///
    /// [`ObjectError`] if it is no store, or the directory cannot be made.
    pub fn open(url: &str, clock: SharedClock) -> Result<Self, ObjectError> {
        let (store, directory): (Arc<dyn ObjectStore>, _) = match parse(url)? {
            Address::Directory(path) => {
                // What is in it is sandboxes' own.
                DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
                // An answer means that it is on disk.
                let store = LocalFileSystem::new_with_prefix(&path)?.with_fsync(true);
                (Arc::new(store), Some(path))
            }
            Address::Bucket { bucket, prefix } => {
                let retry =
                    RetryConfig { max_retries: RETRIES, retry_timeout: RETRIES_WITHIN, ..Default::default() };
                let store = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry).build()?;
                (Arc::new(PrefixStore::new(store, Path::from(prefix))), None)
            }
        };
        Ok(Self { directory, ..Self::of(store, clock, Pace::default()) })
    }

    /// As [`Objects::open`], of what is a store already.
    pub fn of(store: Arc<dyn ObjectStore>, clock: SharedClock, pace: Pace) -> Self {
        Self { store, clock, pace, directory: None }
    }

    /// Where it is, if that is a directory of this host.
    pub fn directory(&self) -> Option<&std::path::Path> {
        self.directory.as_deref()
    }

    /// The store's name. The first host that asks gives it one.
    ///
    /// # Errors
    ///
    /// [`ObjectError`] if it does not answer.
    pub async fn id(&self) -> Result<String, ObjectError> {
        let at = Path::from(STORE_ID);
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
        let (id, create) = (hex::encode(bytes), PutOptions::from(PutMode::Create));
        match self.store.put_opts(&at, id.clone().into(), create).await {
            Ok(_) => return Ok(id),
            Err(object_store::Error::AlreadyExists { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let found = self.read(&at, MAX_STORE_ID).await?.unwrap_or_default();
        let id = String::from_utf8(found.into()).ok().filter(|id| is_store_id(id));
        id.ok_or_else(|| ObjectError::Damaged("it does not say what it is called".to_owned()))
    }

    /// All of an object; `None` if there is none.
    async fn read(&self, at: &Path, at_most: u64) -> Result<Option<bytes::Bytes>, ObjectError> {
        let found = match self.store.get(at).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found?,
        };
        if found.meta.size > at_most {
            return Err(ObjectError::Damaged(format!("{at} has {} bytes", found.meta.size)));
        }
        Ok(Some(found.bytes().await?))
    }
}

fn is_store_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[derive(Debug, PartialEq, Eq)]
enum Address {
    Directory(PathBuf),
    Bucket { bucket: String, prefix: String },
}

/// Parses a URL.
///
/// # Errors
///
/// [`ObjectError::Url`], without what may be a password.
fn parse(url: &str) -> Result<Address, ObjectError> {
    let refused = || ObjectError::Url { url: url.rsplit('@').next().unwrap_or_default().to_owned() };
    match url.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => Ok(Address::Directory(path.into())),
        Some(("s3", rest)) if !rest.contains(['@', '?', '#']) => {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            match bucket.is_empty() {
                true => Err(refused()),
                false => Ok(Address::Bucket { bucket: bucket.to_owned(), prefix: prefix.to_owned() }),
            }
        }
        _ => Err(refused()),
    }
}

/// Sees that `url` can be an object store's.
///
/// # Errors
///
/// [`ObjectError::Url`] if it cannot.
pub fn check(url: &str) -> Result<(), ObjectError> {
    parse(url).map(drop)
}

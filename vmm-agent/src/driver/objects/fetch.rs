//! Getting a snapshot out of the object store: every chunk compared with its name, all of it synced, and then renamed into
//! place. Also what reads all of one to see whether it is whole.

use std::{
    fs::{DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use fs_err::{self as fs, File, os::unix::fs::chown};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::task::spawn_blocking;

use super::{
    AT_ONCE, ObjectError, Objects,
    chunk::{CHUNK, ChunkId, offset},
    inventory::{Inventory, MAX_BYTES, StoredFile},
};
use crate::driver::{
    digests::Digests,
    durable,
    home::{IMAGE_MODE, SNAPSHOT_GID},
    snapshot::digests_of,
};

/// What digests are called beside their images.
const DIGESTS: &str = ".digests";

impl Objects {
    /// What a snapshot in the store is made of.
    ///
    /// # Errors
    ///
    /// [`ObjectError::NotFound`], [`ObjectError::Damaged`]; or the store does not answer.
    pub async fn inventory(&self, snapshot_id: &str) -> Result<Inventory, ObjectError> {
        let found = self.read(&Inventory::path(snapshot_id), MAX_BYTES).await?;
        let found = found.ok_or_else(|| ObjectError::NotFound(snapshot_id.to_owned()))?;
        Inventory::decode(snapshot_id, &found)
            .ok_or_else(|| ObjectError::Damaged("its inventory is damaged, or of another version".to_owned()))
    }

    /// Puts the files of a snapshot into the new directory `place`: all of them, or none. An image that is in one of the
    /// directories of `others` is that very file, by a hard link.
    ///
    /// # Errors
    ///
    /// [`ObjectError::Damaged`] if any of it is not what was put there; or either side does not do it.
    pub async fn fetch(
        &self,
        inventory: &Inventory,
        place: &Path,
        others: &[PathBuf],
    ) -> Result<(), ObjectError> {
        let draft = Draft::begin(place)?;
        // Digests first: they tell whether their image is here already.
        let (digests, files): (Vec<_>, Vec<_>) =
            inventory.files.iter().partition(|(name, _)| name.ends_with(DIGESTS));
        for (name, file) in digests.into_iter().chain(files) {
            let path = draft.0.join(name);
            let (target, others) = (path.clone(), others.to_vec());
            let is_linked = spawn_blocking(move || link_same(&target, &others)).await;
            if !is_linked.map_err(io::Error::other)?? {
                self.fetch_file(file, path).await?;
            }
        }
        let place = place.to_owned();
        spawn_blocking(move || draft.publish(&place)).await.map_err(io::Error::other)??;
        Ok(())
    }

    async fn fetch_file(&self, file: &StoredFile, path: PathBuf) -> Result<(), ObjectError> {
        let target = Arc::new(File::create_new(path)?);
        target.set_len(file.content.bytes)?;
        let () = stream::iter(file.content.list())
            .map(|(number, id, length)| {
                let target = Arc::clone(&target);
                async move {
                    let content = self.chunk(id, length).await?;
                    let write = move || target.file().write_all_at(&content, offset(number));
                    Ok(spawn_blocking(write).await.map_err(io::Error::other)??)
                }
            })
            .buffer_unordered(AT_ONCE)
            .try_for_each(|()| std::future::ready(Ok::<_, ObjectError>(())))
            .await?;
        let is_for_vms = file.is_for_vms;
        let finish = move || -> io::Result<()> {
            if is_for_vms {
                chown(target.path(), Some(0), Some(SNAPSHOT_GID))?;
                target.set_permissions(Permissions::from_mode(IMAGE_MODE))?;
            } else {
                target.set_permissions(Permissions::from_mode(0o600))?;
            }
            target.sync_all()
        };
        Ok(spawn_blocking(finish).await.map_err(io::Error::other)??)
    }

    /// A chunk of so many bytes.
    async fn chunk(&self, id: ChunkId, length: usize) -> Result<Bytes, ObjectError> {
        let found = self.read(&id.path(), CHUNK).await?;
        let content = found.ok_or_else(|| ObjectError::Damaged(format!("chunk {id} is missing")))?;
        let compare = move || (content.len() == length && ChunkId::of(&content) == id).then_some(content);
        let content = spawn_blocking(compare).await.map_err(io::Error::other)?;
        content.ok_or_else(|| ObjectError::Damaged(format!("chunk {id} is damaged")))
    }

    /// Reads all of a snapshot in the store and compares it with its digests. Returns how much that was, bytes.
    ///
    /// # Errors
    ///
    /// [`ObjectError::NotFound`]; [`ObjectError::Damaged`] says what is damaged; or the store does not answer.
    pub async fn verify(&self, snapshot_id: &str) -> Result<u64, ObjectError> {
        let inventory = self.inventory(snapshot_id).await?;
        let chunks: Vec<_> = inventory.files.values().flat_map(|file| file.content.list()).collect();
        stream::iter(chunks)
            .map(|(_, id, length)| async move { Ok(self.chunk(id, length).await?.len() as u64) })
            .buffer_unordered(AT_ONCE)
            .try_fold(0, |sum, bytes| std::future::ready(Ok(sum + bytes)))
            .await
    }
}

/// The directory in which a snapshot is put together. Removed with this, unless it has another name by then.
#[derive(Debug)]
struct Draft(PathBuf);

impl Draft {
    fn begin(place: &Path) -> io::Result<Self> {
        let this = Self(durable::draft_of(place));
        durable::remove(&this.0)?;
        DirBuilder::new().mode(0o700).create(&this.0)?;
        Ok(this)
    }

    fn publish(self, place: &Path) -> io::Result<()> {
        File::open(&self.0)?.sync_all()?;
        durable::rename(&self.0, place)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = durable::remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "half a snapshot stays until the next start");
        }
    }
}

/// Links the image to be at `target` from the directory that has it, whole. Its digests are there already.
fn link_same(target: &Path, others: &[PathBuf]) -> io::Result<bool> {
    let (Some(name), Ok(wanted)) = (target.file_name(), Digests::open(&digests_of(target))) else {
        return Ok(false);
    };
    for other in others.iter().map(|other| other.join(name)) {
        let is_same =
            other != digests_of(&other) && Digests::open(&digests_of(&other)).is_ok_and(|d| d == wanted);
        if is_same && File::open(&other).is_ok_and(|file| wanted.verify(file.file()).is_ok()) {
            fs::hard_link(&other, target)?;
            return Ok(true);
        }
    }
    Ok(false)
}

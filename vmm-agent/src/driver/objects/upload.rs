//! Putting a snapshot into the object store.
//!
//! ```text
//!   cut each file ─► put the chunks that are not there, or not for long any more ─► put the inventory
//!                                                                        (from here on it is there)
//! ```

use std::{
    collections::BTreeSet, fs::File, io, os::unix::fs::MetadataExt as _, path::Path, sync::Arc,
    time::SystemTime,
};

use fs_err as fs;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::ObjectStoreExt as _;
use tokio::{task::spawn_blocking, time::sleep};

use super::{
    AT_ONCE, ObjectError, Objects,
    chunk::{ChunkId, Chunks},
    chunk_lists::ChunkLists,
    inventory::{Inventory, StoredFile, is_name},
    sweep::Standing,
};
use crate::driver::{home::SNAPSHOT_GID, snapshot::Origin};

/// A snapshot of this host.
#[derive(Clone, Debug)]
pub struct Local {
    /// What it is called.
    pub snapshot_id: String,
    /// Where its files are.
    pub dir: std::path::PathBuf,
    /// What its VM was started with.
    pub origin: Origin,
    /// SHA-256 of its manifest, hex.
    pub manifest_digest: String,
}

/// What an upload has put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uploaded {
    /// Chunks that it is made of.
    pub chunks: usize,
    /// Those that were not there yet.
    pub put: usize,
}

/// A file that is cut, and stays open: whatever becomes of its name, this is what was cut.
#[derive(Debug)]
struct Cut {
    name: String,
    file: File,
    is_for_vms: bool,
    content: Chunks,
}

/// One chunk to see to.
#[derive(Clone, Debug)]
struct Piece {
    id: ChunkId,
    number: u32,
    of: Arc<Cut>,
}

impl Objects {
    /// Whether the store has this snapshot.
    ///
    /// # Errors
    ///
    /// [`ObjectError`] if it does not answer.
    pub async fn has(&self, local: &Local) -> Result<bool, ObjectError> {
        match self.inventory(&local.snapshot_id).await {
            Ok(found) => Ok(found.manifest_digest == local.manifest_digest),
            // It is put anew.
            Err(ObjectError::NotFound(_) | ObjectError::Damaged(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Puts a snapshot into the store, for as long as it `is_wanted`. May be given up at any moment, and begun again.
    ///
    /// # Errors
    ///
    /// [`ObjectError`]: it is not there then.
    pub async fn upload(
        &self,
        local: &Local,
        lists: &ChunkLists,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Uploaded, ObjectError> {
        let begun = self.clock.now();
        let cuts = {
            let (dir, lists) = (local.dir.clone(), lists.clone());
            spawn_blocking(move || cut_all(&dir, &lists)).await.map_err(io::Error::other)??
        };
        let pieces = pieces(&cuts);
        let standings: Vec<(Piece, Standing)> = stream::iter(pieces.clone())
            .map(|piece| async {
                if is_wanted() { self.see_to(piece).await } else { Err(ObjectError::Unwanted) }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        let put = standings.iter().filter(|(_, standing)| *standing == Standing::Missing).count();
        let renewed: Vec<_> =
            standings.into_iter().filter(|(_, standing)| *standing == Standing::Old).collect();
        if !renewed.is_empty() {
            // A sweep that found them old a moment ago may still remove them: see `sweep`.
            sleep(self.pace.settle).await;
            let again = renewed.into_iter().map(|(piece, _)| piece);
            let () = stream::iter(again)
                .map(|piece| self.see_to(piece))
                .buffer_unordered(AT_ONCE)
                .try_for_each(|_| std::future::ready(Ok(())))
                .await?;
        }
        // What was young enough at the beginning may not be any more.
        let within = self.pace.grace / 4;
        if self.clock.now().duration_since(begun).unwrap_or_default() > within {
            return Err(ObjectError::Late(within));
        }
        if !is_wanted() {
            return Err(ObjectError::Unwanted);
        }
        let stored = |cut: &Arc<Cut>| {
            let file = StoredFile { is_for_vms: cut.is_for_vms, content: cut.content.clone() };
            (cut.name.clone(), file)
        };
        let inventory = Inventory::new(
            local.snapshot_id.clone(),
            local.origin.clone(),
            local.manifest_digest.clone(),
            cuts.iter().map(stored).collect(),
        );
        self.store.put(&Inventory::path(&local.snapshot_id), inventory.encode()?.into()).await?;
        Ok(Uploaded { chunks: pieces.len(), put })
    }

    /// Puts a chunk unless it is there and stays for long enough. Says how it stood.
    async fn see_to(&self, piece: Piece) -> Result<(Piece, Standing), ObjectError> {
        let at = piece.id.path();
        let found = match self.store.head(&at).await {
            // One that is cut short was never whole.
            Ok(meta) if meta.size == piece.of.content.length(piece.number) as u64 => {
                Some(SystemTime::from(meta.last_modified))
            }
            Ok(_) | Err(object_store::Error::NotFound { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let standing = Standing::of(found, self.clock.now(), self.pace.grace);
        if standing != Standing::Young {
            let of = piece.clone();
            let content = spawn_blocking(move || of.read()).await.map_err(io::Error::other)??;
            self.store.put(&at, content.into()).await?;
        }
        Ok((piece, standing))
    }

    /// Removes a snapshot from the store. Its chunks are swept once no other names them. Fine if there is none.
    ///
    /// # Errors
    ///
    /// [`ObjectError`] if the store does not answer.
    pub async fn remove(&self, snapshot_id: &str) -> Result<(), ObjectError> {
        match self.store.delete(&Inventory::path(snapshot_id)).await {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            removed => Ok(removed?),
        }
    }
}

impl Piece {
    fn read(&self) -> io::Result<Vec<u8>> {
        let content = self.of.content.read(&self.of.file, self.number)?;
        match ChunkId::of(&content) == self.id {
            true => Ok(content),
            // What is remembered of an image is not what it is any more.
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "an image of the snapshot is damaged")),
        }
    }
}

/// Cuts every file of a snapshot.
fn cut_all(dir: &Path, lists: &ChunkLists) -> io::Result<Vec<Arc<Cut>>> {
    let mut cuts = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| is_name(name)) else {
            continue;
        };
        let file = fs::File::open(&path)?.into_file();
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            continue;
        }
        let content = lists.of(&path, &file)?;
        let is_for_vms = metadata.gid() == SNAPSHOT_GID;
        cuts.push(Arc::new(Cut { name: name.to_owned(), file, is_for_vms, content }));
    }
    Ok(cuts)
}

/// Every chunk once.
fn pieces(cuts: &[Arc<Cut>]) -> Vec<Piece> {
    let mut seen = BTreeSet::new();
    let all = cuts.iter().flat_map(|cut| cut.content.chunks.iter().map(move |chunk| (cut, chunk)));
    let once = all.filter(|(_, (_, id))| seen.insert(**id));
    once.map(|(of, (number, id))| Piece { id: *id, number: *number, of: Arc::clone(of) }).collect()
}

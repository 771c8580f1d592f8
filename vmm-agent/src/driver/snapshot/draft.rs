//! A snapshot in the making: what is done before the VM is paused, while it is, and after.

use std::{
    fs::{DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use fs_err::{self as fs, File, os::unix::fs::chown};

use super::{
    FORMAT, LAYER, LayerPart, MANIFEST, MEMORY, Manifest, MemoryPart, Origin, PAGES, Place, STATE, digests_of,
};
use crate::{
    backend::Circumstances,
    driver::{
        digests::{Digests, Verified},
        durable,
        held::Held,
        home::{Home, SNAPSHOT_GID},
        layer,
        pages::{GuestMemory, Pages, Run, sha256_of},
    },
    fail,
};

/// Changed memory above which a snapshot gets an image of its own, bytes. Below, copying the pages into each VM that is
/// made of it costs less than an image, and they go on sharing the one that their like share.
const REBASE_ABOVE: u64 = 16 << 20;

/// A directory that is removed with this, unless it has another name by then.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = durable::remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "an unfinished snapshot stays until the next start");
        }
    }
}

/// A snapshot in the making, under a name that nothing takes for one. Dropped before it is published, nothing of it is left.
#[derive(Debug)]
pub struct Draft {
    place: PathBuf,
    dir: Scratch,
    /// What is written over the copy of the image, or beside the image.
    memory: Option<MemoryDraft>,
    layer: Option<File>,
}

#[derive(Debug)]
struct MemoryDraft {
    state: PathBuf,
    /// An image of its own, if it gets one.
    image: Option<File>,
    runs: Vec<Run>,
    /// The first of them.
    held: Held,
    /// Whatever is not in the image.
    pages: File,
}

impl Draft {
    /// Begins a snapshot of the VM in `home`, with `memory` unless it is to be of its disk alone. The VM still runs: what
    /// takes long and can be done before it is paused is done here.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn begin(place: &Place, home: &Home, memory: Option<&GuestMemory>) -> io::Result<Self> {
        durable::remove_whole(&place.0)?;
        let dir = durable::draft_of(&place.0);
        DirBuilder::new().mode(0o700).create(&dir)?;
        let scratch = Scratch(dir.clone());
        let memory = match memory {
            None => None,
            Some(memory) => {
                let base = home.base();
                let has_base = base.try_exists()?;
                let changed: u64 = memory.own()?.iter().map(|run| run.bytes()).sum();
                let target = dir.join(MEMORY);
                let image = match has_base && changed <= REBASE_ABOVE {
                    true => {
                        fs::hard_link(&base, &target)?;
                        None
                    }
                    false => Some(new_image(&base, has_base, &target, memory.bytes)?),
                };
                let pages = File::create_new(dir.join(PAGES))?;
                Some(MemoryDraft {
                    state: home.state_to_save()?,
                    image,
                    runs: Vec::new(),
                    held: Held::reserve(changed),
                    pages,
                })
            }
        };
        Ok(Self { place: place.0.clone(), dir: scratch, memory, layer: None })
    }

    /// Where the VMM is to write the devices' state, which it does while the VM is paused.
    pub fn state(&self) -> Option<&Path> {
        self.memory.as_ref().map(|memory| memory.state.as_path())
    }

    /// Takes what can only be taken while the VM is paused: the pages of `memory`, and a copy of its disk.
    ///
    /// # Errors
    ///
    /// If the VM has ended, or the disk does not take it.
    pub fn take(&mut self, memory: Option<&GuestMemory>, layer: Option<&Path>) -> io::Result<()> {
        if let (Some(draft), Some(memory)) = (&mut self.memory, memory) {
            draft.runs = memory.own()?;
            let left = draft.held.take(memory, &draft.runs)?;
            match &draft.image {
                Some(image) => memory.save_over(left, image.file())?,
                // Behind those that are held, which come first.
                None => {
                    let held: u64 = draft.held.bytes();
                    io::Seek::seek(&mut draft.pages.file(), io::SeekFrom::Start(held))?;
                    memory.save(left, draft.pages.file())?;
                }
            }
        }
        if let Some(layer) = layer {
            let path = self.dir.0.join(LAYER);
            self.layer = Some(File::from_parts(layer::copy(layer, &path)?, path));
        }
        Ok(())
    }

    /// Publishes it. It is on disk then, as a whole, unless it is for use at once. The VM may go on meanwhile.
    ///
    /// # Errors
    ///
    /// If the disk does not take it; then there is none.
    pub fn publish(
        self,
        home: &Home,
        circumstances: Circumstances,
        verified: &Verified,
    ) -> io::Result<Manifest> {
        let is_kept = !circumstances.is_ephemeral;
        let memory = match self.memory {
            Some(draft) => Some(draft.finish(home, &self.dir.0, is_kept, verified)?),
            None => None,
        };
        let layer = match self.layer {
            Some(layer) => {
                let mut digest = None;
                if is_kept {
                    layer.sync_all()?;
                    let digests = Digests::of(layer.file())?;
                    digests.write(&digests_of(layer.path()))?;
                    verified.note(layer.file())?;
                    digest = Some(digests.root());
                }
                // st_blocks is in units of 512 bytes (stat(2)).
                Some(LayerPart { digest, allocated_bytes: layer.metadata()?.blocks() * 512 })
            }
            None => None,
        };
        let manifest = Manifest { format: FORMAT, origin: Origin::read(home)?, circumstances, memory, layer };
        let text = serde_json::to_vec(&manifest)?;
        fail::pass(fail::SNAPSHOT_FILLED, home.vm())?;
        let path = self.dir.0.join(MANIFEST);
        match is_kept {
            true => durable::write(&path, 0o600, |file| io::Write::write_all(file, &text))?,
            false => fs::write(&path, &text)?,
        }
        fail::pass(fail::SNAPSHOT_MANIFEST, home.vm())?;
        let named = match is_kept {
            true => durable::rename(&self.dir.0, &self.place),
            false => fs::rename(&self.dir.0, &self.place),
        };
        if let Err(error) = named.and_then(|()| Ok(fail::pass(fail::SNAPSHOT_RENAMED, home.vm())?)) {
            // It may have its name: whoever is told that there is none must not find it later.
            durable::remove_whole(&self.place)?;
            return Err(error);
        }
        Ok(manifest)
    }
}

impl MemoryDraft {
    fn finish(self, home: &Home, dir: &Path, is_kept: bool, verified: &Verified) -> io::Result<MemoryPart> {
        let state_path = dir.join(STATE);
        fs::rename(&self.state, &state_path)?;
        chown(&state_path, Some(0), Some(0))?;
        let changed_bytes = self.runs.iter().map(|run| run.bytes()).sum();
        let image_path = dir.join(MEMORY);
        match &self.image {
            Some(image) => self.held.save_over(image.file())?,
            None => self.held.save(self.pages.file())?,
        }
        if let Some(image) = &self.image {
            chown(&image_path, Some(0), Some(SNAPSHOT_GID))?;
            image.set_permissions(Permissions::from_mode(0o440))?;
        }
        let (mut image_digest, mut pages_sha256, mut state_sha256) = (None, None, None);
        let state = File::open(&state_path)?;
        let state_bytes = state.metadata()?.len();
        if is_kept {
            let image = File::open(&image_path)?;
            // Those of what the VM maps are there unless that was for use at once.
            let base = Digests::open(&digests_of(&home.base())).ok();
            let digests = match (base, &self.image) {
                (Some(base), None) => base,
                (Some(base), Some(_)) => base.with(image.file(), &self.runs)?,
                (None, _) => Digests::of(image.file())?,
            };
            image.sync_all()?;
            digests.write(&digests_of(&image_path))?;
            if self.image.is_some() {
                verified.note(image.file())?;
            }
            image_digest = Some(digests.root());
            self.pages.sync_all()?;
            pages_sha256 = Some(sha256_of(&mut File::open(dir.join(PAGES))?.into_file())?);
            state.sync_all()?;
            state_sha256 = Some(sha256_of(&mut state.into_file())?);
        }
        // What is in the image is not in the file of pages.
        let runs = if self.image.is_some() { Vec::new() } else { self.runs };
        let pages = Pages { runs, sha256: pages_sha256 };
        Ok(MemoryPart { image_digest, pages, state_sha256, state_bytes, changed_bytes })
    }
}

/// An image of a memory of `bytes`, with what is in `base`, to be written to.
fn new_image(base: &Path, has_base: bool, target: &Path, bytes: u64) -> io::Result<File> {
    if has_base {
        return Ok(File::from_parts(layer::copy(base, target)?, target));
    }
    let file = File::create_new(target)?;
    file.set_len(bytes)?;
    Ok(file)
}

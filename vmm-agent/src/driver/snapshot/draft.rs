//! A snapshot in the making: what is done before the VM is paused, while it is, and after.

mod disk;
mod memory;

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use fs_err::{self as fs, File};

pub(super) use self::disk::LayerDraft;
use self::memory::MemoryDraft;
use super::{FORMAT, LAYER, MANIFEST, Manifest, Origin, Place};
use crate::{
    backend::Circumstances,
    driver::{
        digests::Verified,
        durable,
        home::Home,
        layer,
        pages::GuestMemory,
        vmm::{Extent, SavedMemory},
    },
    fail,
};

/// A directory that is removed with this, unless it has another name by then.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn of(dir: PathBuf) -> Self {
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = durable::remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "an unfinished snapshot stays until the next start");
        }
    }
}

/// Where the memory of a VM comes from that is captured.
#[derive(Clone, Debug)]
pub enum Source {
    /// It is read from its process.
    Process(GuestMemory),
    /// Its VMM writes it.
    Vmm {
        /// How much there is of it.
        bytes: u64,
    },
}

/// What a VMM writes of a VM that is captured, while that is paused.
#[derive(Debug)]
pub struct Saving {
    /// Where the devices' state goes.
    pub state: PathBuf,
    memory: Option<(PathBuf, Extent)>,
}

impl Saving {
    /// Where its memory goes, if the VMM writes that.
    pub fn memory(&self) -> Option<SavedMemory<'_>> {
        self.memory.as_ref().map(|(file, extent)| SavedMemory { file, extent: *extent })
    }
}

/// A snapshot in the making, under a name that nothing takes for one. Dropped before it is published, nothing of it is left.
#[derive(Debug)]
pub struct Draft {
    place: PathBuf,
    dir: Scratch,
    memory: Option<MemoryDraft>,
    layer: Option<LayerDraft>,
}

impl Draft {
    /// Begins a snapshot of the VM in `home`, with `memory` unless it is to be of its disk alone, and with its disk `layer`
    /// unless that is not to be in it. The VM still runs: what takes long and can be done before it is paused is done here.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn begin(
        place: &Place,
        home: &Home,
        memory: Option<&Source>,
        layer: Option<&Path>,
    ) -> io::Result<Self> {
        durable::remove_whole(&place.0)?;
        let dir = durable::draft_of(&place.0);
        DirBuilder::new().mode(0o700).create(&dir)?;
        let scratch = Scratch(dir.clone());
        let memory = memory.map(|memory| MemoryDraft::begin(&dir, home, memory)).transpose()?;
        layer.map_or(Ok(()), layer::write_back)?;
        Ok(Self { place: place.0.clone(), dir: scratch, memory, layer: None })
    }

    /// What the VMM is to write, while the VM is paused; nothing of a snapshot without memory. It must be told once.
    ///
    /// # Errors
    ///
    /// If the disk does not take it: then it must not be told.
    pub fn saving(&mut self) -> io::Result<Option<Saving>> {
        self.memory.as_mut().map(MemoryDraft::saving).transpose()
    }

    /// Takes what can only be taken while the VM is paused: the pages of `memory`, and a copy of its disk.
    ///
    /// # Errors
    ///
    /// If the VM has ended, or the disk does not take it.
    pub fn take(&mut self, memory: Option<&Source>, layer: Option<&Path>) -> io::Result<()> {
        if let (Some(draft), Some(Source::Process(memory))) = (&mut self.memory, memory) {
            draft.take(memory)?;
        }
        if let Some(layer) = layer {
            let path = self.dir.0.join(LAYER);
            let (copy, is_shared) = layer::copy_or_share(layer, &path)?;
            self.layer = Some(LayerDraft { copy: File::from_parts(copy, path), is_shared });
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
            Some(draft) => Some(draft.finish(&self.dir.0, is_kept, verified)?),
            None => None,
        };
        let layer = match self.layer {
            Some(layer) => Some(layer.finish(home, is_kept, verified)?),
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

#[cfg(test)]
mod tests;

//! Memory and devices of a snapshot in the making.

use std::{
    fs::Permissions,
    io::{self, BufWriter, Write as _},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use fs_err::{self as fs, File, os::unix::fs::chown};
use tracing::debug;

use super::{Saving, Source};
use crate::driver::{
    digests::{Digests, Verified},
    durable, extents,
    held::Held,
    home::{Home, IMAGE_MODE, SNAPSHOT_GID},
    layer,
    pagemap_scan::Wanted,
    pages::{GuestMemory, Pages, Run, sha256_of},
    previous::{Changed, Foundation},
    runs,
    snapshot::{MEMORY, MemoryPart, PAGES, STATE, digests_of},
    vmm::Extent,
};

/// Changed memory above which a snapshot gets an image of its own, bytes. Below, copying the pages into each VM that is
/// made of it costs less than an image, and they go on sharing the one that their like share.
const REBASE_ABOVE: u64 = 16 << 20;
/// Pages that are written in the pause, for which there is no room in memory.
const SPILL: &str = "spill.bin";
/// Bytes that are written at a time.
const PIECE: usize = 1 << 20;

/// Memory and devices in the making.
#[derive(Debug)]
pub struct MemoryDraft {
    /// Where the VMM writes the devices' state.
    state: PathBuf,
    home: Home,
    foundation: Foundation,
    /// How much of the memory the VMM writes into the image, if it does.
    saved: Option<Extent>,
    /// Whether the kernel remembers which pages are written.
    is_remembered: bool,
    /// An image of its own, if it gets one: all of the foundation is in it.
    image: Option<File>,
    /// The pages that are not in the foundation, or are others there.
    runs: Vec<Run>,
    /// The first of them.
    held: Held,
    /// The rest of them, unless they are in an image.
    spill: File,
}

impl MemoryDraft {
    /// Begins in `dir`. The VM runs.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn begin(dir: &Path, home: &Home, source: &Source) -> io::Result<Self> {
        match source {
            Source::Process(memory) => Self::to_be_read(dir, home, memory),
            Source::Vmm { bytes } => Self::to_be_saved(dir, home, *bytes),
        }
    }

    /// Begins one whose memory its VMM writes over a copy of the foundation.
    fn to_be_saved(dir: &Path, home: &Home, bytes: u64) -> io::Result<Self> {
        let (foundation, extent) = Foundation::of_saved(home)?;
        let image = new_image(&foundation, &dir.join(MEMORY), bytes)?;
        image.set_permissions(Permissions::from_mode(0o600))?;
        home.give(image.file())?;
        Ok(Self {
            state: home.state_to_save()?,
            home: home.clone(),
            foundation,
            saved: Some(extent),
            is_remembered: false,
            image: Some(image),
            runs: Vec::new(),
            held: Held::reserve(0),
            spill: spill(dir)?,
        })
    }

    /// Begins one whose memory is read from its process.
    fn to_be_read(dir: &Path, home: &Home, memory: &GuestMemory) -> io::Result<Self> {
        let written = memory.remember_writes().and_then(|()| memory.look(Wanted::Written));
        if let Err(error) = &written {
            debug!(%error, "a capture takes all that was changed");
        }
        let is_remembered = written.is_ok();
        let mut foundation = Foundation::of(home, is_remembered)?;
        let changed = match (written, foundation.wanted()) {
            (Ok(written), Wanted::Written) => runs::union(&written, &foundation.pending),
            _ => memory.own()?,
        };
        let target = dir.join(MEMORY);
        let beside = runs::bytes(&runs::union(&foundation.pages.runs, &changed));
        let image = match &foundation.image {
            Some(image) if beside <= REBASE_ABOVE => {
                fs::hard_link(image, &target)?;
                None
            }
            _ => {
                let image = new_image(&foundation, &target, memory.bytes);
                Some(image.inspect_err(|error| distrust_if_damaged(&mut foundation, error))?)
            }
        };
        Ok(Self {
            state: home.state_to_save()?,
            home: home.clone(),
            foundation,
            saved: None,
            is_remembered,
            image,
            runs: Vec::new(),
            held: Held::reserve(runs::bytes(&changed)),
            spill: spill(dir)?,
        })
    }

    /// What the VMM is to write.
    ///
    /// # Errors
    ///
    /// If the disk does not take that it is told.
    pub fn saving(&mut self) -> io::Result<Saving> {
        let memory = match (self.saved, &self.image) {
            (Some(extent), Some(image)) => {
                // It tells each change once. Should this one not be kept, the next is of everything.
                self.home.note_account_closed()?;
                self.foundation.close_account()?;
                Some((image.path().to_owned(), extent))
            }
            _ => None,
        };
        Ok(Saving { state: self.state.clone(), memory })
    }

    /// Takes the pages of `memory`, while the VM is paused.
    ///
    /// # Errors
    ///
    /// If the VM has ended, or the disk does not take it.
    pub fn take(&mut self, memory: &GuestMemory) -> io::Result<()> {
        if self.is_remembered {
            self.foundation.close_account()?;
            let written = memory.take_account(self.foundation.wanted())?;
            self.runs = runs::union(&written, &self.foundation.pending);
            self.foundation.taken(&self.runs);
        } else {
            self.runs = memory.own()?;
        }
        let left = self.held.take(memory, &self.runs)?;
        match &self.image {
            Some(image) => memory.save_over(left, image.file()),
            None => memory.save(left, self.spill.file()),
        }
    }

    /// Finishes it in `dir`; if it `is_kept` it is on disk then, with its digests. The VM runs again.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn finish(mut self, dir: &Path, is_kept: bool, verified: &Verified) -> io::Result<MemoryPart> {
        let state_path = dir.join(STATE);
        fs::rename(&self.state, &state_path)?;
        chown(&state_path, Some(0), Some(0))?;
        let (image_path, pages_path) = (dir.join(MEMORY), dir.join(PAGES));
        if let (Some(_), Some(image)) = (self.saved, &self.image) {
            let before = self.foundation.image.as_ref().map(File::open).transpose()?;
            self.runs = extents::differing(before.as_ref().map(File::file), image.file())?;
            self.foundation.taken(&self.runs);
        }
        let mut pages = Pages::default();
        let mut pages_file = File::create_new(&pages_path)?;
        match &self.image {
            Some(image) => {
                self.held.save_over(image.file())?;
                chown(&image_path, Some(0), Some(SNAPSHOT_GID))?;
                image.set_permissions(Permissions::from_mode(IMAGE_MODE))?;
            }
            None => {
                let written = self.write_pages(&mut pages_file);
                pages.runs = written.inspect_err(|error| distrust_if_damaged(&mut self.foundation, error))?;
            }
        }
        durable::remove(&dir.join(SPILL))?;
        let changed = self.changed(is_kept);
        let changed_bytes = runs::bytes(&runs::union(&self.foundation.unkept, &self.runs));
        let (mut image_digest, mut state_sha256) = (None, None);
        let mut digested = self.foundation.digests.clone();
        let state = File::open(&state_path)?;
        let state_bytes = state.metadata()?.len();
        if is_kept {
            let image = File::open(&image_path)?;
            let digests = self.digests(image.file())?;
            image.sync_all()?;
            let path = digests_of(&image_path);
            digests.write(&path)?;
            if self.image.is_some() || !self.foundation.undigested.is_empty() {
                verified.note(image.file())?;
            }
            image_digest = Some(digests.root());
            digested = Some(path);
            pages_file.sync_all()?;
            pages.sha256 = Some(sha256_of(&mut File::open(&pages_path)?.into_file())?);
            state.sync_all()?;
            state_sha256 = Some(sha256_of(&mut state.into_file())?);
        }
        self.foundation.settle(dir, &pages, digested.as_deref(), changed);
        Ok(MemoryPart { image_digest, pages, state_sha256, state_bytes, changed_bytes })
    }

    /// Writes the pages of the foundation with those that were taken over them to `file`, in order. Returns which they are.
    fn write_pages(&self, file: &mut File) -> io::Result<Vec<Run>> {
        let before = match &self.foundation.pages_file {
            Some(path) => Some(File::open(path)?.into_file()),
            None => None,
        };
        if let (Some(before), Some(expected)) = (&before, &self.foundation.pages.sha256)
            && sha256_of(&mut before.try_clone()?)? != *expected
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the pages of the capture before are damaged",
            ));
        }
        let pieces = runs::overlay(&self.foundation.pages.runs, &self.runs);
        let mut file = BufWriter::with_capacity(PIECE, file);
        let mut buffer = Vec::new();
        for piece in &pieces {
            let bytes = piece.run.bytes();
            if piece.is_upper
                && let Some(part) = self.held.part(piece.offset, bytes)
            {
                file.write_all(part)?;
                continue;
            }
            // At most the pages of a snapshot that has no image of its own.
            buffer.resize(bytes as usize, 0);
            match (&before, piece.is_upper) {
                (Some(before), false) => before.read_exact_at(&mut buffer, piece.offset)?,
                _ => self.spill.file().read_exact_at(&mut buffer, piece.offset - self.held.bytes())?,
            }
            file.write_all(&buffer)?;
        }
        file.flush()?;
        Ok(runs::join(pieces.iter().map(|piece| piece.run)))
    }

    /// The digests of `image`.
    fn digests(&self, image: &std::fs::File) -> io::Result<Digests> {
        match self.foundation.digests.as_deref().map(Digests::open) {
            Some(Ok(before)) => before.with(image, &self.undigested()),
            _ => Digests::of(image),
        }
    }

    /// The pages in which the image differs from what the digests of the foundation are of.
    fn undigested(&self) -> Vec<Run> {
        let foundation = &self.foundation;
        match &self.image {
            Some(_) => runs::union(&runs::union(&foundation.undigested, &foundation.pages.runs), &self.runs),
            None => foundation.undigested.clone(),
        }
    }

    fn changed(&self, is_kept: bool) -> Changed {
        match is_kept {
            true => Changed::default(),
            false => Changed {
                undigested: self.undigested(),
                unkept: runs::union(&self.foundation.unkept, &self.runs),
            },
        }
    }
}

/// A file for the pages for which there is no room in memory.
fn spill(dir: &Path) -> io::Result<File> {
    fs::OpenOptions::new().read(true).write(true).create_new(true).open(dir.join(SPILL))
}

fn distrust_if_damaged(foundation: &mut Foundation, error: &io::Error) {
    if error.kind() == io::ErrorKind::InvalidData {
        foundation.distrust();
    }
}

/// An image of a memory of `bytes`, with all that is in the foundation, to be written to.
fn new_image(foundation: &Foundation, target: &Path, bytes: u64) -> io::Result<File> {
    let image = match &foundation.image {
        Some(image) => File::from_parts(layer::copy(image, target)?, target),
        None => {
            let file = File::create_new(target)?;
            file.set_len(bytes)?;
            file
        }
    };
    if let Some(path) = &foundation.pages_file {
        foundation.pages.lay_over(&mut File::open(path)?.into_file(), image.file())?;
    }
    Ok(image)
}

//! A VM that is stored: what its memory and devices were, beside its disk, in its home.
//!
//! ```text
//!   home/layer.img      its disk, which stays where it is
//!   home/base.img       the golden memory that it is a clone of: a hard link, so that it is kept as long as it is needed
//!   home/origin.json    what it was started with
//!   home/stored/        memory and devices: there as a whole, or not at all
//!     pages.bin           the pages of base.img that it had changed
//!     state.bin           its devices
//!     manifest.json       what both are, by digest
//! ```
//!
//! Memory and disk are of one instant, and what is stored is only good for the disk that it was stored with: whoever lets
//! the VM go on writes that down first, and then removes it.

use std::{
    fs::{DirBuilder, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::PathBuf,
};

use fs_err::{self as fs, File, os::unix::fs::chown};
use serde::{Deserialize, Serialize};

use super::{
    durable,
    home::Home,
    pages::{GuestMemory, Pages, sha256_of},
    parts::Bootable,
};
use crate::microvm::Kind;

const ORIGIN: &str = "origin.json";
const STORED: &str = "stored";
const PAGES: &str = "pages.bin";
const STATE: &str = "state.bin";
const MANIFEST: &str = "manifest.json";
/// The format of what is stored: another version of ours does not guess.
const FORMAT: u32 = 1;

/// What a VM was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// All that its memory depends on: VMM, CPU, kernel, first process, base image.
    pub snapshot_key: String,
    /// The base image of its disk.
    pub template_digest: String,
    /// Virtual CPUs.
    pub cpu_count: u32,
    /// Memory, MiB.
    pub memory_mb: u32,
}

impl Origin {
    /// Of a VM of `kind` that is started now.
    pub fn of(bootable: &Bootable, kind: &Kind) -> Self {
        Self {
            snapshot_key: bootable.snapshot_key.clone(),
            template_digest: bootable.template.digest.clone(),
            cpu_count: kind.cpu_count,
            memory_mb: kind.memory_mb,
        }
    }

    /// Writes it down in `home`. It is as durable as the VM that runs.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn write(&self, home: &Home) -> io::Result<()> {
        fs::write(home.dir().join(ORIGIN), serde_json::to_vec(self)?)
    }

    /// Reads what was written down in `home`.
    ///
    /// # Errors
    ///
    /// If there is nothing, or it cannot be read.
    pub fn read(home: &Home) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(home.dir().join(ORIGIN))?)?)
    }
}

/// What is stored.
#[derive(Debug, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// What the VM was started with.
    pub origin: Origin,
    /// Whether its memory is of pages over `base.img`, or all that it has.
    pub has_base: bool,
    /// Whether the guest had written everything back to its disk.
    pub is_quiet: bool,
    pages: Pages,
    state_sha256: String,
    state_bytes: u64,
}

impl Manifest {
    /// What it takes on disk, bytes.
    pub fn bytes(&self) -> u64 {
        self.pages.bytes() + self.state_bytes
    }
}

/// What is being stored, under a name that nothing takes for what is stored.
#[derive(Debug)]
pub struct Draft {
    dir: PathBuf,
}

impl Draft {
    /// Begins to store the VM in `home`, with an empty file for its devices.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn begin(home: &Home) -> io::Result<Self> {
        // What may be stored of it is of a moment that is past, and an unfinished draft goes with it.
        durable::remove_whole(&place(home))?;
        let dir = durable::draft_of(&place(home));
        DirBuilder::new().mode(0o700).create(&dir)?;
        // The VM's user comes in by its group, and can change nothing but its file.
        chown(&dir, Some(0), Some(home.uid()))?;
        fs::set_permissions(&dir, Permissions::from_mode(0o710))?;
        let draft = Self { dir };
        let state = File::create_new(draft.state())?;
        state.set_permissions(Permissions::from_mode(0o600))?;
        chown(draft.state(), Some(home.uid()), Some(home.uid()))?;
        Ok(draft)
    }

    /// The file for the devices' state.
    pub fn state(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// Adds the memory of the paused VM, and publishes all of it. It is on disk then.
    ///
    /// # Errors
    ///
    /// If the VM has ended or the disk does not take it; then nothing is stored.
    pub fn publish(self, home: &Home, memory: &GuestMemory, is_quiet: bool) -> io::Result<Manifest> {
        let mut file = File::create_new(self.dir.join(PAGES))?.into_file();
        let pages = memory.save(&mut file)?;
        file.sync_all()?;
        let mut state = File::open(self.state())?.into_file();
        let state_sha256 = sha256_of(&mut state)?;
        state.sync_all()?;
        let manifest = Manifest {
            format: FORMAT,
            origin: Origin::read(home)?,
            has_base: home.base().try_exists()?,
            is_quiet,
            pages,
            state_sha256,
            state_bytes: state.metadata()?.len(),
        };
        let text = serde_json::to_vec(&manifest)?;
        durable::write(&self.dir.join(MANIFEST), 0o600, |file| io::Write::write_all(file, &text))?;
        durable::rename(&self.dir, &place(home))?;
        Ok(manifest)
    }
}

/// What is stored in `home`. `None` if nothing is.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidData`] if it is not what was stored, or not of this format.
pub fn read(home: &Home) -> io::Result<Option<Manifest>> {
    let dir = place(home);
    let text = match fs::read(dir.join(MANIFEST)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let damaged = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| damaged(format!("its manifest is damaged: {error}")))?;
    if manifest.format != FORMAT {
        return Err(damaged(format!("it is of format {}", manifest.format)));
    }
    if manifest.has_base && !home.base().is_file() {
        return Err(damaged("the memory that it is a clone of is gone".to_owned()));
    }
    let digest = File::open(dir.join(STATE)).and_then(|state| sha256_of(&mut state.into_file()));
    match digest {
        Ok(digest) if digest == manifest.state_sha256 => Ok(Some(manifest)),
        Ok(_) => Err(damaged("its devices' state is damaged".to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged(error.to_string())),
        Err(error) => Err(error),
    }
}

/// The file with the state of the devices.
pub fn state(home: &Home) -> PathBuf {
    place(home).join(STATE)
}

/// Puts the stored pages into the memory of a VM that has not gone on yet.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidData`] if they are not what was stored.
pub fn load(home: &Home, manifest: &Manifest, memory: &GuestMemory) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).open(place(home).join(PAGES)).map_err(|error| {
        // A part of what is stored is missing: that is damage, too.
        io::Error::new(io::ErrorKind::InvalidData, format!("its pages cannot be read: {error}"))
    })?;
    memory.load(&mut file, &manifest.pages)
}

/// Removes what is stored, half-written drafts too; the disk stays.
///
/// # Errors
///
/// If it resists.
pub fn remove(home: &Home) -> io::Result<()> {
    durable::remove_whole(&place(home))?;
    File::open(home.dir())?.sync_all()
}

fn place(home: &Home) -> PathBuf {
    home.dir().join(STORED)
}

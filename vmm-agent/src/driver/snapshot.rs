//! The state of a VM at one moment, in a directory of its own: there as a whole, or not at all.
//!
//! ```text
//!   memory.img        the memory that what is restored maps: nobody writes to it, all who map it share it
//!   memory.digests      its digests
//!   pages.bin         the pages that differ from it
//!   state.bin         the devices
//!   layer.img         the disk; that of a hibernated VM stays where it is, in its home
//!   layer.digests       its digests
//!   manifest.json     what belongs to it, by digest, and what it was taken of; written last
//! ```
//!
//! While a VM has changed little, `memory.img` is the very image that it maps itself, by another name, and what it changed
//! is in `pages.bin`. Of one that has changed more than 16 MiB, `memory.img` is an image of its own: a copy of
//! the one that it maps, sharing its blocks where the filesystem can, with the changes written over it. So what many
//! make of it is in memory once, and what follows begins with no changes again.
//!
//! One that is taken of a VM that was captured before is laid over the one before in the same way ([`super::previous`]):
//! over its image, with the pages beside it and those that were written since.
//!
//! A hibernated VM's is good for the disk that it was taken with and no other: whoever lets the VM go on writes that down
//! first, and then removes it.

mod draft;
pub mod shelved;

use std::{
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
};

use fs_err::{self as fs, File};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use self::draft::{Draft, Source};
use super::{
    digests::{Digests, Verified},
    durable,
    home::Home,
    pages::{GuestMemory, Pages, Run, sha256_of},
    parts::Bootable,
    vmm::Vmm,
};
use crate::{backend::Circumstances, microvm::Kind};

const ORIGIN: &str = "origin.json";
const MEMORY: &str = "memory.img";
const PAGES: &str = "pages.bin";
const STATE: &str = "state.bin";
const LAYER: &str = "layer.img";
const MANIFEST: &str = "manifest.json";
/// The format of a snapshot: another version of ours does not guess.
const FORMAT: u32 = 2;

/// What a VM was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// All that its memory depends on: VMM, CPU, kernel, first process, base image.
    pub snapshot_key: String,
    /// Its template.
    pub template: String,
    /// The base image of its disk: the template's, of this digest.
    pub template_digest: String,
    /// Virtual CPUs.
    pub cpu_count: u32,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// The VMM.
    pub vmm: String,
    /// The host's processor.
    pub processor: String,
    /// The initramfs, with the first process in it, by digest.
    pub initramfs_digest: String,
    /// The format of the VMM's snapshots, if they have one that is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_format: Option<String>,
    /// The release of the host's kernel, if a snapshot depends on that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_kernel: Option<String>,
}

impl Origin {
    /// Of a VM of `kind` that is started now, by `vmm`.
    pub fn of(bootable: &Bootable, kind: &Kind, vmm: &dyn Vmm, processor: &str) -> Self {
        Self {
            snapshot_key: bootable.snapshot_key.clone(),
            template: bootable.template.name.clone(),
            template_digest: bootable.template.digest.clone(),
            cpu_count: kind.cpu_count,
            memory_mb: kind.memory_mb,
            vmm: vmm.version().to_owned(),
            processor: processor.to_owned(),
            initramfs_digest: bootable.initramfs.digest.clone(),
            snapshot_format: vmm.snapshot_format().map(ToOwned::to_owned),
            host_kernel: vmm.host_kernel().map(ToOwned::to_owned),
        }
    }

    /// Writes it down in `home`: what is started there is of it.
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

/// Memory and devices of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct MemoryPart {
    /// Root of the digests of `memory.img`; `None` of one for use at once.
    image_digest: Option<String>,
    pages: Pages,
    /// SHA-256 of `state.bin`.
    state_sha256: Option<String>,
    state_bytes: u64,
    /// What the VM had changed since the snapshot before, or of what it maps where that is not known.
    changed_bytes: u64,
}

/// The disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LayerPart {
    /// Root of its digests; `None` of one for use at once.
    digest: Option<String>,
    /// What it takes, bytes.
    allocated_bytes: u64,
}

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// What the VM was started with.
    pub origin: Origin,
    /// How it was taken.
    pub circumstances: Circumstances,
    memory: Option<MemoryPart>,
    layer: Option<LayerPart>,
}

impl Manifest {
    /// Whether memory and devices are in it.
    pub fn has_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// What the VM had changed of its memory since the snapshot before that was to be kept, or since it was started, bytes.
    pub fn memory_changed_bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.changed_bytes)
    }

    /// The pages beside the image, bytes.
    pub fn pages_bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.pages.bytes())
    }

    /// What its disk takes, bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.layer.as_ref().map_or(0, |layer| layer.allocated_bytes)
    }

    /// What it takes beside what it is laid over, bytes.
    pub fn bytes(&self) -> u64 {
        let memory = self.memory.as_ref().map_or(0, |memory| {
            // What changed is in the image, or among the pages.
            memory.state_bytes + memory.changed_bytes.max(memory.pages.bytes())
        });
        memory + self.disk_bytes()
    }
}

/// Where a snapshot is, if there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(PathBuf);

impl Place {
    /// In the directory `dir`.
    pub fn at(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Of the VM in `home` while it is hibernated.
    pub fn stored(home: &Home) -> Self {
        Self(home.dir().join("stored"))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// The image of the memory.
    pub fn memory(&self) -> PathBuf {
        self.0.join(MEMORY)
    }

    /// The disk.
    pub fn layer(&self) -> PathBuf {
        self.0.join(LAYER)
    }

    /// Reads what is here, and sees that the devices' state is what it was. `None` if nothing is here.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if it is damaged, or not of this format.
    pub fn read(&self) -> io::Result<Option<Manifest>> {
        Ok(self.read_with_digest()?.map(|(manifest, _)| manifest))
    }

    /// As [`Place::read`], with the SHA-256 of the manifest, hex.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn read_with_digest(&self) -> io::Result<Option<(Manifest, String)>> {
        let text = match fs::read(self.0.join(MANIFEST)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| damaged(format!("its manifest is damaged: {error}")))?;
        if manifest.format != FORMAT {
            return Err(damaged(format!("it is of format {}", manifest.format)));
        }
        if let Some(MemoryPart { state_sha256: Some(expected), .. }) = &manifest.memory {
            let digest = missing_is_damage(File::open(self.0.join(STATE)))
                .and_then(|state| sha256_of(&mut state.into_file()))?;
            if digest != *expected {
                return Err(damaged("its devices' state is damaged".to_owned()));
            }
        }
        Ok(Some((manifest, hex::encode(Sha256::digest(&text)))))
    }

    /// Sees that the image of the memory is what it was, reading it unless it is known.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if it is not.
    pub fn verify_memory(&self, manifest: &Manifest, verified: &Verified) -> io::Result<u64> {
        let expected = manifest.memory.as_ref().and_then(|memory| memory.image_digest.as_deref());
        verify(&self.memory(), expected, verified)
    }

    /// Sees that the disk is what it was, reading it unless it is known.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if it is not.
    pub fn verify_layer(&self, manifest: &Manifest, verified: &Verified) -> io::Result<u64> {
        let expected = manifest.layer.as_ref().and_then(|layer| layer.digest.as_deref());
        if manifest.layer.is_none() {
            return Err(damaged("it has no disk".to_owned()));
        }
        verify(&self.layer(), expected, verified)
    }

    /// Reads all that is here and compares it with its digests. Returns how much that was, bytes.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] says what is damaged.
    pub fn verify_all(&self) -> io::Result<u64> {
        let manifest = self.read()?.ok_or_else(|| damaged("it has no manifest".to_owned()))?;
        // Nothing is taken for known.
        let verified = Verified::default();
        let mut bytes = 0;
        if let Some(memory) = &manifest.memory {
            bytes += memory.state_bytes + memory.pages.bytes();
            bytes += self.verify_memory(&manifest, &verified)?;
            let mut pages = missing_is_damage(File::open(self.0.join(PAGES)))?.into_file();
            let digest = sha256_of(&mut pages)?;
            if memory.pages.sha256.as_ref().is_some_and(|expected| *expected != digest) {
                return Err(damaged("its pages are damaged".to_owned()));
            }
        }
        if manifest.layer.is_some() {
            bytes += self.verify_layer(&manifest, &verified)?;
        }
        Ok(bytes)
    }

    /// Copies the devices' state to the new file `to`.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn copy_state(&self, to: &File) -> io::Result<()> {
        io::copy(&mut File::open(self.0.join(STATE))?, &mut to.file()).map(drop)
    }

    /// The devices' state.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn read_state(&self) -> io::Result<Vec<u8>> {
        fs::read(self.0.join(STATE))
    }

    /// The pages that differ from the image, of a memory of `memory_bytes`: their runs, and their bytes one after the other.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if they are not what was taken.
    pub fn read_pages(&self, manifest: &Manifest, memory_bytes: u64) -> io::Result<(Vec<Run>, Vec<u8>)> {
        let Some(part) = &manifest.memory else { return Err(damaged("it has no memory".to_owned())) };
        let bytes = missing_is_damage(fs::read(self.0.join(PAGES)))?;
        let is_whole = part.pages.fit(memory_bytes)
            && bytes.len() as u64 == part.pages.bytes()
            && part
                .pages
                .sha256
                .as_ref()
                .is_none_or(|expected| *expected == hex::encode(Sha256::digest(&bytes)));
        if !is_whole {
            return Err(damaged("its pages are damaged".to_owned()));
        }
        Ok((part.pages.runs.clone(), bytes))
    }

    /// Puts the pages that differ into the memory of a VM that has not gone on yet.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if they are not what was taken.
    pub fn load_pages(&self, manifest: &Manifest, memory: &GuestMemory) -> io::Result<()> {
        let Some(part) = &manifest.memory else { return Err(damaged("it has no memory".to_owned())) };
        let mut file = missing_is_damage(OpenOptions::new().read(true).open(self.0.join(PAGES)))?;
        memory.load(&mut file, &part.pages)
    }

    /// Removes what is here, drafts too.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn remove(&self) -> io::Result<()> {
        durable::remove_whole(&self.0)?;
        self.0.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
    }
}

fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// That a part is missing is damage, too.
fn missing_is_damage<T>(opened: io::Result<T>) -> io::Result<T> {
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => damaged(format!("a part of it is missing: {error}")),
        _ => error,
    })
}

/// Compares a file with its digests, whose root is `expected`, unless it is known. Returns what was read.
fn verify(path: &Path, expected: Option<&str>, verified: &Verified) -> io::Result<u64> {
    let Some(expected) = expected else { return Ok(0) };
    let file = missing_is_damage(File::open(path))?.into_file();
    let digests = missing_is_damage(Digests::open(&digests_of(path)))?;
    if digests.root() != expected {
        return Err(damaged(format!("{} has digests of another", path.display())));
    }
    if verified.knows(&file)? {
        return Ok(0);
    }
    digests.verify(&file)?;
    verified.note(&file)?;
    Ok(digests.read_bytes())
}

/// Where the digests of an image are.
pub fn digests_of(image: &Path) -> PathBuf {
    image.with_extension("digests")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_that_is_missing_is_nothing_and_a_damaged_one_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::at(dir.path().join("snapshot"));
        assert!(place.read().unwrap().is_none());
        std::fs::create_dir(dir.path().join("snapshot")).unwrap();
        for text in ["", "{", r#"{"format": 1}"#] {
            std::fs::write(dir.path().join("snapshot/manifest.json"), text).unwrap();
            assert_eq!(place.read().unwrap_err().kind(), io::ErrorKind::InvalidData, "{text}");
        }
        place.remove().unwrap();
        assert!(place.read().unwrap().is_none());
        place.remove().unwrap();
    }
}

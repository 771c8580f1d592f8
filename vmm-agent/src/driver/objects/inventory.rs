//! What a snapshot in the object store is made of.
//!
//! It is text with its SHA-256 in front, so that whatever is damaged of it is found, and is never taken for another one.

use std::{collections::BTreeMap, io};

use object_store::path::Path;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

use super::chunk::{ChunkId, Chunks};
use crate::driver::snapshot::Origin;

/// What the names of all inventories begin with.
pub const PREFIX: &str = "snapshots";
/// The format: another version of ours does not guess.
const FORMAT: u32 = 1;
/// Bytes of an inventory at most: 400,000 chunks.
pub const MAX_BYTES: u64 = 32 << 20;
/// Files of a snapshot, and bytes of a name, at most.
const MAX_FILES: usize = 16;
const MAX_NAME: usize = 64;
/// Bytes of a digest in hex and the line's end.
const SEAL: usize = 65;

/// What a snapshot is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    format: u32,
    /// The snapshot.
    pub snapshot_id: String,
    /// What its VM was started with: where that is not, nothing can be made of it.
    pub origin: Origin,
    /// SHA-256 of its manifest, hex.
    pub manifest_digest: String,
    /// Its files, by name.
    pub files: BTreeMap<String, StoredFile>,
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Whether the VMs' users read it.
    pub is_for_vms: bool,
    /// What is in it.
    pub content: Chunks,
}

impl Inventory {
    /// Of a snapshot that is put there now.
    pub fn new(
        snapshot_id: String,
        origin: Origin,
        manifest_digest: String,
        files: BTreeMap<String, StoredFile>,
    ) -> Self {
        Self { format: FORMAT, snapshot_id, origin, manifest_digest, files }
    }

    /// Where that of a snapshot is.
    pub fn path(snapshot_id: &str) -> Path {
        Path::from_iter([PREFIX, snapshot_id])
    }

    /// As it is put.
    ///
    /// # Errors
    ///
    /// If it has too many chunks to be taken for one again.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let sealed = seal(self)?;
        match sealed.len() as u64 > MAX_BYTES {
            true => Err(io::Error::other("its snapshot has too many chunks")),
            false => Ok(sealed),
        }
    }

    /// Parses what was found for `snapshot_id`; `None` if it is damaged, another's, or of another format.
    pub fn decode(snapshot_id: &str, sealed: &[u8]) -> Option<Self> {
        let this: Self = unseal(sealed)?;
        let fits = this.format == FORMAT
            && this.snapshot_id == snapshot_id
            && this.files.len() <= MAX_FILES
            && this.files.keys().all(|name| is_name(name))
            && this.files.values().all(|file| file.content.is_plausible());
        fits.then_some(this)
    }

    /// Every chunk that it names.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkId> {
        self.files.values().flat_map(|file| file.content.chunks.values().copied())
    }
}

/// Whether a file of a snapshot may be called so: one that leads out of its directory may not.
pub fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('.')
}

/// `value` as text, with its SHA-256 in front.
///
/// # Errors
///
/// If it cannot be text.
pub fn seal(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(value)?;
    let mut sealed = hex::encode(Sha256::digest(&text)).into_bytes();
    sealed.push(b'\n');
    sealed.extend_from_slice(&text);
    Ok(sealed)
}

/// What [`seal`] was given; `None` if this is anything else.
pub fn unseal<T: DeserializeOwned>(sealed: &[u8]) -> Option<T> {
    let (digest, text) = sealed.split_at_checked(SEAL)?;
    let is_whole = hex::encode(Sha256::digest(text)).as_bytes() == digest.strip_suffix(b"\n")?;
    is_whole.then(|| serde_json::from_slice(text).ok())?
}

#[cfg(test)]
mod tests {
    use super::{super::tests::origin, *};

    fn inventory(name: &str) -> Inventory {
        let content = Chunks { bytes: 5, chunks: [(0, ChunkId::of(b"hello"))].into() };
        let files = [(name.to_owned(), StoredFile { is_for_vms: true, content })].into();
        Inventory::new("cp-1".into(), origin(), "d1".into(), files)
    }

    #[test]
    fn an_inventory_is_itself_or_nothing() {
        let sealed = inventory("layer.img").encode().unwrap();
        assert_eq!(Inventory::decode("cp-1", &sealed), Some(inventory("layer.img")));
        assert_eq!(Inventory::decode("cp-2", &sealed), None, "another's");
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert_eq!(Inventory::decode("cp-1", &damaged), None, "byte {at}");
            assert_eq!(Inventory::decode("cp-1", &sealed[..at]), None, "cut at {at}");
        }
    }

    #[test]
    fn a_name_leads_nowhere_else() {
        for name in ["../x", "a/b", ".hidden", "", "a\0", &"a".repeat(65)] {
            assert_eq!(Inventory::decode("cp-1", &inventory(name).encode().unwrap()), None, "{name:?}");
        }
    }

    #[test]
    fn a_chunk_beyond_its_file_is_none() {
        let mut inventory = inventory("layer.img");
        for file in inventory.files.values_mut() {
            file.content.chunks.insert(1, ChunkId::of(b"more"));
        }
        assert_eq!(Inventory::decode("cp-1", &inventory.encode().unwrap()), None);
    }
}

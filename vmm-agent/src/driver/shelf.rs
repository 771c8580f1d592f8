//! The snapshots of sandboxes' VMs that are on this host.
//!
//! Each is a directory, called by its ID; no list beside them is on disk. Removing one leaves alone what runs of it, which
//! holds the files that it needs by names of its own.

use std::{collections::BTreeMap, io, path::PathBuf};

use fs_err as fs;
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::warn;

use super::{
    durable,
    parts::Places,
    snapshot::{Manifest, Place},
};
use crate::{backend::Captured, fail};

/// Bytes of an ID at most.
const MAX_ID: usize = 64;

impl Places {
    /// Where the snapshot `id` is, if there is one.
    pub fn snapshot(&self, id: &str) -> Place {
        Place::at(self.snapshots.join(id))
    }
}

/// Whether a snapshot may be called so: by letters, digits and hyphens, of which it does not begin with the latter.
pub fn is_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=MAX_ID).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('-')
}

/// The snapshots, as they were found and have come and gone since.
#[derive(Debug)]
pub struct Shelf {
    places: Places,
    whole: Mutex<BTreeMap<String, Captured>>,
    added: watch::Sender<()>,
}

impl Shelf {
    /// Finds those that are whole. What an earlier agent left unfinished is removed, and so is what was for use at once.
    ///
    /// # Errors
    ///
    /// If they cannot be listed, or something resists.
    pub fn open(places: &Places) -> io::Result<Self> {
        let mut whole = BTreeMap::new();
        for entry in fs::read_dir(&places.snapshots)? {
            let path: PathBuf = entry?.path();
            let Some(id) = path.file_name().and_then(|name| name.to_str()).filter(|id| is_id(id)) else {
                durable::remove(&path)?;
                continue;
            };
            match places.snapshot(id).read_with_digest() {
                Ok(Some((manifest, _))) if manifest.circumstances.is_ephemeral => {
                    places.snapshot(id).remove()?;
                }
                Ok(Some((manifest, digest))) => {
                    whole.insert(id.to_owned(), captured(id, &manifest, digest));
                }
                // Without a manifest it was never published.
                Ok(None) => durable::remove(&path)?,
                // Who asks for it is told. It is not removed: a person may still make something of it.
                Err(error) => warn!(id, %error, "a snapshot is damaged"),
            }
        }
        Ok(Self { places: places.clone(), whole: Mutex::new(whole), added: watch::Sender::new(()) })
    }

    /// Those that are whole.
    pub fn all(&self) -> Vec<Captured> {
        self.whole.lock().values().cloned().collect()
    }

    /// The one of that name, if it is whole.
    pub fn get(&self, id: &str) -> Option<Captured> {
        self.whole.lock().get(id).cloned()
    }

    /// Whether one of that name is whole.
    pub fn has(&self, id: &str) -> bool {
        self.whole.lock().contains_key(id)
    }

    /// Changes whenever one is added.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.added.subscribe()
    }

    /// Adds one that was just published.
    ///
    /// # Errors
    ///
    /// If it is not there.
    pub fn add(&self, id: &str) -> io::Result<Captured> {
        let (manifest, digest) =
            self.places.snapshot(id).read_with_digest()?.ok_or(io::ErrorKind::NotFound)?;
        let captured = captured(id, &manifest, digest);
        self.whole.lock().insert(id.to_owned(), captured.clone());
        self.added.send_replace(());
        Ok(captured)
    }

    /// Removes one. Fine if there is none.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        self.whole.lock().remove(id);
        fail::pass(fail::DELETE_UNLISTED, "")?;
        self.places.snapshot(id).remove()?;
        fail::reached(fail::DELETE_REMOVED, "");
        Ok(())
    }
}

fn captured(id: &str, manifest: &Manifest, manifest_digest: String) -> Captured {
    Captured {
        snapshot_id: id.to_owned(),
        has_memory: manifest.has_memory(),
        circumstances: manifest.circumstances,
        bytes: manifest.bytes(),
        memory_changed_bytes: manifest.memory_changed_bytes(),
        disk_bytes: manifest.disk_bytes(),
        manifest_digest,
        snapshot_key: manifest.origin.snapshot_key.clone(),
        base_digest: manifest.origin.template_digest.clone(),
        object_store_id: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_leads_nowhere_else() {
        assert!(is_id("cp-0123456789abcdefghij"));
        for text in ["", ".", "..", "a/b", "-a", ".cp-1.draft", "CP", &"a".repeat(65)] {
            assert!(!is_id(text), "{text}");
        }
    }

    #[test]
    fn what_is_unfinished_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::of(dir.path());
        places.create().unwrap();
        for name in [".cp-1.draft", "cp-2"] {
            std::fs::create_dir(places.snapshots.join(name)).unwrap();
        }
        std::fs::create_dir(places.snapshots.join("cp-3")).unwrap();
        std::fs::write(places.snapshots.join("cp-3/manifest.json"), "damaged").unwrap();
        assert!(Shelf::open(&places).unwrap().all().is_empty());
        let left: Vec<_> =
            std::fs::read_dir(&places.snapshots).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["cp-3"], "damage is told, not removed");
    }
}

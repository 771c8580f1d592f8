//! A hibernated VM as a snapshot like any other: what is stored of its memory, by other names, and a copy of its disk.
//!
//! What is stored beside a disk is good for that disk alone, and only as long as the VM sleeps. A snapshot is good for ever, and
//! can go where the disk cannot.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use fs_err::{self as fs, File};

use super::{LAYER, LayerPart, MANIFEST, Manifest, Place, digests_of, draft::Scratch};
use crate::{
    driver::{
        digests::{Digests, Verified},
        durable, layer,
    },
    identity::SandboxId,
};

/// What the names of such snapshots begin with.
const PREFIX: &str = "hibernated-";
/// Hex digits of a digest in a name: enough that no two of a sandbox's are the same.
const DIGITS: usize = 28;

/// What the snapshot of a sandbox's VM is called that is `stored`; `None` if there is no memory of it. The sandbox is in it, so
/// that a scheduler can tell who may want it.
///
/// # Errors
///
/// As of [`Place::read`].
pub fn id_of(sandbox: &SandboxId, stored: &Place) -> io::Result<Option<String>> {
    // It has the time in it at which it was taken.
    let found = stored.read_with_digest()?;
    Ok(found.map(|(_, digest)| format!("{PREFIX}{sandbox}-{}", digest.get(..DIGITS).unwrap_or(&digest))))
}

/// Makes a snapshot at `place` of what is `stored` of a VM, and of its disk `layer`, which changes as soon as it does not
/// `sleep` any more.
///
/// # Errors
///
/// [`io::ErrorKind::Interrupted`] if it does not; if the disk does not take it. There is no snapshot then.
pub fn make(
    stored: &Place,
    layer: &Path,
    place: &Place,
    verified: &Verified,
    sleeps: &AtomicBool,
) -> io::Result<()> {
    let manifest = stored.read()?.ok_or(io::ErrorKind::NotFound)?;
    durable::remove_whole(&place.0)?;
    let dir = durable::draft_of(&place.0);
    DirBuilder::new().mode(0o700).create(&dir)?;
    let _scratch = Scratch::of(dir.clone());
    for entry in fs::read_dir(stored.dir())? {
        let entry = entry?;
        if entry.file_name() != MANIFEST && entry.file_type()?.is_file() {
            fs::hard_link(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    let path = dir.join(LAYER);
    let (copy, _) = layer::copy_or_share(layer, &path)?;
    // What was copied until here is of the VM as it sleeps, or nobody's.
    if !sleeps.load(Ordering::SeqCst) {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "it does not sleep any more"));
    }
    copy.sync_all()?;
    let digests = Digests::of(&copy)?;
    digests.write(&digests_of(&path))?;
    verified.note(&copy)?;
    // st_blocks is in units of 512 bytes (stat(2)).
    let allocated_bytes = copy.metadata()?.blocks() * 512;
    let layer = Some(LayerPart { digest: Some(digests.root()), allocated_bytes });
    let text = serde_json::to_vec(&Manifest { layer, ..manifest })?;
    durable::write(&dir.join(MANIFEST), 0o600, |file| io::Write::write_all(file, &text))?;
    File::open(&dir)?.sync_all()?;
    durable::rename(&dir, &place.0)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::SystemTime};

    use super::*;
    use crate::{
        backend::Circumstances,
        driver::{objects::tests::origin, shelf::is_id, snapshot::FORMAT},
    };

    #[test]
    fn what_is_copied_of_a_vm_that_goes_on_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let (stored, place) = (Place::at(dir.path().join("stored")), Place::at(dir.path().join("snapshot")));
        let sandbox = SandboxId::parse("sb-0123456789abcdefghij").unwrap();
        assert_eq!(id_of(&sandbox, &stored).unwrap(), None);
        fs::create_dir(stored.dir()).unwrap();
        let circumstances = Circumstances {
            taken_at: SystemTime::UNIX_EPOCH,
            is_quiet: true,
            pause: Default::default(),
            freeze: Default::default(),
            is_ephemeral: false,
        };
        let manifest =
            Manifest { format: FORMAT, origin: origin(), circumstances, memory: None, layer: None };
        fs::write(stored.dir().join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
        fs::write(stored.dir().join("pages.bin"), "pages").unwrap();
        let layer = dir.path().join("layer");
        fs::write(&layer, "disk").unwrap();
        let make = |sleeps| make(&stored, &layer, &place, &Verified::default(), &AtomicBool::new(sleeps));
        assert_eq!(make(false).unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert!(place.read().unwrap().is_none());
        make(true).unwrap();
        fs::write(&layer, "what comes later").unwrap();
        let made = place.read().unwrap().unwrap();
        place.verify_layer(&made, &Verified::default()).unwrap();
        assert_eq!(fs::read(place.layer()).unwrap(), b"disk");
        assert_eq!(fs::read(place.dir().join("pages.bin")).unwrap(), b"pages");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "no draft is left");
        let id = id_of(&sandbox, &stored).unwrap().unwrap();
        assert!(is_id(&id) && id.starts_with("hibernated-sb-0123456789abcdefghij-"), "{id}");
    }
}

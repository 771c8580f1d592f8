//! A hibernated VM as a snapshot like any other: what is stored of its memory, by other names, and a copy of its disk.
//!
//! What is stored beside a disk is good for that disk alone, and only as long as the VM sleeps. A snapshot is good for ever, and
//! can go where the disk cannot.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    sync::atomic::{AtomicBool, Ordering},
};

use fs_err::{self as fs, File};

use super::{
    LAYER, MANIFEST, Manifest, Place,
    draft::{LayerDraft, Scratch},
};
use crate::{
    driver::{digests::Verified, durable, home::Home, layer},
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

/// Makes a snapshot at `place` of what is stored of the VM in `home`, and of its disk, which changes as soon as it does not
/// `sleep` any more.
///
/// # Errors
///
/// [`io::ErrorKind::Interrupted`] if it does not; if the disk does not take it. There is no snapshot then.
pub fn make(home: &Home, place: &Place, verified: &Verified, sleeps: &AtomicBool) -> io::Result<()> {
    let stored = Place::stored(home);
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
    let (copy, _) = layer::copy_or_share(&home.layer(), &path)?;
    // What was copied until here is of the VM as it sleeps, or nobody's.
    if !sleeps.load(Ordering::SeqCst) {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "it does not sleep any more"));
    }
    // Of no use to the next capture: that is of another process.
    let draft = LayerDraft { copy: File::from_parts(copy, path), is_shared: false };
    let layer = Some(draft.finish(home, true, verified)?);
    let text = serde_json::to_vec(&Manifest { layer, ..manifest })?;
    durable::write(&dir.join(MANIFEST), 0o600, |file| io::Write::write_all(file, &text))?;
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
        let home = Home::of(dir.path(), "vm-000000000001");
        let (stored, place) = (Place::stored(&home), Place::at(dir.path().join("snapshot")));
        let sandbox = SandboxId::parse("sb-0123456789abcdefghij").unwrap();
        assert_eq!(id_of(&sandbox, &stored).unwrap(), None);
        fs::create_dir_all(stored.dir()).unwrap();
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
        let layer = home.layer();
        fs::write(&layer, "disk").unwrap();
        let make = |sleeps| make(&home, &place, &Verified::default(), &AtomicBool::new(sleeps));
        assert_eq!(make(false).unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert!(place.read().unwrap().is_none());
        make(true).unwrap();
        fs::write(&layer, "what comes later").unwrap();
        let made = place.read().unwrap().unwrap();
        place.verify_layer(&made, &Verified::default()).unwrap();
        assert_eq!(fs::read(place.layer()).unwrap(), b"disk");
        assert_eq!(fs::read(place.dir().join("pages.bin")).unwrap(), b"pages");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no draft is left");
        let id = id_of(&sandbox, &stored).unwrap().unwrap();
        assert!(is_id(&id) && id.starts_with("hibernated-sb-0123456789abcdefghij-"), "{id}");
    }
}

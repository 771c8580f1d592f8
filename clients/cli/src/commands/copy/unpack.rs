//! An archive of a sandbox's, unpacked here. Whoever packed it may mean harm: nothing is ever written outside of the
//! destination, and neither links nor special files are made.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read},
    os::unix::fs::DirBuilderExt as _,
    path::{Component, Path, PathBuf},
};

use bytes::{Buf as _, Bytes};
use tar::{Archive, EntryType};
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    Copied, TREE_DEPTH, TREE_ENTRIES,
    received::{Received, cannot_write},
};
use crate::failure::Failure;

/// Read at once of a file.
const PIECE: usize = 256 << 10;

/// Unpacks an archive that comes in messages into the directory `to`, which is made if it is not there.
pub fn unpack(messages: mpsc::Receiver<Bytes>, to: &Path, handle: &Handle) -> Result<Copied, Failure> {
    make_directory(to)?;
    let mut known = HashSet::new();
    let mut copied = Copied::default();
    let unreadable = |error: io::Error| Failure::Unfit(format!("the sandbox sends no archive: {error}"));
    let mut archive = Archive::new(Messages { messages, rest: Bytes::new() });
    for (count, entry) in archive.entries().map_err(unreadable)?.enumerate() {
        let mut entry = entry.map_err(unreadable)?;
        let path = entry.path().map_err(unreadable)?.into_owned();
        if !is_inside(&path) {
            return Err(Failure::Unfit(format!("the archive holds an unsafe name: {}", path.display())));
        }
        if count >= TREE_ENTRIES || path.components().count() > TREE_DEPTH {
            let message =
                format!("more than {TREE_ENTRIES} files, or more than {TREE_DEPTH} deep: pack it first");
            return Err(Failure::Unfit(message));
        }
        match entry.header().entry_type() {
            EntryType::Directory => make_directories(to, &path, &mut known)?,
            EntryType::Regular => {
                make_directories(to, path.parent().unwrap_or_else(|| Path::new("")), &mut known)?;
                let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
                let mut file = Received::create(&to.join(&path), mode)?;
                let mut left = entry.size();
                let mut piece = vec![0; PIECE];
                while left > 0 {
                    let read = entry.read(&mut piece).map_err(unreadable)?;
                    if read == 0 {
                        return Err(unreadable(io::ErrorKind::UnexpectedEof.into()));
                    }
                    handle.block_on(file.write(&piece[..read]))?;
                    left -= read as u64;
                }
                handle.block_on(file.finish())?;
                copied.files += 1;
                copied.bytes += entry.size();
            }
            _ => copied.skipped += 1,
        }
    }
    Ok(copied)
}

/// Whether it is a way down from where one is, and no other.
fn is_inside(path: &Path) -> bool {
    let mut parts = path.components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Makes the directories of a way down from `top`.
fn make_directories(top: &Path, path: &Path, known: &mut HashSet<PathBuf>) -> Result<(), Failure> {
    let mut way = PathBuf::new();
    for part in path.components() {
        way.push(part);
        if !known.contains(&way) {
            make_directory(&top.join(&way))?;
            known.insert(way.clone());
        }
    }
    Ok(())
}

/// Makes a directory, or takes one that is there; a link to one is not followed.
fn make_directory(path: &Path) -> Result<(), Failure> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let there = fs::symlink_metadata(path).map_err(|error| cannot_write(path, error))?;
            if there.is_dir() { Ok(()) } else { Err(cannot_write(path, error)) }
        }
        result => result.map_err(|error| cannot_write(path, error)),
    }
}

/// What the messages hold, one after the other.
struct Messages {
    messages: mpsc::Receiver<Bytes>,
    rest: Bytes,
}

impl Read for Messages {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.messages.blocking_recv() {
                Some(message) => self.rest = message,
                None => return Ok(0),
            }
        }
        let read = buffer.len().min(self.rest.len());
        self.rest.copy_to_slice(&mut buffer[..read]);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unpacks entries with these names as they stand, without what a well-meant packer refuses.
    async fn unpacked(to: &Path, names: &[(&str, EntryType)]) -> Result<Copied, Failure> {
        let mut archive = Vec::new();
        for (name, kind) in names {
            let mut header = tar::Header::new_ustar();
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o4644);
            header.set_size(if *kind == EntryType::Regular { 3 } else { 0 });
            if kind.is_symlink() || kind.is_hard_link() {
                header.set_link_name("/etc").unwrap();
            }
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
            if *kind == EntryType::Regular {
                let mut block = [0; 512];
                block[..3].copy_from_slice(b"abc");
                archive.extend_from_slice(&block);
            }
        }
        archive.extend_from_slice(&[0; 1024]);
        let (sender, messages) = mpsc::channel(1);
        let (to, handle) = (to.to_owned(), Handle::current());
        let unpacking = tokio::task::spawn_blocking(move || unpack(messages, &to, &handle));
        // In pieces that fit nothing.
        for piece in archive.chunks(100) {
            let _ = sender.send(Bytes::copy_from_slice(piece)).await;
        }
        drop(sender);
        unpacking.await.unwrap()
    }

    #[tokio::test]
    async fn names_from_a_sandbox_cannot_leave_the_directory() {
        let here = tempfile::tempdir().unwrap();
        let to = here.path().join("to");
        for name in ["a", "a b", "...", "-rf", "\n", "ä", "a\\b", "d/e/f", "./g", "h//i"] {
            let copied = unpacked(&to, &[(name, EntryType::Regular)]).await;
            if name.starts_with("./") {
                assert!(copied.is_err(), "{name:?}");
                continue;
            }
            assert_eq!(copied.unwrap(), Copied { files: 1, bytes: 3, skipped: 0 }, "{name:?}");
            assert_eq!(fs::read(to.join(name)).unwrap(), b"abc");
        }
        for name in ["..", "/", "/etc/x", "a/../../x", "../a"] {
            for kind in [EntryType::Regular, EntryType::Directory] {
                let failure = unpacked(&to, &[(name, kind)]).await.unwrap_err();
                assert!(failure.to_string().contains("unsafe name"), "{name:?}: {failure}");
            }
        }
        assert_eq!(fs::read_dir(here.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn links_are_neither_made_nor_followed() {
        let here = tempfile::tempdir().unwrap();
        let kinds = [EntryType::Symlink, EntryType::Link, EntryType::Fifo, EntryType::Char];
        for kind in kinds {
            let copied = unpacked(here.path(), &[("x", kind), ("y", EntryType::Regular)]).await.unwrap();
            assert_eq!((copied.files, copied.skipped), (1, 1));
        }
        assert_eq!(fs::read_dir(here.path()).unwrap().count(), 1);
        std::os::unix::fs::symlink("/tmp", here.path().join("link")).unwrap();
        assert!(unpacked(here.path(), &[("link/x", EntryType::Regular)]).await.is_err());
        assert!(unpacked(&here.path().join("link"), &[("x", EntryType::Regular)]).await.is_err());
    }

    #[tokio::test]
    async fn what_is_no_archive_is_refused() {
        let here = tempfile::tempdir().unwrap();
        for bytes in [&b"no archive"[..], &[1; 512], &[b'x'; 5000]] {
            let (sender, messages) = mpsc::channel(1);
            sender.send(Bytes::from_static(bytes)).await.unwrap();
            drop(sender);
            let (to, handle) = (here.path().to_owned(), Handle::current());
            let unpacked = tokio::task::spawn_blocking(move || unpack(messages, &to, &handle)).await.unwrap();
            assert!(matches!(unpacked, Err(Failure::Unfit(_))));
        }
    }
}

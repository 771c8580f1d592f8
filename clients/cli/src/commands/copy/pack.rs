//! A tree of ours as an archive (POSIX.1-2001, pax).
//!
//! A file is as long in the archive as the walk found it: what is written to it later is left out, and what is cut off
//! meanwhile is zeros.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read as _, Write},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;

use super::{
    TREE_DEPTH, TREE_ENTRIES,
    upload::{MESSAGE_BYTES, cannot_read},
};
use crate::{failure::Failure, progress::Meter};

/// What a walk has found.
#[derive(Debug, Default)]
pub struct Tree {
    root: PathBuf,
    /// Relative to the root, a directory before what it holds.
    entries: Vec<(PathBuf, Metadata)>,
    /// Files and what is in them, bytes.
    pub files: u64,
    /// As above.
    pub bytes: u64,
    /// Links and special files, left out.
    pub skipped: u64,
}

impl Tree {
    /// All that is below `root`.
    pub fn walk(root: &Path) -> Result<Self, Failure> {
        let mut tree = Self { root: root.to_owned(), ..Self::default() };
        let mut open = vec![(PathBuf::new(), 0)];
        while let Some((directory, depth)) = open.pop() {
            let full = root.join(&directory);
            if depth > TREE_DEPTH {
                let message = format!("{} lies more than {TREE_DEPTH} deep", full.display());
                return Err(Failure::Unfit(message));
            }
            for entry in fs::read_dir(&full).map_err(|error| cannot_read(&full, error))? {
                let entry = entry.map_err(|error| cannot_read(&full, error))?;
                let metadata = entry.metadata().map_err(|error| cannot_read(&entry.path(), error))?;
                let path = directory.join(entry.file_name());
                if metadata.is_dir() {
                    open.push((path.clone(), depth + 1));
                } else if metadata.is_file() {
                    tree.files += 1;
                    tree.bytes += metadata.len();
                } else {
                    tree.skipped += 1;
                    continue;
                }
                tree.entries.push((path, metadata));
                if tree.entries.len() > TREE_ENTRIES {
                    let message =
                        format!("{} holds more than {TREE_ENTRIES} files: pack them first", root.display());
                    return Err(Failure::Unfit(message));
                }
            }
        }
        Ok(tree)
    }

    /// Sends the archive, in messages; returns early where nobody takes it any more.
    pub fn pack(self, archive: mpsc::Sender<Bytes>, meter: &Meter) -> Result<(), Failure> {
        let mut packed = Builder::new(Messages { archive, waiting: Vec::new() });
        for (path, metadata) in &self.entries {
            let full = self.root.join(path);
            match append(&mut packed, path, &full, metadata) {
                Ok(()) => meter.add(usize::try_from(metadata.len()).unwrap_or(usize::MAX)),
                // Whoever gave it up says why.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(cannot_read(&full, error)),
            }
        }
        match packed.into_inner().and_then(|mut messages| messages.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(cannot_read(&self.root, error)),
            _ => Ok(()),
        }
    }
}

fn append(packed: &mut Builder<Messages>, path: &Path, full: &Path, metadata: &Metadata) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(metadata.permissions().mode() & 0o777);
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or_default());
    if metadata.is_dir() {
        header.set_entry_type(EntryType::Directory);
        header.set_size(0);
        return packed.append_data(&mut header, path, io::empty());
    }
    header.set_entry_type(EntryType::Regular);
    header.set_size(metadata.len());
    let content = File::open(full)?.chain(io::repeat(0)).take(metadata.len());
    packed.append_data(&mut header, path, content)
}

/// Gathers what is written to it to messages.
struct Messages {
    archive: mpsc::Sender<Bytes>,
    waiting: Vec<u8>,
}

impl Write for Messages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(MESSAGE_BYTES - self.waiting.len());
        self.waiting.extend_from_slice(&bytes[..taken]);
        if self.waiting.len() == MESSAGE_BYTES {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let message = std::mem::take(&mut self.waiting).into();
        self.archive.blocking_send(message).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

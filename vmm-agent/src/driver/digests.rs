//! Digests of large sparse files, block by block: what has not changed need not be read again, and what is damaged is
//! found.
//!
//! A block that is all zeros has no digest, whether the file has a hole there or not, so a sparse copy has the digests
//! of its original. All of them together are named by one, the *root*.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::File,
    io::{self, Write as _},
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
};

use parking_lot::Mutex;
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{extents, pages::Run};

/// Bytes of a block. Larger ones make shorter lists, smaller ones leave more as it was.
const BLOCK: u64 = 64 << 10;
/// Bytes of an entry in a file of digests: number and SHA-256.
const ENTRY: usize = 4 + 32;

type Digest = [u8; 32];

/// The digests of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// Length of the file, bytes.
    bytes: u64,
    /// Of each block that is not all zeros.
    blocks: BTreeMap<u32, Digest>,
}

impl Digests {
    /// Of all of `file`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn of(file: &File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        let mut digests = Self { bytes, blocks: BTreeMap::new() };
        let mut reader = Reader::new(file, bytes);
        for (start, end) in data(file, bytes)? {
            digests.read(&mut reader, start / BLOCK..end.div_ceil(BLOCK))?;
        }
        Ok(digests)
    }

    /// Of `file`, which differs from the one that these are of in `runs` alone.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn with(mut self, file: &File, runs: &[Run]) -> io::Result<Self> {
        let mut reader = Reader::new(file, self.bytes);
        let touched: BTreeSet<u64> = runs
            .iter()
            .flat_map(|run| run.offset() / BLOCK..(run.offset() + run.bytes()).div_ceil(BLOCK))
            .collect();
        for block in touched {
            self.read(&mut reader, block..block + 1)?;
        }
        Ok(self)
    }

    /// Of `file`, of which parts lie where those of `before` do, which these are of: no more than the rest is read.
    ///
    /// # Errors
    ///
    /// If the filesystem does not tell where they lie, or `file` cannot be read.
    pub fn taken_over(&self, before: &File, file: &File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        let (old, new) = (extents::of(before)?, extents::of(file)?);
        let alike = extents::alike(&old, &new, self.bytes.min(bytes));
        let mut digests = Self { bytes, blocks: BTreeMap::new() };
        let mut reader = Reader::new(file, bytes);
        let (mut alike, mut next) = (alike.iter().peekable(), 0);
        for extent in &new {
            // A block may have more than one extent.
            let blocks = (extent.range.start / BLOCK).max(next)..extent.range.end.min(bytes).div_ceil(BLOCK);
            next = blocks.end.max(next);
            for block in blocks {
                let range = block * BLOCK..((block + 1) * BLOCK).min(bytes);
                while alike.next_if(|part| part.end <= range.start).is_some() {}
                // A last block that was shorter is another one now.
                let is_alike = (self.bytes == bytes || self.bytes.is_multiple_of(BLOCK))
                    && alike.peek().is_some_and(|part| part.start <= range.start && range.end <= part.end);
                if is_alike {
                    let number = u32::try_from(block).map_err(io::Error::other)?;
                    digests.blocks.extend(self.blocks.get_key_value(&number));
                } else {
                    digests.read(&mut reader, block..block + 1)?;
                }
            }
        }
        Ok(digests)
    }

    fn read(&mut self, reader: &mut Reader<'_>, blocks: Range<u64>) -> io::Result<()> {
        for block in blocks {
            let number = u32::try_from(block).map_err(io::Error::other)?;
            match reader.digest(block)? {
                Some(digest) => self.blocks.insert(number, digest),
                None => self.blocks.remove(&number),
            };
        }
        Ok(())
    }

    /// The digest of all of them, hex.
    pub fn root(&self) -> String {
        hex::encode(Sha256::digest(self.encode()))
    }

    /// What was read for them, bytes.
    pub fn read_bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// Compares `file` with them.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if it is another.
    pub fn verify(&self, file: &File) -> io::Result<()> {
        let damaged = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let bytes = file.metadata()?.len();
        if bytes != self.bytes {
            return damaged(format!("it has {bytes} bytes instead of {}", self.bytes));
        }
        let now = Self::of(file)?;
        let numbers = self.blocks.keys().chain(now.blocks.keys());
        match numbers.min_by_key(|number| (self.blocks.get(number) == now.blocks.get(number), **number)) {
            Some(number) if self.blocks.get(number) != now.blocks.get(number) => {
                damaged(format!("it is damaged at byte {}", u64::from(*number) * BLOCK))
            }
            _ => Ok(()),
        }
    }

    /// Reads those that [`Digests::write`] wrote.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if they are not what was written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its digests are damaged");
        let file = fs_err::read(path)?;
        let (encoded, root) = file.split_last_chunk::<32>().ok_or_else(damaged)?;
        if Sha256::digest(encoded).as_slice() != root {
            return Err(damaged());
        }
        let (bytes, entries) = encoded.split_first_chunk::<8>().ok_or_else(damaged)?;
        let (entries, []) = entries.as_chunks::<ENTRY>() else { return Err(damaged()) };
        let blocks = entries.iter().filter_map(|entry| {
            let (number, digest) = entry.split_first_chunk::<4>()?;
            Some((u32::from_le_bytes(*number), digest.try_into().ok()?))
        });
        Ok(Self { bytes: u64::from_le_bytes(*bytes), blocks: blocks.collect() })
    }

    /// Writes them, with their root, to the new file `path`, for good.
    ///
    /// # Errors
    ///
    /// If the disk does not take them.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut encoded = self.encode();
        let root = Sha256::digest(&encoded);
        encoded.extend_from_slice(&root);
        let mut file = File::create_new(path)?;
        file.write_all(&encoded)?;
        file.sync_all()
    }

    fn encode(&self) -> Vec<u8> {
        let mut encoded = Vec::with_capacity(8 + self.blocks.len() * ENTRY);
        encoded.extend_from_slice(&self.bytes.to_le_bytes());
        for (number, digest) in &self.blocks {
            encoded.extend_from_slice(&number.to_le_bytes());
            encoded.extend_from_slice(digest);
        }
        encoded
    }
}

struct Reader<'a> {
    file: &'a File,
    bytes: u64,
    buffer: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(file: &'a File, bytes: u64) -> Self {
        // A block fits.
        Self { file, bytes, buffer: vec![0; BLOCK as usize] }
    }

    /// Of one block; `None` if it is all zeros.
    fn digest(&mut self, block: u64) -> io::Result<Option<Digest>> {
        let start = block * BLOCK;
        let length = self.bytes.saturating_sub(start).min(BLOCK);
        let part = &mut self.buffer[..length as usize];
        self.file.read_exact_at(part, start)?;
        Ok(part.iter().any(|byte| *byte != 0).then(|| Sha256::digest(part).into()))
    }
}

/// Where `file` has data: from, to.
fn data(file: &File, bytes: u64) -> io::Result<Vec<(u64, u64)>> {
    let (mut parts, mut at) = (Vec::new(), 0);
    while at < bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?;
        parts.push((start, at));
    }
    Ok(parts)
}

/// Files that were found whole, so that they need not be read again while nobody writes to them.
#[derive(Debug, Default)]
pub struct Verified(Mutex<HashSet<Identity>>);

/// What a file is, and when it was last written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Verified {
    /// Remembers that `file` is whole.
    ///
    /// # Errors
    ///
    /// If it cannot be asked for its identity.
    pub fn note(&self, file: &File) -> io::Result<()> {
        self.0.lock().insert(Identity::of(file)?);
        Ok(())
    }

    /// Whether `file` was found whole, and not written to since.
    ///
    /// # Errors
    ///
    /// If it cannot be asked for its identity.
    pub fn knows(&self, file: &File) -> io::Result<bool> {
        Ok(self.0.lock().contains(&Identity::of(file)?))
    }
}

impl Identity {
    /// Of an open file.
    ///
    /// # Errors
    ///
    /// If it cannot be asked.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { device: metadata.dev(), inode: metadata.ino(), bytes: metadata.size(), modified })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(parts: &[(u64, &[u8])], bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        for (at, part) in parts {
            file.write_all_at(part, *at).unwrap();
        }
        file
    }

    #[test]
    fn zeros_and_holes_are_the_same() {
        let bytes = 10 * BLOCK + 100;
        let holes = sparse(&[(3 * BLOCK + 5, b"text"), (10 * BLOCK + 99, b"!")], bytes);
        let zeros = sparse(
            &[(0, &vec![0; bytes as usize]), (3 * BLOCK + 5, b"text"), (10 * BLOCK + 99, b"!")],
            bytes,
        );
        let digests = Digests::of(&holes).unwrap();
        assert_eq!(digests.blocks.keys().collect::<Vec<_>>(), [&3, &10]);
        assert_eq!(digests, Digests::of(&zeros).unwrap());
        digests.verify(&zeros).unwrap();
    }

    #[test]
    fn only_what_changed_is_read_again() {
        let file = sparse(&[(0, b"zero"), (2 * BLOCK, b"two"), (5 * BLOCK, b"five")], 6 * BLOCK);
        let before = Digests::of(&file).unwrap();
        let page = vec![7; 4096];
        file.write_all_at(&page, BLOCK + 4096).unwrap();
        file.write_all_at(&vec![0; 4096], 2 * BLOCK).unwrap();
        let runs = [Run(17, 1), Run(32, 1)];
        assert_eq!(before.clone().with(&file, &runs).unwrap(), Digests::of(&file).unwrap());
        // What is not named stays as it was.
        file.write_all_at(&page, 5 * BLOCK).unwrap();
        let partly = before.with(&file, &runs).unwrap();
        assert_ne!(partly, Digests::of(&file).unwrap());
        let refusal = partly.verify(&file).unwrap_err();
        assert!(refusal.to_string().contains(&(5 * BLOCK).to_string()), "{refusal}");
    }

    #[test]
    fn damage_is_found_in_the_file_and_in_its_digests() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("digests");
        let file = sparse(&[(BLOCK, b"content")], 3 * BLOCK);
        let digests = Digests::of(&file).unwrap();
        digests.write(&path).unwrap();
        assert_eq!(Digests::open(&path).unwrap(), digests);
        let verified = Verified::default();
        assert!(!verified.knows(&file).unwrap());
        verified.note(&file).unwrap();
        assert!(verified.knows(&file).unwrap());
        for change in
            [&|| file.write_all_at(b"x", 0), &|| file.set_len(2 * BLOCK)] as [&dyn Fn() -> io::Result<()>; 2]
        {
            change().unwrap();
            assert_eq!(digests.verify(&file).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let mut encoded = fs_err::read(&path).unwrap();
        encoded[20] ^= 1;
        fs_err::write(&path, encoded).unwrap();
        assert_eq!(Digests::open(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

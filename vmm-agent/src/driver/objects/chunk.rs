//! The pieces that files are cut into, at the same offsets in each, so that equal pieces of different files are one.

use std::{collections::BTreeMap, fmt, fs::File, io, os::unix::fs::FileExt as _, str::FromStr};

use object_store::path::Path;
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Bytes of a chunk. A request for each is what a smaller one costs, and what two files share is lost to a larger one.
pub const CHUNK: u64 = 1 << 20;
/// What the names of all chunks begin with.
pub const PREFIX: &str = "chunks";

/// A chunk's name: the SHA-256 of what is in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    /// Of this content.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    /// Where it is in the store.
    pub fn path(&self) -> Path {
        let name = self.to_string();
        let (group, rest) = name.split_at(2);
        Path::from_iter([PREFIX, group, rest])
    }

    /// Whose path it is; `None` for anything else.
    pub fn at(path: &Path) -> Option<Self> {
        let parts: Vec<_> = path.parts().collect();
        let [prefix, group, rest] = parts.as_slice() else { return None };
        let name = format!("{}{}", group.as_ref(), rest.as_ref());
        (prefix.as_ref() == PREFIX && group.as_ref().len() == 2).then(|| name.parse().ok())?
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ChunkId {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut digest = [0; 32];
        hex::decode_to_slice(text, &mut digest)?;
        // One name for each.
        match text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            true => Err(hex::FromHexError::InvalidStringLength),
            false => Ok(Self(digest)),
        }
    }
}

impl From<ChunkId> for String {
    fn from(id: ChunkId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ChunkId {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// What a file is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunks {
    /// Length of the file, bytes.
    pub bytes: u64,
    /// By their numbers, those that are not all zeros.
    pub chunks: BTreeMap<u32, ChunkId>,
}

impl Chunks {
    /// Of all of `file`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn of(file: &File) -> io::Result<Self> {
        let mut this = Self { bytes: file.metadata()?.len(), chunks: BTreeMap::new() };
        let mut at = 0;
        while at < this.bytes {
            let start = match seek(file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // Nothing but a hole up to the end.
                Err(Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let number = u32::try_from(start / CHUNK).map_err(io::Error::other)?;
            let content = this.read(file, number)?;
            if content.iter().any(|byte| *byte != 0) {
                this.chunks.insert(number, ChunkId::of(&content));
            }
            at = (u64::from(number) + 1) * CHUNK;
        }
        Ok(this)
    }

    /// One chunk of `file`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn read(&self, file: &File, number: u32) -> io::Result<Vec<u8>> {
        let mut content = vec![0; self.length(number)];
        file.read_exact_at(&mut content, offset(number))?;
        Ok(content)
    }

    /// Bytes of a chunk: all are as long but the last.
    pub fn length(&self, number: u32) -> usize {
        // At most a chunk: it fits.
        self.bytes.saturating_sub(offset(number)).min(CHUNK) as usize
    }

    /// Every chunk: its number, its name, its length in bytes.
    pub fn list(&self) -> Vec<(u32, ChunkId, usize)> {
        self.chunks.iter().map(|(number, id)| (*number, *id, self.length(*number))).collect()
    }

    /// Whether every chunk lies in the file.
    pub fn is_plausible(&self) -> bool {
        self.chunks.keys().all(|number| self.length(*number) > 0)
    }
}

/// Where a chunk is in its file.
pub fn offset(number: u32) -> u64 {
    u64::from(number) * CHUNK
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_chunk_is_found_by_its_path_and_nothing_else_is_one() {
        let id = ChunkId::of(b"content");
        assert_eq!(ChunkId::at(&id.path()), Some(id));
        for stray in ["snapshots/cp-1", "chunks/ab", "chunks/ab/cd", "chunks/ab/c/d", "store-id"] {
            assert_eq!(ChunkId::at(&Path::from(stray)), None, "{stray}");
        }
    }

    proptest! {
        #[test]
        fn a_file_is_its_chunks_and_zeros(
            parts in prop::collection::vec((0..5 * CHUNK, 1..3000_usize, any::<u8>()), 0..6),
            bytes in 0..5 * CHUNK,
        ) {
            let file = tempfile::tempfile().unwrap();
            for (at, length, byte) in parts {
                file.write_all_at(&vec![byte; length], at).unwrap();
            }
            file.set_len(bytes).unwrap();
            let chunks = Chunks::of(&file).unwrap();
            prop_assert!(chunks.is_plausible());
            let copy = tempfile::tempfile().unwrap();
            copy.set_len(chunks.bytes).unwrap();
            for (number, id) in &chunks.chunks {
                let content = chunks.read(&file, *number).unwrap();
                prop_assert_eq!(ChunkId::of(&content), *id);
                copy.write_all_at(&content, offset(*number)).unwrap();
            }
            let all = |file: &File| {
                let mut content = vec![0; bytes as usize];
                file.read_exact_at(&mut content, 0).unwrap();
                content
            };
            prop_assert!(all(&file) == all(&copy));
            prop_assert_eq!(Chunks::of(&copy).unwrap(), chunks);
        }
    }
}

//! The chunks of images that were cut before, by the roots of their digests: a golden image is part of many snapshots,
//! and is read for the first of them alone.

use std::{
    collections::HashSet,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use fs_err as fs;

use super::{
    chunk::Chunks,
    inventory::{seal, unseal},
};
use crate::driver::{digests::Digests, durable, snapshot::digests_of};

/// Those of one host, a file for each.
#[derive(Clone, Debug)]
pub struct ChunkLists(PathBuf);

impl ChunkLists {
    /// In the directory `dir`, which is there.
    pub fn in_directory(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// What `file` is made of, which lies at `path`. One that has no digests beside it is read.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn of(&self, path: &Path, file: &File) -> io::Result<Chunks> {
        let Some(root) = root_of(path) else { return Chunks::of(file) };
        let list = self.0.join(&root);
        // What is damaged is made again.
        let known = fs::read(&list).ok().and_then(|sealed| unseal::<Chunks>(&sealed));
        if let Some(known) =
            known.filter(|known| Ok(known.bytes) == file.metadata().map(|m| m.len()).map_err(drop))
        {
            return Ok(known);
        }
        let chunks = Chunks::of(file)?;
        let sealed = seal(&chunks)?;
        durable::write(&list, 0o600, |file| io::Write::write_all(file, &sealed))?;
        Ok(chunks)
    }

    /// Removes those of which no snapshot in `snapshots` has an image any more.
    ///
    /// # Errors
    ///
    /// If they cannot be listed or removed.
    pub fn keep_only(&self, snapshots: &Path) -> io::Result<()> {
        let mut needed = HashSet::new();
        for snapshot in fs::read_dir(snapshots)? {
            for file in fs::read_dir(snapshot?.path())? {
                needed.extend(root_of(&file?.path()));
            }
        }
        for list in fs::read_dir(&self.0)? {
            let list = list?;
            if !list.file_name().to_str().is_some_and(|name| needed.contains(name)) {
                durable::remove(&list.path())?;
            }
        }
        Ok(())
    }
}

/// The root of the digests of an image, if it has any.
pub fn root_of(image: &Path) -> Option<String> {
    let digests = digests_of(image);
    (digests != image).then(|| Digests::open(&digests).ok())?.map(|digests| digests.root())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn an_image_is_cut_once_and_forgotten_with_its_last_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let (lists, snapshots) = (dir.path().join("lists"), dir.path().join("snapshots"));
        let path = snapshots.join("cp-1/memory.img");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::create_dir(&lists).unwrap();
        fs::write(&path, "content").unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap().into_file();
        Digests::of(&file).unwrap().write(&digests_of(&path)).unwrap();
        let known = ChunkLists::in_directory(&lists);
        let cut = known.of(&path, &file).unwrap();
        assert_eq!(cut, Chunks::of(&file).unwrap());
        // Not read again: what is in it by now would be seen.
        file.write_all_at(b"CONTENT", 0).unwrap();
        assert_eq!(known.of(&path, &file).unwrap(), cut);
        known.keep_only(&snapshots).unwrap();
        assert_eq!(known.of(&path, &file).unwrap(), cut);
        let list = fs::read_dir(&lists).unwrap().next().unwrap().unwrap().path();
        fs::write(&list, "damaged").unwrap();
        assert_ne!(known.of(&path, &file).unwrap(), cut, "a list that is damaged counts for nothing");
        fs::remove_dir_all(snapshots.join("cp-1")).unwrap();
        known.keep_only(&snapshots).unwrap();
        assert_eq!(fs::read_dir(&lists).unwrap().count(), 0);
    }
}

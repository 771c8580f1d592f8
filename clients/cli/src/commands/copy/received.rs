//! A file of ours that is being received: it appears under its name whole or not at all.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use tokio::{fs::File, io::AsyncWriteExt as _};

use crate::failure::Failure;

/// Where received bytes go.
#[derive(Debug)]
pub struct Received {
    file: File,
    path: PathBuf,
    /// Renamed to `path` in the end; removed if it never comes to that.
    temporary: Option<Temporary>,
}

impl Received {
    /// Prepares to replace `path`. A device or pipe that stands there is written to instead.
    pub fn create(path: &Path, mode: u32) -> Result<Self, Failure> {
        let failed = |error| cannot_write(path, error);
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Err(failed(io::ErrorKind::IsADirectory.into())),
            Ok(metadata) if !metadata.is_file() => {
                let file = fs::OpenOptions::new().write(true).open(path).map_err(failed)?;
                Ok(Self { file: file.into(), path: path.to_owned(), temporary: None })
            }
            // Through a link, as `cp` does: the link stays, what it points to is replaced.
            Ok(_) => Self::beside(&path.canonicalize().map_err(failed)?, mode),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::beside(path, mode),
            Err(error) => Err(failed(error)),
        }
    }

    fn beside(path: &Path, mode: u32) -> Result<Self, Failure> {
        let failed = |error| cannot_write(path, error);
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| failed(io::Error::other(error)))?;
        // Not made of the name, which may be as long as a name can be.
        let temporary = path.with_file_name(format!(".oc-{}.part", hex::encode(random)));
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode & 0o777)
            .open(&temporary)
            .map_err(failed)?;
        Ok(Self { file: file.into(), path: path.to_owned(), temporary: Some(Temporary(temporary)) })
    }

    /// Writes the next bytes.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all(bytes).await.map_err(|error| cannot_write(&self.path, error))
    }

    /// All bytes are there: the file gets its name.
    pub async fn finish(mut self) -> Result<(), Failure> {
        self.file.flush().await.map_err(|error| cannot_write(&self.path, error))?;
        match &self.temporary {
            Some(temporary) => {
                fs::rename(&temporary.0, &self.path).map_err(|error| cannot_write(&self.path, error))
            }
            None => Ok(()),
        }
    }
}

/// A path that is removed when it is no longer wanted.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may be gone already, and nobody could be told.
        let _ = fs::remove_file(&self.0);
    }
}

/// A failure to write something of ours.
pub fn cannot_write(path: &Path, error: io::Error) -> Failure {
    Failure::local(format!("cannot write {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_file_appears_whole_with_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("n".repeat(255));
        let mut file = Received::create(&path, 0o700).unwrap();
        file.write(b"abc").await.unwrap();
        assert!(!path.exists());
        file.finish().await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(names(directory.path()).len(), 1);
    }

    #[tokio::test]
    async fn what_is_given_up_leaves_the_old_file_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "old").unwrap();
        let mut file = Received::create(&path, 0o644).unwrap();
        file.write(b"new").await.unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(directory.path()), ["file"]);
    }

    #[tokio::test]
    async fn a_link_stays_and_a_device_is_written_to() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("target"), "old").unwrap();
        let link = directory.path().join("link");
        symlink("target", &link).unwrap();
        let mut file = Received::create(&link, 0o644).unwrap();
        file.write(b"new").await.unwrap();
        file.finish().await.unwrap();
        assert_eq!(fs::read(directory.path().join("target")).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

        let null = directory.path().join("null");
        symlink("/dev/null", &null).unwrap();
        let mut file = Received::create(&null, 0o644).unwrap();
        file.write(b"gone").await.unwrap();
        file.finish().await.unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}

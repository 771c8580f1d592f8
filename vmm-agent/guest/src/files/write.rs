//! A file on its way in: written beside the one that it replaces, and renamed when it is whole.

use std::{
    fs::{self, File, Metadata, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use oc_proto::v1::FileInfo;
use tonic::Status;

use super::{Owner, info, tree};
use crate::refusal::{Refusal, io_status};

const DEFAULT_MODE: u32 = 0o644;
const PERMISSIONS: u32 = 0o7777;
/// Links that are followed to the file that is meant; the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// A file that is not there yet. Dropped before [`Pending::commit`], it never will be.
#[derive(Debug)]
pub struct Pending {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    is_committed: bool,
}

impl Pending {
    /// Readies a file for `path`, and the directories above it. One that is replaced hands on owner and mode.
    ///
    /// # Errors
    ///
    /// What the file system said; `NOT_A_FILE` if something else stands there.
    pub fn begin(path: &Path, mode: u32, owner: Owner) -> Result<Self, Status> {
        let (target, replaced) = follow(path)?;
        let Some(parent) = target.parent() else {
            return Err(Refusal::NotAFile.status("/ is no regular file"));
        };
        tree::make_parents(parent, owner)?;
        let temporary = parent.join(temporary_name());
        let failed = |error| io_status(path, &error);
        let file =
            File::options().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
        let pending = Self { file, temporary, target, is_committed: false };
        let (owner, mode) = match &replaced {
            Some(old) => (Owner { uid: old.uid(), gid: old.gid() }, old.mode()),
            None => (owner, if mode == 0 { DEFAULT_MODE } else { mode }),
        };
        pending.give(owner, mode & PERMISSIONS).map_err(failed)?;
        Ok(pending)
    }

    fn give(&self, owner: Owner, mode: u32) -> io::Result<()> {
        // Before the mode: giving a file away takes its set-user-ID bit.
        if nix::unistd::Uid::effective().is_root() {
            fchown(&self.file, Some(owner.uid), Some(owner.gid))?;
        }
        self.file.set_permissions(Permissions::from_mode(mode))
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    ///
    /// What the file system said; then nothing is left of it.
    pub fn append(mut self, bytes: &[u8]) -> Result<Self, Status> {
        match self.file.write_all(bytes) {
            Ok(()) => Ok(self),
            Err(error) => Err(io_status(&self.target, &error)),
        }
    }

    /// Puts it in its place.
    ///
    /// # Errors
    ///
    /// What the file system said; then nothing is left of it.
    pub fn commit(mut self) -> Result<FileInfo, Status> {
        fs::rename(&self.temporary, &self.target).map_err(|error| io_status(&self.target, &error))?;
        self.is_committed = true;
        info::of(&self.target)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.is_committed {
            // Whatever it says, the guest has nothing better to do about it.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// The file that is meant, behind any links, and what it is now.
fn follow(path: &Path) -> Result<(PathBuf, Option<Metadata>), Status> {
    let mut target = path.to_owned();
    for _ in 0..=MAX_LINKS {
        match fs::symlink_metadata(&target) {
            Ok(found) if found.is_symlink() => {
                let link = fs::read_link(&target).map_err(|error| io_status(path, &error))?;
                // Relative to where the link stands.
                target = target.parent().unwrap_or_else(|| Path::new("/")).join(link);
            }
            Ok(found) if found.is_file() => return Ok((target, Some(found))),
            Ok(_) => return Err(Refusal::NotAFile.status(format!("{} is no regular file", path.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((target, None)),
            Err(error) => return Err(io_status(path, &error)),
        }
    }
    Err(Refusal::InvalidPath.status(format!("{} is a loop of links", path.display())))
}

/// A name that nobody else uses: a number that counts, and the time, for what an earlier boot may have left.
pub(super) fn temporary_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    format!(".oc-{now:x}-{:x}", NEXT.fetch_add(1, Ordering::Relaxed))
}

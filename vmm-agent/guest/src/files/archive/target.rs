//! The directory that an archive is unpacked into, and the only way to change anything in it.
//!
//! Every path is walked one directory at a time, each opened in the one before and none through a link, so nothing that
//! an archive says leads out. What is new is made under a name that nobody knows, and takes its place when it is whole.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, renameat},
    sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat, mkdirat},
    unistd::{LinkatFlags, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat},
};
use tonic::Status;

use crate::{
    files::{Owner, write::temporary_name},
    refusal::{Refusal, io_status},
};

/// `PATH_MAX` (limits.h) without its NUL.
const MAX_PATH: usize = 4095;
const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
/// Permission bits that an archive may set: nothing that changes who a program runs as.
const PERMISSIONS: u32 = 0o777;
const DEFAULT_DIRECTORY: u32 = 0o755;

/// A path of an entry: names, without any that lead elsewhere. Empty for the directory itself.
pub type Names = Vec<OsString>;

/// The names that `path` is made of.
///
/// # Errors
///
/// `INVALID_PATH` if it is absolute, has a `..`, or cannot be.
pub fn names(path: &Path) -> Result<Names, Status> {
    let invalid = |why: &str| Err(Refusal::InvalidPath.status(format!("entry {}: {why}", path.display())));
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() {
        return invalid("it has no name");
    }
    if bytes.len() > MAX_PATH || bytes.contains(&0) {
        return invalid("the path has a NUL, or is longer than 4095 bytes");
    }
    let mut names = Names::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_owned()),
            Component::CurDir => {}
            Component::ParentDir => return invalid("the path has a '..' component"),
            Component::RootDir | Component::Prefix(_) => return invalid("the path is absolute"),
        }
    }
    Ok(names)
}

/// The directory, and the last one in it that something was made in.
#[derive(Debug)]
pub struct Target {
    top: OwnedFd,
    last: Option<(Names, OwnedFd)>,
    owner: Owner,
}

/// A place for something new.
#[derive(Debug)]
pub struct Place<'a> {
    directory: &'a OwnedFd,
    name: &'a OsStr,
    owner: Owner,
    /// How errors call it.
    path: &'a Path,
}

impl Target {
    /// Opens `directory`; what is made in it belongs to `owner`.
    ///
    /// # Errors
    ///
    /// What the file system said.
    pub fn open(directory: &Path, owner: Owner) -> Result<Self, Status> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let top = nix::fcntl::open(directory, flags, Mode::empty())
            .map_err(|error| io_status(directory, &error.into()))?;
        Ok(Self { top, last: None, owner })
    }

    /// The place that `names`, of which `path` is made, name. The directories above it are made if `make_parents`.
    ///
    /// # Errors
    ///
    /// What the file system said; `INVALID_PATH` if a link is on the way, or it is the directory itself.
    pub fn place<'a>(
        &'a mut self,
        names: &'a Names,
        path: &'a Path,
        make_parents: bool,
    ) -> Result<Place<'a>, Status> {
        let Some((name, parents)) = names.split_last() else {
            return Err(
                Refusal::InvalidPath.status(format!("entry {}: it is the directory itself", path.display()))
            );
        };
        let owner = self.owner;
        if parents.is_empty() {
            return Ok(Place { directory: &self.top, name, owner, path });
        }
        // Entries of one directory mostly follow one another.
        if self.last.as_ref().is_none_or(|(last, _)| last != parents) {
            let found = self.walk(parents, path, make_parents)?;
            self.last = Some((parents.to_vec(), found));
        }
        let directory = self.last.as_ref().map_or(&self.top, |(_, directory)| directory);
        Ok(Place { directory, name, owner, path })
    }

    fn walk(&self, parents: &[OsString], path: &Path, make: bool) -> Result<OwnedFd, Status> {
        let mut found: Option<OwnedFd> = None;
        for name in parents {
            let directory = found.as_ref().unwrap_or(&self.top);
            let place = Place { directory, name, owner: self.owner, path };
            found = Some(match place.enter() {
                Err(Errno::ENOENT) if make => place.make_directory(DEFAULT_DIRECTORY)?,
                entered => entered.map_err(|error| place.no_way(error))?,
            });
        }
        found.map_or_else(|| self.top.try_clone().map_err(|error| io_status(path, &error)), Ok)
    }
}

impl Place<'_> {
    fn failed(&self, error: Errno) -> Status {
        match error {
            Errno::EISDIR | Errno::EEXIST | Errno::ENOTEMPTY => {
                Refusal::FileExists.status(format!("{} is a directory", self.path.display()))
            }
            error => io_status(self.path, &error.into()),
        }
    }

    /// Opens it as a directory.
    fn enter(&self) -> Result<OwnedFd, Errno> {
        openat(self.directory, self.name, DIRECTORY, Mode::empty())
    }

    /// Why it cannot be gone through.
    fn no_way(&self, error: Errno) -> Status {
        match self.stat() {
            Ok(found) if kind(&found) == SFlag::S_IFLNK => {
                let text = format!("entry {}: the way leads through a link", self.path.display());
                Refusal::InvalidPath.status(text)
            }
            _ => io_status(self.path, &error.into()),
        }
    }

    fn stat(&self) -> Result<FileStat, Errno> {
        fstatat(self.directory, self.name, AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Makes it a directory. One that is there stays as it is; anything else is replaced.
    ///
    /// # Errors
    ///
    /// What the file system said.
    pub fn make_directory(&self, mode: u32) -> Result<OwnedFd, Status> {
        let failed = |error| self.failed(error);
        match mkdirat(self.directory, self.name, Mode::S_IRWXU) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                if kind(&self.stat().map_err(failed)?) == SFlag::S_IFDIR {
                    return self.enter().map_err(failed);
                }
                unlinkat(self.directory, self.name, UnlinkatFlags::NoRemoveDir).map_err(failed)?;
                mkdirat(self.directory, self.name, Mode::S_IRWXU).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        let directory = self.enter().map_err(failed)?;
        self.give(&directory, mode).map_err(failed)?;
        Ok(directory)
    }

    fn give(&self, file: impl AsFd, mode: u32) -> Result<(), Errno> {
        if nix::unistd::Uid::effective().is_root() {
            fchown(&file, Some(self.owner.uid.into()), Some(self.owner.gid.into()))?;
        }
        fchmod(&file, Mode::from_bits_truncate(mode & PERMISSIONS))
    }

    /// Makes it a file, of what `fill` writes.
    ///
    /// # Errors
    ///
    /// What the file system or `fill` said; then what was there before is still there.
    pub fn make_file(
        &self,
        mode: u32,
        fill: impl FnOnce(&mut File) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let failed = |error| self.failed(error);
        let draft = Draft::new(self);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(self.directory, draft.name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(failed)?;
        let mut file = File::from(file);
        fill(&mut file)?;
        self.give(&file, mode).map_err(failed)?;
        draft.keep()
    }

    /// Makes it a link to `target`, wherever that is: nothing is unpacked through it.
    ///
    /// # Errors
    ///
    /// What the file system said; then what was there before is still there.
    pub fn make_link(&self, target: &Path) -> Result<(), Status> {
        let failed = |error| self.failed(error);
        let draft = Draft::new(self);
        symlinkat(target, self.directory, draft.name.as_str()).map_err(failed)?;
        if nix::unistd::Uid::effective().is_root() {
            let (uid, gid) = (self.owner.uid.into(), self.owner.gid.into());
            let name = draft.name.as_str();
            fchownat(self.directory, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(failed)?;
        }
        draft.keep()
    }

    /// Makes it another name of the regular file that `from` is.
    ///
    /// # Errors
    ///
    /// What the file system said; then what was there before is still there.
    pub fn make_hard_link(&self, from: &Hard) -> Result<(), Status> {
        let draft = Draft::new(self);
        linkat(
            &from.directory,
            from.name.as_os_str(),
            self.directory,
            draft.name.as_str(),
            LinkatFlags::empty(),
        )
        .map_err(|error| self.failed(error))?;
        draft.keep()
    }

    /// The same place, to link to.
    ///
    /// # Errors
    ///
    /// What the file system said; `NOT_A_FILE` if it is no regular file.
    pub fn to_link(&self) -> Result<Hard, Status> {
        let found = self.stat().map_err(|error| self.failed(error))?;
        if kind(&found) != SFlag::S_IFREG {
            return Err(Refusal::NotAFile.status(format!("{} is no regular file", self.path.display())));
        }
        let directory = self.directory.try_clone().map_err(|error| io_status(self.path, &error))?;
        Ok(Hard { directory, name: self.name.to_owned() })
    }
}

/// A file that is given another name.
#[derive(Debug)]
pub struct Hard {
    directory: OwnedFd,
    name: OsString,
}

fn kind(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits())
}

/// Something new that has no place yet. Dropped, it is gone.
struct Draft<'a> {
    place: &'a Place<'a>,
    name: String,
}

impl<'a> Draft<'a> {
    fn new(place: &'a Place<'a>) -> Self {
        Self { place, name: temporary_name() }
    }

    fn keep(self) -> Result<(), Status> {
        let directory = self.place.directory;
        renameat(directory, self.name.as_str(), directory, self.place.name)
            .map_err(|error| self.place.failed(error))
    }
}

impl Drop for Draft<'_> {
    /// Also after it has its place: two names of one file are not renamed to one (rename(2)).
    fn drop(&mut self) {
        let _: Result<(), Errno> =
            unlinkat(self.place.directory, self.name.as_str(), UnlinkatFlags::NoRemoveDir);
    }
}

//! Directories, and what moves or goes as a whole.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown},
    path::Path,
};

use oc_proto::v1::FileInfo;
use tonic::Status;

use super::{Owner, info};
use crate::refusal::{Refusal, io_status};

/// Entries that are listed.
const MAX_ENTRIES: usize = 100_000;
/// Bytes of their names and paths.
const MAX_BYTES: usize = 16 << 20;
const DEFAULT_MODE: u32 = 0o755;
const PERMISSIONS: u32 = 0o7777;

/// What `directory` holds, sorted by name.
///
/// # Errors
///
/// What the file system said; `DIRECTORY_TOO_LARGE`.
pub fn list(directory: &Path) -> Result<Vec<FileInfo>, Status> {
    let failed = |error| io_status(directory, &error);
    let (mut entries, mut bytes) = (Vec::new(), 0);
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        match fs::symlink_metadata(&path) {
            Ok(metadata) => entries.push(info::describe(&path, &metadata)),
            // Gone since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_status(&path, &error)),
        }
        bytes += entries.last().map_or(0, |entry| entry.path.len() + entry.name.len());
        if entries.len() > MAX_ENTRIES || bytes > MAX_BYTES {
            let text = format!(
                "{} has more than {MAX_ENTRIES} entries, or than {MAX_BYTES} bytes of names",
                directory.display()
            );
            return Err(Refusal::DirectoryTooLarge.status(text));
        }
    }
    entries.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(entries)
}

/// Makes `directory` and those above it. One that exists stays as it is.
///
/// # Errors
///
/// What the file system said; `FILE_EXISTS` if something else stands there.
pub fn make(directory: &Path, mode: u32, owner: Owner) -> Result<(), Status> {
    match fs::metadata(directory) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(Refusal::FileExists.status(format!("{} is no directory", directory.display()))),
        Err(_) => {}
    }
    if let Some(parent) = directory.parent() {
        make_parents(parent, owner)?;
    }
    let mode = if mode == 0 { DEFAULT_MODE } else { mode & PERMISSIONS };
    make_one(directory, mode, owner).map_err(|error| io_status(directory, &error))
}

/// Makes `directory` and those above it, as far as they are missing.
///
/// # Errors
///
/// What the file system said; `NOT_A_DIRECTORY` if one of them is something else.
pub fn make_parents(directory: &Path, owner: Owner) -> Result<(), Status> {
    let missing: Vec<&Path> =
        directory.ancestors().take_while(|path| fs::symlink_metadata(path).is_err()).collect();
    for path in missing.into_iter().rev() {
        make_one(path, DEFAULT_MODE, owner).map_err(|error| io_status(path, &error))?;
    }
    Ok(())
}

fn make_one(path: &Path, mode: u32, owner: Owner) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        made => made?,
    }
    if nix::unistd::Uid::effective().is_root() {
        chown(path, Some(owner.uid), Some(owner.gid))?;
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Removes what stands at `path`, with all that is in it. A link goes, not what it points to.
///
/// # Errors
///
/// What the file system said.
pub fn remove(path: &Path) -> Result<(), Status> {
    let failed = |error| io_status(path, &error);
    if path.parent().is_none() {
        return Err(Refusal::InvalidPath.status("/ stays"));
    }
    if fs::symlink_metadata(path).map_err(failed)?.is_dir() {
        fs::remove_dir_all(path).map_err(failed)
    } else {
        fs::remove_file(path).map_err(failed)
    }
}

/// Renames, replacing a file that stands there.
///
/// # Errors
///
/// What the file system said.
pub fn rename(from: &Path, to: &Path) -> Result<(), Status> {
    fs::rename(from, to).map_err(|error| match error.kind() {
        io::ErrorKind::IsADirectory => Refusal::FileExists.status(format!("{} is a directory", to.display())),
        _ => io_status(from, &error),
    })
}

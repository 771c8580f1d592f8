//! Files that are whole or not there, whatever happens to the host.

use std::{fs::Permissions, io, os::unix::fs::PermissionsExt as _, path::Path};

use fs_err::{self as fs, File, OpenOptions, os::unix::fs::OpenOptionsExt as _};

use crate::fail;

/// Writes the file `path` by `fill` under another name, and renames it when it is on disk.
///
/// # Errors
///
/// If anything of that fails; then `path` is as it was.
pub fn write(path: &Path, mode: u32, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let draft = draft_of(path);
    let written = (|| {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
        fill(&mut file)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        rename(&draft, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

/// Renames `from` to `to` in the same directory, for good.
///
/// # Errors
///
/// If it cannot be renamed or the directory not written.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    to.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// The name under which `path` is prepared. Starts with a dot, so that nothing takes it for the real one.
pub fn draft_of(path: &Path) -> std::path::PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.draft"))
}

/// Removes a directory so that it is never seen in part: what is left of it after a crash has a draft's name.
///
/// # Errors
///
/// If it cannot be removed.
pub fn remove_whole(path: &Path) -> io::Result<()> {
    let gone = draft_of(path);
    remove(&gone)?;
    match fs::rename(path, &gone) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => {
            renamed?;
            fail::pass(fail::DELETE_HIDDEN, "")?;
            remove(&gone)
        }
    }
}

/// Removes a file or directory with all that it holds. One that is not there is fine.
///
/// # Errors
///
/// If it cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

//! Leaving nothing behind: ends every VM of a host and removes all that agents have made, with no agent running.

use std::{fs, io, path::Path, sync::Arc};

use tracing::info;

use crate::{
    backend::Backend,
    data_image::{self, ImageError},
    host::recovery::remove_all,
    journal::{self, JOURNAL_DIR},
    lock::{Lock, LockError},
    microvm::MakeError,
    tombstones,
    workshop::Workshop,
};

/// Why something may be left.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// An agent still runs.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A VM resists.
    #[error("cannot remove the VMs")]
    Vms(#[from] MakeError),
    /// The file system says no.
    #[error("cannot clean up the data directory")]
    Io(#[from] io::Error),
    /// The filesystem of the data directory resists.
    #[error("cannot remove the data directory's image")]
    Image(#[from] ImageError),
    /// VMs are still there after they were removed.
    #[error("{0} VMs resist; see the log")]
    Left(usize),
}

/// Removes everything of the host whose data lies in `data_dir`. May be repeated, also where nothing is left.
///
/// # Errors
///
/// [`CleanupError`]: then something may be left; running it again is safe.
pub async fn clean_up(backend: Arc<dyn Backend>, data_dir: &Path) -> Result<(), CleanupError> {
    if !data_dir.try_exists()? {
        backend.clean_up().await?;
        return Ok(data_image::remove(data_dir).await?);
    }
    let lock = Lock::take(data_dir)?;
    let workshop = Workshop::open(backend.clone(), data_dir, journal::boot_id()?)?;
    let found: Vec<_> = workshop.left_behind().await?.into_iter().map(|left| left.microvm).collect();
    let count = found.len();
    remove_all(found).await;
    let left = backend.existing().await?.len();
    if left > 0 {
        return Err(CleanupError::Left(left));
    }
    backend.clean_up().await?;
    remove(fs::remove_dir_all(data_dir.join(JOURNAL_DIR)))?;
    remove(fs::remove_file(data_dir.join(tombstones::FILE)))?;
    // Last: whoever finds no lock file finds nothing else either.
    remove(fs::remove_file(data_dir.join(Lock::file_name())))?;
    drop(lock);
    data_image::remove(data_dir).await?;
    // The directory itself goes if nobody else keeps anything in it.
    if let Err(error) = fs::remove_dir(data_dir)
        && error.kind() != io::ErrorKind::DirectoryNotEmpty
    {
        return Err(error.into());
    }
    info!(vms = count, "nothing is left");
    Ok(())
}

fn remove(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

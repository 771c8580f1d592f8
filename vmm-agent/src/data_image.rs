//! A data directory on an XFS of its own, which lies in a file beside it: copies of disks and memory share their blocks
//! there, whatever the host's own filesystem can.
//!
//! ```text
//!   DIR        where it is mounted
//!   DIR.img    the file: allocated as a whole when it is made, so that a host whose disk fills up cannot break what is in it
//! ```
//!
//! Who finds the file made and not mounted mounts it, and who finds it mounted uses it: an agent that is killed at any moment
//! leaves nothing that the next one, or a clean-up, does not go on with.

use std::{
    ffi::OsStr,
    fs::{DirBuilder, File},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use fs_err as fs;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, Flock, FlockArg, fallocate},
    mount::{MntFlags, umount2},
};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::driver::durable;

/// What is in there runs as nobody else. Devices are in jails (`crate::driver::firecracker`), which nobody but root makes.
const MOUNT_OPTIONS: &str = "nosuid,noatime";
/// A process that was ended may hold a file for a moment.
const UNMOUNTED_WITHIN: Duration = Duration::from_secs(15);
const LOOKS_EVERY: Duration = Duration::from_millis(50);

/// Why there is no data directory on a filesystem of its own.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program is missing.
    #[error("cannot run {program}: {error}; --data-image-mb needs the package {package}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What has it.
        package: &'static str,
        /// What the kernel says.
        error: io::Error,
    },
    /// A program fails: this host may have no loop devices or no XFS.
    #[error("{program} fails: {message}; --data-image-mb needs loop devices and XFS in the kernel")]
    Failed {
        /// Its name.
        program: &'static str,
        /// What it says.
        message: String,
    },
    /// The host's disk has no room for it.
    #[error("there is no room for {size_mb} MiB at {}: {errno}", .path.display())]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// What it was to have.
        size_mb: u32,
        /// What the kernel says.
        errno: Errno,
    },
    /// The data directory has other data.
    #[error("{} is not empty: clean it up with --cleanup before it is put on an image", .0.display())]
    NotEmpty(PathBuf),
    /// The data directory is on an image that is not mounted.
    #[error("{} holds the data: start with --data-image-mb, or remove it with --cleanup", .0.display())]
    NotMounted(PathBuf),
    /// It is used.
    #[error("cannot unmount {}: {errno}", .path.display())]
    Busy {
        /// Where it is mounted.
        path: PathBuf,
        /// What the kernel says.
        errno: Errno,
    },
    /// The file system says no.
    #[error("cannot put the data directory on an image")]
    Io(#[from] io::Error),
}

/// Where the image for `data_dir` is, if there is one.
pub fn path_for(data_dir: &Path) -> PathBuf {
    let mut name = data_dir.file_name().unwrap_or_default().to_owned();
    name.push(".img");
    data_dir.with_file_name(name)
}

/// Sees that `data_dir` is on its image, which is made with `size_mb` if there is none.
///
/// # Errors
///
/// [`ImageError`] says what this host lacks.
pub fn mount(data_dir: &Path, size_mb: u32) -> Result<(), ImageError> {
    DirBuilder::new().recursive(true).mode(0o711).create(data_dir)?;
    // Of two agents at once one waits, and finds it mounted. The kernel lets go of it however this one ends.
    let directory = File::open(data_dir)?;
    let _lock =
        Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
    let image = path_for(data_dir);
    if image.try_exists()? {
        if is_mounted(data_dir)? {
            return Ok(());
        }
    } else {
        if fs::read_dir(data_dir)?.next().is_some() {
            return Err(ImageError::NotEmpty(data_dir.to_owned()));
        }
        make(&image, size_mb)?;
    }
    // A device that was left may go while we look at it.
    attach_and_mount(&image, data_dir).or_else(|_| attach_and_mount(&image, data_dir))?;
    info!(image = %image.display(), "the data directory is on a filesystem of its own");
    Ok(())
}

/// Sees that `data_dir` is not the empty place where its image belongs.
///
/// # Errors
///
/// [`ImageError::NotMounted`] if it is.
pub fn refuse_unmounted(data_dir: &Path) -> Result<(), ImageError> {
    let image = path_for(data_dir);
    match image.try_exists()? && !is_mounted(data_dir)? {
        true => Err(ImageError::NotMounted(image)),
        false => Ok(()),
    }
}

/// Unmounts and removes the image of `data_dir` with all that is in it. Fine if there is none. Nobody works there any more.
///
/// # Errors
///
/// [`ImageError`]: then it may be tried again.
pub async fn remove(data_dir: &Path) -> Result<(), ImageError> {
    let image = path_for(data_dir);
    durable::remove(&durable::draft_of(&image))?;
    if !image.try_exists()? {
        return Ok(());
    }
    let deadline = Instant::now() + UNMOUNTED_WITHIN;
    while is_mounted(data_dir)? {
        match umount2(data_dir, MntFlags::empty()) {
            Ok(()) => {}
            Err(Errno::EBUSY) if Instant::now() < deadline => sleep(LOOKS_EVERY).await,
            Err(errno) => return Err(ImageError::Busy { path: data_dir.to_owned(), errno }),
        }
    }
    for device in attached(&image)? {
        detach(&image, &device)?;
    }
    Ok(durable::remove(&image)?)
}

fn make(image: &Path, size_mb: u32) -> Result<(), ImageError> {
    let draft = durable::draft_of(image);
    durable::remove(&draft)?;
    let made = (|| {
        let file = fs::File::create_new(&draft)?;
        // Fits: it is less than 2^52.
        let bytes = i64::from(size_mb) << 20;
        fallocate(file.file().as_fd(), FallocateFlags::empty(), 0, bytes)
            .map_err(|errno| ImageError::NoRoom { path: image.to_owned(), size_mb, errno })?;
        // Nothing is discarded: it would take the file's blocks away.
        run("mkfs.xfs", "xfsprogs", ["-q", "-K", "-m", "reflink=1"].map(OsStr::new), &draft)?;
        file.sync_all()?;
        Ok(durable::rename(&draft, image)?)
    })();
    if made.is_err() {
        let _ = durable::remove(&draft);
    }
    made
}

/// Whether something is mounted at `data_dir`.
fn is_mounted(data_dir: &Path) -> io::Result<bool> {
    match fs::metadata(data_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        metadata => Ok(metadata?.dev() != fs::metadata(data_dir.join(".."))?.dev()),
    }
}

fn attach_and_mount(image: &Path, data_dir: &Path) -> Result<(), ImageError> {
    let device = attach(image)?;
    let mounted =
        run("mount", "mount", ["-t", "xfs", "-o", MOUNT_OPTIONS, &device].map(OsStr::new), data_dir);
    // Mounted, it is let go of with the mount; else now.
    if let Err(error) = detach(image, &device) {
        warn!(device, %error, "a loop device stays");
    }
    mounted.map(drop)
}

/// A loop device of the image: one that an agent left that was killed, or a new one.
fn attach(image: &Path) -> Result<String, ImageError> {
    if let Some(device) = attached(image)?.into_iter().next() {
        return Ok(device);
    }
    let options = ["--find", "--show", "--direct-io=on"].map(OsStr::new);
    Ok(run("losetup", "mount", options, image)?.trim().to_owned())
}

fn attached(image: &Path) -> Result<Vec<String>, ImageError> {
    let told =
        run("losetup", "mount", ["--noheadings", "--output", "NAME", "--associated"].map(OsStr::new), image)?;
    Ok(told.split_whitespace().map(str::to_owned).collect())
}

/// Takes the image off `device`. Fine if it went by itself: whoever else has looked at it is the last to let go.
fn detach(image: &Path, device: &str) -> Result<(), ImageError> {
    match run("losetup", "mount", [OsStr::new("--detach")], Path::new(device)) {
        Err(_) if !attached(image)?.iter().any(|one| one == device) => Ok(()),
        detached => detached.map(drop),
    }
}

/// Runs `program` on `path`; what it prints.
fn run<'a>(
    program: &'static str,
    package: &'static str,
    options: impl IntoIterator<Item = &'a OsStr>,
    path: &Path,
) -> Result<String, ImageError> {
    let ran = Command::new(program).args(options).arg(path).stdin(Stdio::null()).output();
    let output = ran.map_err(|error| ImageError::Program { program, package, error })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(ImageError::Failed { program, message })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::driver::{digests::Digests, layer};

    /// XFS has no less.
    const SIZE_MB: u32 = 320;

    #[tokio::test]
    async fn a_data_directory_is_on_an_image_until_it_is_removed() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let data_dir = dir.path().join("data");
        mount(&data_dir, SIZE_MB).unwrap();
        fs::write(data_dir.join("kept"), "kept").unwrap();
        // The next agent, after a kill, and after a reboot.
        mount(&data_dir, SIZE_MB).unwrap();
        refuse_unmounted(&data_dir).unwrap();
        umount2(&data_dir, MntFlags::empty()).unwrap();
        assert!(matches!(refuse_unmounted(&data_dir), Err(ImageError::NotMounted(_))));
        mount(&data_dir, SIZE_MB).unwrap();
        assert_eq!(fs::read_to_string(data_dir.join("kept")).unwrap(), "kept");
        // All of it is allocated.
        let image = fs::metadata(path_for(&data_dir)).unwrap();
        assert!(image.blocks() * 512 >= u64::from(SIZE_MB) << 20, "{} blocks", image.blocks());

        // What is held open keeps it mounted for a moment.
        let open = File::open(data_dir.join("kept")).unwrap();
        let closing = std::thread::spawn(move || drop(open));
        remove(&data_dir).await.unwrap();
        closing.join().unwrap();
        remove(&data_dir).await.unwrap();
        assert_eq!(fs::read_dir(&data_dir).unwrap().count(), 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing beside it is left");
        assert!(attached(&path_for(&data_dir)).unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_is_told_and_leaves_nothing() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let data_dir = dir.path().join("data");
        assert!(matches!(mount(&data_dir, u32::MAX), Err(ImageError::NoRoom { .. })));
        // Too little for XFS.
        let refusal = mount(&data_dir, 8).unwrap_err();
        assert!(matches!(refusal, ImageError::Failed { program: "mkfs.xfs", .. }), "{refusal}");
        fs::write(data_dir.join("other"), "").unwrap();
        assert!(matches!(mount(&data_dir, SIZE_MB), Err(ImageError::NotEmpty(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_copy_on_it_shares_blocks_and_digests_of_what_it_shares_are_taken_over() {
        const BLOCK: usize = 64 << 10;
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let data_dir = dir.path().join("data");
        mount(&data_dir, SIZE_MB).unwrap();
        let [disk, before, after] = ["disk", "before", "after"].map(|name| data_dir.join(name));
        let file = File::create_new(&disk).unwrap();
        file.set_len(40 * BLOCK as u64).unwrap();
        file.write_all_at(&vec![1; 20 * BLOCK], 0).unwrap();
        layer::write_back(&disk).unwrap();
        let (before, is_shared) = layer::copy_or_share(&disk, &before).unwrap();
        assert!(is_shared);
        let digests = Digests::of(&before).unwrap();
        // One is changed, one is new, one is emptied.
        file.write_all_at(b"changed", 5 * BLOCK as u64).unwrap();
        file.write_all_at(b"new", 30 * BLOCK as u64).unwrap();
        file.write_all_at(&vec![0; BLOCK], 7 * BLOCK as u64).unwrap();
        file.set_len(41 * BLOCK as u64).unwrap();
        let (after, _) = layer::copy_or_share(&disk, &after).unwrap();
        assert_eq!(digests.taken_over(&before, &after).unwrap(), Digests::of(&after).unwrap());
        // Of others they are other ones, but for the blocks that are read: they are believed, not read again.
        let others = tempfile::tempfile().unwrap();
        others.set_len(40 * BLOCK as u64).unwrap();
        others.write_all_at(&vec![9; 20 * BLOCK], 0).unwrap();
        let believed = Digests::of(&others).unwrap().taken_over(&before, &after).unwrap();
        let refusal = believed.verify(&after).unwrap_err().to_string();
        assert!(refusal.contains("at byte 0"), "{refusal}");
        drop((file, before, after));
        remove(&data_dir).await.unwrap();
    }
}

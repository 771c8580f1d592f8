//! The writable layer's filesystem: freezing it for a snapshot, thawing it, growing it.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

mod calls {
    // linux/fs.h, and Documentation/admin-guide/ext4.rst. The kernel ignores the argument of the first two.
    nix::ioctl_readwrite!(freeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(thaw, b'X', 120, libc::c_int);
    nix::ioctl_write_ptr!(resize, b'f', 16, u64);
}

/// In the layer's topmost directory: the sandbox that it is.
const OWNER: &str = "sandbox-id";
/// The device of the layer.
const DEVICE_SIZE: &str = "/sys/block/vdb/size";
/// How long the device may take to have the size that the host gave it.
const GROWS_WITHIN: Duration = Duration::from_secs(2);
/// In `/sys/block/*/size`, whatever the device's own sector is.
const SECTOR: u64 = 512;

/// The filesystem of the writable layer, whatever is mounted over it.
#[derive(Clone, Debug)]
pub struct Layer(Arc<File>);

impl Layer {
    /// The filesystem that `directory` is on.
    ///
    /// # Errors
    ///
    /// If it cannot be opened.
    pub fn open(directory: &Path) -> io::Result<Self> {
        Ok(Self(Arc::new(File::open(directory)?)))
    }

    /// Writes everything back.
    ///
    /// # Errors
    ///
    /// If the disk fails.
    pub fn write_back(&self) -> io::Result<()> {
        Ok(nix::unistd::syncfs(&*self.0)?)
    }

    /// Writes everything back and holds writers until [`Layer::thaw`].
    ///
    /// # Errors
    ///
    /// If the kernel refuses: `EBUSY` if it is frozen already.
    pub fn freeze(&self) -> io::Result<()> {
        let mut ignored = 0;
        // SAFETY: the descriptor is open, and the argument is a valid integer.
        unsafe { calls::freeze(self.0.as_raw_fd(), &raw mut ignored) }?;
        Ok(())
    }

    /// The sandbox that the filesystem was when its state was last taken; `None` if that never was.
    ///
    /// # Errors
    ///
    /// If the disk fails.
    pub fn owner(&self) -> io::Result<Option<String>> {
        match fs::read_to_string(self.owner_file()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    /// Writes down which sandbox the filesystem is.
    ///
    /// # Errors
    ///
    /// If the disk is full or fails.
    pub fn set_owner(&self, sandbox_id: &str) -> io::Result<()> {
        if self.owner()?.as_deref() == Some(sandbox_id) {
            return Ok(());
        }
        fs::write(self.owner_file(), sandbox_id)
    }

    /// Beside what overlayfs shows: no process of the sandbox's sees it. The directory is not mounted where it was.
    fn owner_file(&self) -> String {
        format!("/proc/self/fd/{}/{OWNER}", self.0.as_raw_fd())
    }

    /// Lets writers go on. Fine if it is not frozen.
    pub fn thaw(&self) {
        let mut ignored = 0;
        // SAFETY: as above. It fails only if nothing is frozen.
        let _ = unsafe { calls::thaw(self.0.as_raw_fd(), &raw mut ignored) };
    }

    /// Whether it is smaller than `mib` MiB, by more than what ext4 takes for its own tables.
    ///
    /// # Errors
    ///
    /// If the kernel does not say.
    pub fn is_smaller(&self, mib: u64) -> io::Result<bool> {
        let stat = nix::sys::statfs::fstatfs(&*self.0)?;
        // What ext4 counts leaves its own tables out, a fiftieth at these sizes.
        Ok(stat.blocks() + stat.blocks() / 32 < self.blocks(mib)?)
    }

    fn blocks(&self, mib: u64) -> io::Result<u64> {
        let block = nix::sys::statfs::fstatfs(&*self.0)?.block_size();
        Ok((mib << 20) / u64::try_from(block).map_err(io::Error::other)?)
    }

    /// Grows it to `mib` MiB.
    ///
    /// # Errors
    ///
    /// If its device is not that large in time, or the kernel refuses.
    #[expect(clippy::disallowed_methods, reason = "it runs on a thread that may block")]
    pub fn grow(&self, mib: u64) -> io::Result<()> {
        let wanted = self.blocks(mib)?;
        let begun = Instant::now();
        while device_size()? < mib << 20 {
            if begun.elapsed() > GROWS_WITHIN {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the disk did not grow in time"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: the descriptor is open, and the argument is a valid integer.
        unsafe { calls::resize(self.0.as_raw_fd(), &raw const wanted) }?;
        Ok(())
    }
}

fn device_size() -> io::Result<u64> {
    let sectors: u64 = fs::read_to_string(DEVICE_SIZE)?.trim().parse().map_err(io::Error::other)?;
    Ok(sectors * SECTOR)
}

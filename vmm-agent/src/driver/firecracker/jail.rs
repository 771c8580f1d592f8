//! The directory that is all that a jailed VMM sees, and that its user owns.
//!
//! ```text
//!   HOME/jail/firecracker/VM/root     what the jailer makes the VMM's root; below, all but the last is the agent's
//!     kernel, initramfs, base         what it boots from; its to read
//!     layer                           the writable layer
//!     memory, state                   what it is restored from
//!     saved.memory, saved.state       what it is saved to, while it is
//!     api.sock, guest.sock            made by the VMM
//!     metrics                         a FIFO
//!     pages.sock                      where it asks for its memory, while it is restored on huge pages
//! ```
//!
//! Files are lent as links, so that whatever becomes of the names in there, the agent has its own. A VMM that was taken over by
//! its guest can put anything in their place: nothing is opened here by following links.

use std::{
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, lchown},
    },
    path::{Path, PathBuf},
};

use fs_err as fs;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, mkfifoat, openat2},
    io::Errno,
};
use tokio::net::{UnixListener, UnixSocket, UnixStream};

use crate::driver::{durable, home::Home};

/// Who connects there is one VMM, once.
const BACKLOG: u32 = 1;

/// The API's socket.
pub const API: &str = "api.sock";
/// What leads to the guest's ports.
pub const GUEST: &str = "guest.sock";
/// Where the VMM writes what it counts.
pub const METRICS: &str = "metrics";

/// A jail.
#[derive(Clone, Debug)]
pub struct Jail {
    root: PathBuf,
    uid: u32,
}

impl Jail {
    /// Makes the jail of the VMM in `home`, whose program's file is called `program`, in the place of any that was there.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn create(home: &Home, program: &str) -> io::Result<Self> {
        let base = home.jail();
        durable::remove(&base)?;
        let root = base.join(program).join(home.vm()).join("root");
        DirBuilder::new().recursive(true).mode(0o700).create(&root)?;
        let jail = Self { root, uid: home.uid() };
        mkfifoat(CWD, jail.root.join(METRICS), Mode::RUSR | Mode::WUSR)?;
        fs_err::os::unix::fs::chown(jail.root.join(METRICS), Some(jail.uid), Some(jail.uid))?;
        Ok(jail)
    }

    /// The jail in `home`, which an earlier agent has made.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn find(home: &Home) -> io::Result<Self> {
        let program = fs::read_dir(home.jail())?.next().ok_or(io::ErrorKind::NotFound)??;
        Ok(Self { root: program.path().join(home.vm()).join("root"), uid: home.uid() })
    }

    /// Lets the VMM have the file `from`, as `name`.
    ///
    /// # Errors
    ///
    /// If it cannot be linked: both must be on one filesystem.
    pub fn lend(&self, from: &Path, name: &str) -> io::Result<()> {
        let at = self.root.join(name);
        self.take_back(name)?;
        std::fs::hard_link(from, &at).map_err(|error| {
            let remedy = match Errno::from_io_error(&error) {
                Some(Errno::XDEV) => "; the data directory and the templates must be on one filesystem",
                _ => "",
            };
            io::Error::new(error.kind(), format!("cannot lend {}: {error}{remedy}", from.display()))
        })
    }

    /// Takes the name away from the VMM; the file is still there. Fine if it is gone.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn take_back(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.root.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Connects to the socket called `name`.
    ///
    /// # Errors
    ///
    /// If nobody listens there, or it is not a socket of the VMM's.
    pub async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let socket = self.open(name, OFlags::PATH, FileType::Socket)?;
        // However deep a home lies, this way is short enough for a socket's address (unix(7)).
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }

    /// Listens on a socket called `name`, that the VMM's user alone can connect to.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn listen(&self, name: &str) -> io::Result<UnixListener> {
        self.take_back(name)?;
        let root = File::open(&self.root)?;
        let at = format!("/proc/self/fd/{}/{name}", root.as_raw_fd());
        let socket = UnixSocket::new_stream()?;
        // Linux makes the file with the permissions of the descriptor: no name has to be followed for them.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        socket.bind(&at)?;
        lchown(&at, Some(self.uid), Some(self.uid))?;
        socket.listen(BACKLOG)
    }

    /// The VMM's user.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Opens the FIFO of what the VMM counts, for reading. It need not have been opened for writing.
    ///
    /// # Errors
    ///
    /// If it is not the one that was made.
    pub fn open_metrics(&self) -> io::Result<OwnedFd> {
        self.open(METRICS, OFlags::RDONLY | OFlags::NONBLOCK, FileType::Fifo)
    }

    /// Opens what is called `name`, if it is of that kind and the VMM's own.
    fn open(&self, name: &str, flags: OFlags, kind: FileType) -> io::Result<OwnedFd> {
        let root = File::open(&self.root)?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat2(&root, name, flags, Mode::empty(), resolve)?;
        let stat = fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != kind || stat.st_uid != self.uid {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("what a VMM has as {name} is not that"),
            ));
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    fn jail(dir: &Path) -> (Home, Jail) {
        let home = Home::of(dir, "vm-000000000001");
        home.create().unwrap();
        let jail = Jail::create(&home, "firecracker").unwrap();
        (home, jail)
    }

    fn own(jail: &Jail, name: &str) {
        let path = jail.root.join(name);
        lchown(path, Some(jail.uid), Some(jail.uid)).unwrap();
    }

    #[tokio::test]
    async fn only_what_is_the_vmms_own_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (home, jail) = jail(dir.path());
        assert_eq!(Jail::find(&home).unwrap().root, jail.root);
        jail.open_metrics().unwrap();
        let refused = |jail: Jail| async move {
            let error = jail.connect(API).await.unwrap_err();
            error.raw_os_error().ok_or_else(|| error.kind())
        };
        assert_eq!(refused(jail.clone()).await, Ok(libc::ENOENT));
        let elsewhere = dir.path().join("elsewhere.sock");
        let _listener = UnixListener::bind(&elsewhere).unwrap();
        // A link to another socket, another's socket by its very self, a file, a way out.
        symlink(&elsewhere, jail.root.join(API)).unwrap();
        own(&jail, API);
        assert_eq!(refused(jail.clone()).await, Err(io::ErrorKind::InvalidData));
        jail.take_back(API).unwrap();
        std::fs::hard_link(&elsewhere, jail.root.join(API)).unwrap();
        assert_eq!(refused(jail.clone()).await, Err(io::ErrorKind::InvalidData));
        jail.take_back(API).unwrap();
        std::fs::write(jail.root.join(API), "").unwrap();
        own(&jail, API);
        assert_eq!(refused(jail.clone()).await, Err(io::ErrorKind::InvalidData));
        assert!(jail.connect("../../../../elsewhere.sock").await.is_err());
        jail.take_back(API).unwrap();
        let _listener = UnixListener::bind(jail.root.join(API)).unwrap();
        own(&jail, API);
        jail.connect(API).await.unwrap();
        // Something else in the place of the FIFO.
        jail.take_back(METRICS).unwrap();
        symlink("/dev/zero", jail.root.join(METRICS)).unwrap();
        assert!(jail.open_metrics().is_err());
    }

    #[test]
    fn what_is_lent_is_the_same_file_and_taken_back_by_name_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (home, jail) = jail(dir.path());
        let file = home.add_file("layer.img").unwrap();
        jail.lend(&file, "layer").unwrap();
        std::fs::write(jail.root.join("layer"), "written").unwrap();
        // Whatever the name leads to by now.
        std::fs::remove_file(jail.root.join("layer")).unwrap();
        symlink("/etc/passwd", jail.root.join("layer")).unwrap();
        jail.lend(&file, "layer").unwrap();
        assert!(!jail.root.join("layer").is_symlink());
        jail.take_back("layer").unwrap();
        jail.take_back("layer").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"written");
        let other = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let refusal = jail.lend(other.path(), "base").unwrap_err().to_string();
        assert!(refusal.contains("one filesystem"), "{refusal}");
    }
}

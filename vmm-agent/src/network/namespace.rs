//! Named network namespaces, and threads that are in one.
//!
//! A namespace belongs to a thread, so whatever is to happen in one happens on a thread that ends with it. A socket stays in
//! the namespace that it was made in, whoever uses it.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::Arc,
    thread,
};

use fs_err::File;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use tokio::sync::oneshot;

use super::plan::{NAMESPACES, Names};

/// Makes the namespace called `name`, and does `work` in it. What was made stays, whatever becomes of that.
///
/// # Errors
///
/// If it exists, or the host does not permit.
pub async fn create<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    on_thread(move || {
        fs::create_dir_all(NAMESPACES)?;
        let file = Names::file(&name);
        drop(File::create_new(&file)?);
        let made = unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from).and_then(|()| {
            let own = Some("/proc/thread-self/ns/net");
            Ok(mount(own, &file, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
        });
        if let Err(error) = made {
            let _ = fs::remove_file(&file);
            return Err(error);
        }
        work()
    })
    .await
}

/// A namespace, whichever has its name by now: it stays as long as this. Clones are the same.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<OwnedFd>);

impl Namespace {
    /// The one called `name`.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn open(name: &str) -> io::Result<Self> {
        Ok(Self(Arc::new(File::open(Names::file(name))?.into_parts().0.into())))
    }

    /// Does `work` in it.
    ///
    /// # Errors
    ///
    /// What `work` says, or if there is no thread.
    pub async fn enter<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let namespace = Arc::clone(&self.0);
        on_thread(move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
            work()
        })
        .await
    }
}

/// Does `work` in the namespace called `name`.
///
/// # Errors
///
/// If there is none, or what `work` says.
pub async fn enter<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    Namespace::open(&name)?.enter(work).await
}

/// Forgets the namespace called `name`, which ends with the last who uses it. Fine if there is none.
///
/// # Errors
///
/// If it resists.
pub fn remove(name: &str) -> io::Result<()> {
    let file = Names::file(name);
    // One that was not mounted yet is a plain file. It may be mounted more than once.
    loop {
        match umount2(&file, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The names of all namespaces that have one.
///
/// # Errors
///
/// If they cannot be listed.
pub fn all() -> io::Result<Vec<String>> {
    match fs::read_dir(NAMESPACES) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether there is a namespace of that name, not only a file.
pub fn exists(name: &str) -> bool {
    let file = Names::file(name);
    let magic = nix::sys::statfs::statfs(&file).map(|stat| stat.filesystem_type());
    magic.is_ok_and(|magic| magic == nix::sys::statfs::NSFS_MAGIC) && Path::new(&file).exists()
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    // Not one of the runtime's: it would take its namespace to whatever it does next.
    thread::Builder::new().name("namespace".to_owned()).spawn(move || {
        // Nobody waits for it any more: it is done all the same.
        let _ = done.send(work());
    })?;
    result.await.map_err(|_| io::Error::other("a thread in a namespace has panicked"))?
}

//! Seeing what other processes commit, and watches.

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::Stream;
use nix::{
    fcntl::AT_FDCWD,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        inotify::{AddWatchFlags, InitFlags, Inotify},
        stat::{UtimensatFlags, utimensat},
        time::TimeSpec,
    },
};
use tokio::sync::watch;

use super::{Readers, read, schema, write::publish_newer};
use crate::store::{Event, Revision, StoreError};

/// How often is looked where inotify tells of commits: for one whose process died before it could tell.
const POLL: Duration = Duration::from_secs(1);
/// How often is looked where there is no inotify.
const POLL_BLIND: Duration = Duration::from_millis(50);

/// Tells all processes that this one has committed.
///
/// That the WAL file is written is no sign: it is written first, then synced, and only then committed, in shared memory
/// that inotify does not see. So the committer touches the file afterwards.
pub(super) fn tell(wal: &Path) {
    let now = TimeSpec::UTIME_NOW;
    if let Err(error) = utimensat(AT_FDCWD, wal, &now, &now, UtimensatFlags::FollowSymlink) {
        tracing::debug!(%error, "other processes see the commit when they look");
    }
}

/// The thread that looks for commits of other processes; ends when this is dropped.
pub(super) struct Follower {
    stop: Arc<AtomicBool>,
    wal: PathBuf,
}

impl Follower {
    pub(super) fn start(path: &Path, publish: Arc<watch::Sender<Revision>>) -> Result<Self, StoreError> {
        let reader = schema::open_reader(path)?;
        let wal = schema::beside(path, "-wal");
        // The WAL file exists from the first write on, which opening the store has made, until the last process has
        // closed the store.
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).and_then(|inotify| {
            inotify.add_watch(&wal, AddWatchFlags::IN_ATTRIB)?;
            Ok(inotify)
        });
        if let Err(error) = &inotify {
            tracing::warn!(%error, "inotify is not to be had: changes by other processes are seen by polling");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::Builder::new()
            .name("store-follower".into())
            .spawn(move || {
                let mut is_broken = false;
                while !stopped.load(Ordering::Relaxed) {
                    match read::revision(&reader) {
                        Ok(revision) => {
                            publish_newer(&publish, revision);
                            is_broken = false;
                        }
                        Err(error) if !is_broken => {
                            tracing::warn!(%error, "store cannot be read");
                            is_broken = true;
                        }
                        Err(_) => {}
                    }
                    wait(inotify.as_ref().ok());
                }
            })
            .map_err(|error| StoreError::Unavailable(format!("store thread: {error}")))?;
        Ok(Self { stop, wal })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        tell(&self.wal);
    }
}

/// Returns when somebody has [told](tell) of a commit, or after a while.
fn wait(inotify: Option<&Inotify>) {
    let Some(inotify) = inotify else {
        let _ = poll(&mut [], poll_timeout(POLL_BLIND));
        return;
    };
    let mut files = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
    if let Ok(1..) = poll(&mut files, poll_timeout(POLL)) {
        // What the events say does not matter; they are read until there are none.
        while inotify.read_events().is_ok() {}
    }
}

fn poll_timeout(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)
}

/// The changes after `after` to keys that begin with `prefix`, for ever.
pub(super) fn changes(
    readers: Arc<Readers>,
    mut newest: watch::Receiver<Revision>,
    prefix: String,
    after: Revision,
) -> impl Stream<Item = Result<Vec<Event>, StoreError>> + Send {
    async_stream::try_stream! {
        let mut seen = after;
        loop {
            let asked = prefix.clone();
            let (groups, until) = readers.run(move |connection| read::changes(connection, &asked, seen)).await?;
            for group in groups {
                yield group;
            }
            if until > seen {
                seen = until;
                continue;
            }
            if newest.wait_for(|revision| *revision > seen).await.is_err() {
                Err(StoreError::Unavailable("the store was closed".into()))?;
            }
        }
    }
}

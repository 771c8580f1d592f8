//! What happens in a directory, as it happens.
//!
//! Each call has an inotify instance and a task that reads it as fast as its caller takes what is told. Nothing is
//! queued between the two: what a slow caller leaves lying is kept by the kernel, up to its own bound, and beyond it
//! the caller is told to look again.

mod tree;

use std::{
    os::fd::{AsRawFd, RawFd},
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use oc_proto::v1::{FileEventType, WatchDirectoryResponse};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedSemaphorePermit, mpsc},
    task::JoinSet,
    time::timeout,
};
use tonic::Status;

use self::tree::{Told, Tree};
use super::blocking;
use crate::refusal::Refusal;

/// Messages that wait for the caller.
const AHEAD: usize = 16;
/// How long the second half of a renaming may take after the first.
const PAIRS_WITHIN: Duration = Duration::from_millis(10);

type Message = Result<WatchDirectoryResponse, Status>;

/// The answer's messages.
#[derive(Debug)]
pub struct Stream {
    messages: mpsc::Receiver<Message>,
    /// Ends with the answer.
    _watcher: JoinSet<()>,
}

impl futures_util::Stream for Stream {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        self.messages.poll_recv(context)
    }
}

/// Watches what `root` holds, and has `room` to.
///
/// # Errors
///
/// What the file system said; `NOT_A_DIRECTORY`, `TOO_MANY_WATCHES`.
pub async fn watch(root: PathBuf, is_recursive: bool, room: OwnedSemaphorePermit) -> Result<Stream, Status> {
    let tree = blocking(move || Tree::begin(root, is_recursive)).await?;
    let (sender, messages) = mpsc::channel(AHEAD);
    let mut watcher = JoinSet::new();
    watcher.spawn(async move {
        let _room = room;
        let begun = WatchDirectoryResponse::default();
        if sender.send(Ok(begun)).await.is_ok()
            && let Err(error) = tell(tree, &sender).await
        {
            let _ = sender.send(Err(error)).await;
        }
    });
    Ok(Stream { messages, _watcher: watcher })
}

/// A tree that is read when something has happened in it.
struct Watched(Tree);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0.descriptor()
    }
}

#[allow(unsafe_code)]
fn watched(tree: Tree) -> Result<AsyncFd<Watched>, Status> {
    // SAFETY: the descriptor is owned by the tree, which keeps it open and the same for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(Watched(tree), Interest::READABLE) }
        .map_err(|error| Refusal::Internal.status(format!("inotify: {error}")))
}

/// Tells what happens until the directory is gone, or nobody listens.
async fn tell(tree: Tree, sender: &mpsc::Sender<Message>) -> Result<(), Status> {
    let mut tree = watched(tree)?;
    loop {
        let events = match read(&mut tree).await? {
            Some(events) => events,
            None => {
                if send(sender, tree.get_mut().0.settle()).await.is_none() {
                    return Ok(());
                }
                continue;
            }
        };
        let told = if tree.get_ref().0.needs_disk(&events) {
            let mut inner = tree.into_inner().0;
            let (inner, told) = blocking(move || {
                let told = inner.take(events)?;
                Ok((inner, told))
            })
            .await?;
            tree = watched(inner)?;
            told
        } else {
            tree.get_mut().0.take(events)?
        };
        let Told { messages, is_over, is_lost } = told;
        if is_lost {
            // What was made or renamed is not known any more: the watches are set anew before the caller looks.
            let lost = tree.into_inner().0;
            let Some(again) = blocking(move || lost.again()).await? else { return Ok(()) };
            tree = watched(again)?;
        }
        let overflow = is_lost.then(|| event(FileEventType::Overflow));
        if send(sender, messages.into_iter().chain(overflow)).await.is_none() || is_over {
            return Ok(());
        }
    }
}

/// The next events; none when a renaming has waited long enough for its other half.
async fn read(tree: &mut AsyncFd<Watched>) -> Result<Option<Vec<nix::sys::inotify::InotifyEvent>>, Status> {
    loop {
        let is_waiting = tree.get_ref().0.is_waiting();
        let mut ready = if is_waiting {
            match timeout(PAIRS_WITHIN, tree.readable_mut()).await {
                Ok(ready) => ready,
                Err(_) => return Ok(None),
            }
        } else {
            tree.readable_mut().await
        }
        .map_err(|error| Refusal::Internal.status(format!("inotify: {error}")))?;
        match ready.try_io(|tree| tree.get_ref().0.read()) {
            Ok(Ok(events)) => return Ok(Some(events)),
            Ok(Err(error)) => return Err(Refusal::Internal.status(format!("inotify: {error}"))),
            Err(_) => tree.get_mut().0.caught_up(),
        }
    }
}

/// Sends all; nothing where nobody listens.
async fn send(
    sender: &mpsc::Sender<Message>,
    messages: impl IntoIterator<Item = WatchDirectoryResponse>,
) -> Option<()> {
    for message in messages {
        sender.send(Ok(message)).await.ok()?;
    }
    Some(())
}

fn event(what: FileEventType) -> WatchDirectoryResponse {
    WatchDirectoryResponse { r#type: what.into(), ..Default::default() }
}

#[cfg(test)]
#[path = "watch/tests.rs"]
mod tests;

//! Directories as tar archives (POSIX.1-2001, pax), out and in.
//!
//! Both ways a thread of its own handles the files, and a short queue joins it to the call.

mod pack;
mod target;
mod unpack;

use std::path::PathBuf;

use oc_proto::v1::{ReadArchiveResponse, WriteArchiveRequest, WriteArchiveResponse};
use prost::bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Owner, blocking};

/// Messages that are read ahead, either way.
const AHEAD: usize = 2;

/// The messages of an archive on its way out.
pub type Stream = ReceiverStream<Result<ReadArchiveResponse, Status>>;

/// Packs what is at `path`, as fast as the messages are taken, on a thread that has `room`.
///
/// # Errors
///
/// What the file system said; `NOT_A_FILE` if it is neither a directory nor a regular file.
pub async fn read(path: PathBuf, room: OwnedSemaphorePermit) -> Result<Stream, Status> {
    let top = blocking(move || pack::Top::open(&path)).await?;
    let (sender, messages) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        top.send(&sender);
        drop(room);
    });
    Ok(ReceiverStream::new(messages))
}

/// Unpacks `first` and what follows into `path`, on a thread that has `room`.
///
/// # Errors
///
/// That the stream broke, or what is wrong with an entry; then those before it stay.
pub async fn write(
    path: PathBuf,
    first: Bytes,
    mut parts: Streaming<WriteArchiveRequest>,
    room: OwnedSemaphorePermit,
) -> Result<WriteArchiveResponse, Status> {
    let (sender, queue) = mpsc::channel(AHEAD);
    let unpacked = blocking(move || {
        let done = unpack::unpack(&path, queue, Owner::of_new_files());
        drop(room);
        done
    });
    let mut unpacked = std::pin::pin!(unpacked);
    let feed = async move {
        let mut next = Ok(first);
        loop {
            let is_last = next.is_err();
            // The other side is done, one way or the other.
            if sender.send(next).await.is_err() || is_last {
                return;
            }
            next = match parts.message().await {
                Ok(Some(part)) => Ok(part.body.map(|body| body.data).unwrap_or_default()),
                Ok(None) => return,
                Err(broken) => Err(broken),
            };
        }
    };
    tokio::select! {
        biased;
        done = &mut unpacked => done,
        () = feed => unpacked.await,
    }
}

#[cfg(test)]
#[path = "archive/tests.rs"]
mod tests;

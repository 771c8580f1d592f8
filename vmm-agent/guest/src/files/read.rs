//! A file on its way out.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use oc_proto::{
    google::api::HttpBody,
    v1::{FileInfo, ReadFileResponse},
};
use prost::bytes::BytesMut;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::info;
use crate::refusal::{Refusal, io_status};

/// Bytes of one message.
const PART: usize = 512 << 10;
/// Messages that are read ahead.
const AHEAD: usize = 2;
const CONTENT_TYPE: &str = "application/octet-stream";

/// The answer's messages.
pub type Stream = ReceiverStream<Result<ReadFileResponse, Status>>;

/// A file that is open at the first byte wanted.
#[derive(Debug)]
pub struct Reading {
    file: File,
    path: PathBuf,
    info: FileInfo,
    left: u64,
}

/// The first byte and the number of bytes that are wanted.
///
/// # Errors
///
/// If one is negative.
pub fn range(offset: i64, limit: i64) -> Result<(u64, u64), Status> {
    let natural = |name: &str, value| {
        u64::try_from(value).map_err(|_| Refusal::InvalidArgument.status(format!("{name} is negative")))
    };
    let limit = natural("limit", limit)?;
    Ok((natural("offset", offset)?, if limit == 0 { u64::MAX } else { limit }))
}

/// Opens the regular file at `path`.
///
/// # Errors
///
/// What the file system said; `NOT_A_FILE`.
pub fn open(path: &Path, offset: u64, limit: u64) -> Result<Reading, Status> {
    let failed = |error| io_status(path, &error);
    // A pipe without a writer must not hold the thread.
    let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Refusal::NotAFile.status(format!("{} is no regular file", path.display())));
    }
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    Ok(Reading { file, path: path.into(), info: info::describe(path, &metadata), left: limit })
}

impl Reading {
    /// Reads on another thread, which has `room`, as fast as the messages are taken.
    pub fn stream(self, room: OwnedSemaphorePermit) -> Stream {
        let (sender, messages) = mpsc::channel(AHEAD);
        tokio::task::spawn_blocking(move || {
            self.send(&sender);
            drop(room);
        });
        ReceiverStream::new(messages)
    }

    fn send(mut self, sender: &mpsc::Sender<Result<ReadFileResponse, Status>>) {
        let mut info = Some(self.info);
        loop {
            let wanted = usize::try_from(self.left).unwrap_or(PART).min(PART);
            let mut part = BytesMut::zeroed(wanted);
            let read = match self.file.read(&mut part) {
                Ok(read) => read,
                Err(error) => {
                    let _ = sender.blocking_send(Err(io_status(&self.path, &error)));
                    return;
                }
            };
            // The first message goes out for an empty file too.
            if read == 0 && info.is_none() {
                return;
            }
            part.truncate(read);
            self.left -= read as u64;
            let body =
                HttpBody { content_type: CONTENT_TYPE.into(), data: part.freeze(), extensions: Vec::new() };
            let message = ReadFileResponse { info: info.take(), body: Some(body) };
            // The caller may have gone away.
            if sender.blocking_send(Ok(message)).is_err() || read == 0 {
                return;
            }
        }
    }
}

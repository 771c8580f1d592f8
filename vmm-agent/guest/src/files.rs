//! `oc.v1.FileService`: files of the guest, as root sees them.

mod archive;
mod info;
mod path;
mod read;
mod tree;
mod watch;
mod write;

use std::{path::PathBuf, sync::Arc};

use oc_proto::v1::{
    ListDirectoryRequest, ListDirectoryResponse, MakeDirectoryRequest, MakeDirectoryResponse,
    ReadArchiveRequest, ReadFileRequest, RemoveFileRequest, RemoveFileResponse, RenameFileRequest,
    RenameFileResponse, StatFileRequest, StatFileResponse, WatchDirectoryRequest, WriteArchiveRequest,
    WriteArchiveResponse, WriteFileRequest, WriteFileResponse, file_service_server::FileService,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};
use tonic::{Request, Response, Status, Streaming};

use self::path::resolve;
use crate::{
    refusal::Refusal,
    users::{self, User},
};

/// Who owns what is made, until the template has the user it should be.
const FALLBACK: u32 = 1000;

/// Files that are read, and archives either way, at once. Each has a thread that waits for its caller, and all other calls
/// need threads too.
const MAX_THREADS: usize = 32;
/// Calls that watch directories at once: half of the kernel's instances of a user (inotify(7), `max_user_instances`).
const MAX_WATCHES: usize = 64;

/// Reads and writes files.
#[derive(Clone, Debug)]
pub struct Files {
    threads: Arc<Semaphore>,
    watches: Arc<Semaphore>,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            threads: Arc::new(Semaphore::new(MAX_THREADS)),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
        }
    }
}

impl Files {
    /// A thread for a call that waits for its caller.
    fn thread(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.threads).try_acquire_owned().map_err(|_| {
            Refusal::Overloaded.status(format!("{MAX_THREADS} files or archives are on their way already"))
        })
    }
}

/// Owner of new files: user and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    /// The user that commands run as by default.
    fn of_new_files() -> Self {
        let user = users::find(users::DEFAULT).ok().flatten();
        user.map_or(Self { uid: FALLBACK, gid: FALLBACK }, |User { uid, gid, .. }| Self { uid, gid })
    }
}

/// Does on another thread what blocks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    spawn_blocking(work).await.unwrap_or_else(|error| Err(Refusal::Internal.status(error.to_string())))
}

#[tonic::async_trait]
impl FileService for Files {
    type ReadFileStream = read::Stream;

    async fn read_file(
        &self,
        request: Request<ReadFileRequest>,
    ) -> Result<Response<Self::ReadFileStream>, Status> {
        let request = request.into_inner();
        let path = resolve(&request.path)?;
        let (offset, limit) = read::range(request.offset, request.limit)?;
        let room = self.thread()?;
        let file = blocking(move || read::open(&path, offset, limit)).await?;
        Ok(Response::new(file.stream(room)))
    }

    async fn write_file(
        &self,
        request: Request<Streaming<WriteFileRequest>>,
    ) -> Result<Response<WriteFileResponse>, Status> {
        let mut parts = request.into_inner();
        let Some(first) = parts.message().await? else {
            return Err(Refusal::InvalidArgument.status("the stream has no message"));
        };
        let (path, mode) = (resolve(&first.path)?, first.mode);
        let mut file = blocking(move || write::Pending::begin(&path, mode, Owner::of_new_files())).await?;
        let mut next = first.body;
        loop {
            if let Some(body) = next.filter(|body| !body.data.is_empty()) {
                file = blocking(move || file.append(&body.data)).await?;
            }
            match parts.message().await? {
                Some(part) => next = part.body,
                None => break,
            }
        }
        let info = blocking(move || file.commit()).await?;
        Ok(Response::new(WriteFileResponse { info: Some(info) }))
    }

    async fn list_directory(
        &self,
        request: Request<ListDirectoryRequest>,
    ) -> Result<Response<ListDirectoryResponse>, Status> {
        let path = resolve(&request.into_inner().path)?;
        let entries = blocking(move || tree::list(&path)).await?;
        Ok(Response::new(ListDirectoryResponse { entries }))
    }

    async fn stat_file(
        &self,
        request: Request<StatFileRequest>,
    ) -> Result<Response<StatFileResponse>, Status> {
        let path = resolve(&request.into_inner().path)?;
        let info = blocking(move || info::of(&path)).await?;
        Ok(Response::new(StatFileResponse { info: Some(info) }))
    }

    async fn make_directory(
        &self,
        request: Request<MakeDirectoryRequest>,
    ) -> Result<Response<MakeDirectoryResponse>, Status> {
        let request = request.into_inner();
        let path = resolve(&request.path)?;
        blocking(move || tree::make(&path, request.mode, Owner::of_new_files())).await?;
        Ok(Response::new(MakeDirectoryResponse {}))
    }

    async fn remove_file(
        &self,
        request: Request<RemoveFileRequest>,
    ) -> Result<Response<RemoveFileResponse>, Status> {
        let path: PathBuf = resolve(&request.into_inner().path)?;
        blocking(move || tree::remove(&path)).await?;
        Ok(Response::new(RemoveFileResponse {}))
    }

    async fn rename_file(
        &self,
        request: Request<RenameFileRequest>,
    ) -> Result<Response<RenameFileResponse>, Status> {
        let request = request.into_inner();
        let (from, to) = (resolve(&request.from)?, resolve(&request.to)?);
        blocking(move || tree::rename(&from, &to)).await?;
        Ok(Response::new(RenameFileResponse {}))
    }

    type WatchDirectoryStream = watch::Stream;

    async fn watch_directory(
        &self,
        request: Request<WatchDirectoryRequest>,
    ) -> Result<Response<Self::WatchDirectoryStream>, Status> {
        let request = request.into_inner();
        let path = resolve(&request.path)?;
        let Ok(room) = Arc::clone(&self.watches).try_acquire_owned() else {
            let text = format!("{MAX_WATCHES} calls watch directories already");
            return Err(Refusal::TooManyWatches.status(text));
        };
        Ok(Response::new(watch::watch(path, request.recursive, room).await?))
    }

    type ReadArchiveStream = archive::Stream;

    async fn read_archive(
        &self,
        request: Request<ReadArchiveRequest>,
    ) -> Result<Response<Self::ReadArchiveStream>, Status> {
        let path = resolve(&request.into_inner().path)?;
        let room = self.thread()?;
        Ok(Response::new(archive::read(path, room).await?))
    }

    async fn write_archive(
        &self,
        request: Request<Streaming<WriteArchiveRequest>>,
    ) -> Result<Response<WriteArchiveResponse>, Status> {
        let mut parts = request.into_inner();
        let Some(first) = parts.message().await? else {
            return Err(Refusal::InvalidArgument.status("the stream has no message"));
        };
        let path = resolve(&first.path)?;
        let data = first.body.map(|body| body.data).unwrap_or_default();
        let room = self.thread()?;
        Ok(Response::new(archive::write(path, data, parts, room).await?))
    }
}

//! Files in a map.

use std::sync::{Arc, Mutex};

use futures_util::{StreamExt as _, stream, stream::BoxStream};
use oc_proto::{
    google::api::HttpBody,
    v1::{file_service_server::FileService, file_url_service_server::FileUrlService, *},
};
use tokio_stream::{Iter, iter};
use tonic::{Code, Request, Response, Status, Streaming};

use super::{State, refused};

#[derive(Clone)]
pub enum Entry {
    File { content: Vec<u8>, mode: u32 },
    Directory,
    Link(String),
}

pub struct Files(pub Arc<Mutex<State>>);

/// Absolute, without `.` and doubled slashes.
fn normal(path: &str) -> String {
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/home/sandbox/{path}") };
    let parts: Vec<_> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    format!("/{}", parts.join("/"))
}

fn info(path: &str, entry: &Entry) -> FileInfo {
    let mut info = FileInfo {
        name: path.rsplit('/').next().unwrap().to_owned(),
        path: path.to_owned(),
        ..FileInfo::default()
    };
    match entry {
        Entry::File { content, mode } => {
            info.set_type(FileType::File);
            (info.size, info.mode) = (i64::try_from(content.len()).unwrap(), *mode);
        }
        Entry::Directory => {
            info.set_type(FileType::Directory);
            info.is_dir = true;
        }
        Entry::Link(target) => {
            info.set_type(FileType::Symlink);
            info.link_target.clone_from(target);
        }
    }
    info
}

impl Files {
    fn find(&self, path: &str) -> Result<(String, Entry), Status> {
        let path = normal(path);
        let found = self.0.lock().unwrap().files.get(&path).cloned();
        let found = match path.as_str() {
            "/" | "/home/sandbox" => Some(Entry::Directory),
            _ => found,
        };
        found
            .map(|entry| (path.clone(), entry))
            .ok_or_else(|| refused(Code::NotFound, "FILE_NOT_FOUND", &format!("there is no file {path}")))
    }

    fn follow(&self, path: &str) -> Result<(String, Entry), Status> {
        match self.find(path)? {
            (_, Entry::Link(target)) => self.find(&target),
            found => Ok(found),
        }
    }
}

#[tonic::async_trait]
impl FileService for Files {
    type ReadFileStream = Iter<std::vec::IntoIter<Result<ReadFileResponse, Status>>>;

    async fn read_file(
        &self,
        request: Request<ReadFileRequest>,
    ) -> Result<Response<Self::ReadFileStream>, Status> {
        let path = request.into_inner().path;
        let (path, entry) = self.follow(&path)?;
        let Entry::File { content, .. } = &entry else {
            return Err(refused(Code::FailedPrecondition, "NOT_A_FILE", &format!("{path} is not a file")));
        };
        let mut messages = vec![Ok(ReadFileResponse { info: Some(info(&path, &entry)), body: None })];
        for part in content.chunks(512 << 10) {
            let body = HttpBody { data: part.to_vec().into(), ..HttpBody::default() };
            messages.push(Ok(ReadFileResponse { info: None, body: Some(body) }));
        }
        if path.ends_with("breaks") {
            messages.push(Err(refused(Code::Internal, "INTERNAL", "the disk is on fire")));
        }
        Ok(Response::new(iter(messages)))
    }

    async fn write_file(
        &self,
        request: Request<Streaming<WriteFileRequest>>,
    ) -> Result<Response<WriteFileResponse>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.unwrap();
        self.0.lock().unwrap().uploads += 1;
        let path = normal(&first.path);
        if path.starts_with("/full") {
            return Err(refused(Code::ResourceExhausted, "GUEST_DISK_FULL", "the disk is full"));
        }
        let mut content = first.body.unwrap_or_default().data.to_vec();
        loop {
            match messages.message().await {
                Ok(Some(message)) => {
                    let data = message.body.unwrap_or_default().data;
                    assert!(data.len() <= 1 << 20, "the contract allows 1 MiB");
                    content.extend_from_slice(&data);
                }
                Ok(None) => break,
                Err(status) => {
                    self.0.lock().unwrap().broken_uploads += 1;
                    return Err(status);
                }
            }
        }
        let entry = Entry::File { content, mode: first.mode };
        let info = Some(info(&path, &entry));
        self.0.lock().unwrap().files.insert(path, entry);
        Ok(Response::new(WriteFileResponse { info }))
    }

    async fn list_directory(
        &self,
        request: Request<ListDirectoryRequest>,
    ) -> Result<Response<ListDirectoryResponse>, Status> {
        let (path, entry) = self.follow(&request.into_inner().path)?;
        if !matches!(entry, Entry::Directory) {
            return Err(refused(Code::FailedPrecondition, "NOT_A_DIRECTORY", "not a directory"));
        }
        let below = format!("{}/", path.trim_end_matches('/'));
        let state = self.0.lock().unwrap();
        let entries = state.files.iter().filter_map(|(path, entry)| {
            let name = path.strip_prefix(&below)?;
            // A name that means harm comes as it is.
            let direct = !name.contains('/') || name.contains("..");
            direct.then(|| FileInfo { name: name.to_owned(), ..info(path, entry) })
        });
        Ok(Response::new(ListDirectoryResponse { entries: entries.collect() }))
    }

    async fn stat_file(
        &self,
        request: Request<StatFileRequest>,
    ) -> Result<Response<StatFileResponse>, Status> {
        let (path, entry) = self.find(&request.into_inner().path)?;
        Ok(Response::new(StatFileResponse { info: Some(info(&path, &entry)) }))
    }

    async fn make_directory(
        &self,
        request: Request<MakeDirectoryRequest>,
    ) -> Result<Response<MakeDirectoryResponse>, Status> {
        self.0.lock().unwrap().files.insert(normal(&request.into_inner().path), Entry::Directory);
        Ok(Response::new(MakeDirectoryResponse {}))
    }

    async fn remove_file(
        &self,
        request: Request<RemoveFileRequest>,
    ) -> Result<Response<RemoveFileResponse>, Status> {
        let (path, _) = self.find(&request.into_inner().path)?;
        self.0
            .lock()
            .unwrap()
            .files
            .retain(|other, _| *other != path && !other.starts_with(&format!("{path}/")));
        Ok(Response::new(RemoveFileResponse {}))
    }

    async fn rename_file(
        &self,
        request: Request<RenameFileRequest>,
    ) -> Result<Response<RenameFileResponse>, Status> {
        let RenameFileRequest { from, to, .. } = request.into_inner();
        let (from, entry) = self.find(&from)?;
        let mut state = self.0.lock().unwrap();
        state.files.remove(&from);
        state.files.insert(normal(&to), entry);
        Ok(Response::new(RenameFileResponse {}))
    }

    type WatchDirectoryStream = BoxStream<'static, Result<WatchDirectoryResponse, Status>>;

    async fn watch_directory(
        &self,
        request: Request<WatchDirectoryRequest>,
    ) -> Result<Response<Self::WatchDirectoryStream>, Status> {
        let request = request.into_inner();
        let path = request.path.clone();
        self.0.lock().unwrap().directories_watched.push(request);
        if path == "/none" {
            return Err(refused(Code::NotFound, "FILE_NOT_FOUND", "there is no directory /none"));
        }
        let event = |kind: FileEventType, name: &str, from: &str, is_dir| {
            Ok(WatchDirectoryResponse {
                r#type: kind.into(),
                path: format!("{path}/{name}"),
                renamed_from: from.to_owned(),
                is_dir,
            })
        };
        let events = [
            Ok(WatchDirectoryResponse::default()),
            event(FileEventType::Created, "new", "", true),
            event(FileEventType::Modified, "new/f", "", false),
            event(FileEventType::Renamed, "b", "/d/a", false),
            event(FileEventType::Removed, "b", "", false),
            event(FileEventType::Overflow, "", "", false),
        ];
        let events = stream::iter(events);
        Ok(Response::new(match path.as_str() {
            "/ends" => events.boxed(),
            "/breaks" => events
                .chain(stream::iter([Err(refused(Code::Unavailable, "HOST_UNAVAILABLE", "gone"))]))
                .boxed(),
            _ => events.chain(stream::pending()).boxed(),
        }))
    }

    type ReadArchiveStream = Iter<std::vec::IntoIter<Result<ReadArchiveResponse, Status>>>;

    async fn read_archive(
        &self,
        request: Request<ReadArchiveRequest>,
    ) -> Result<Response<Self::ReadArchiveStream>, Status> {
        let (top, _) = self.follow(&request.into_inner().path)?;
        let below = format!("{}/", top.trim_end_matches('/'));
        let state = self.0.lock().unwrap();
        let inside = state.files.iter().filter_map(|(path, entry)| Some((path.strip_prefix(&below)?, entry)));
        let mut archive: Vec<u8> = inside.flat_map(|(name, entry)| archived(name, entry)).collect();
        archive.extend_from_slice(&[0; 1024]);
        let messages = archive.chunks(512 << 10).map(|part| {
            let body = HttpBody { data: part.to_vec().into(), ..HttpBody::default() };
            Ok(ReadArchiveResponse { body: Some(body) })
        });
        let mut messages: Vec<_> = messages.collect();
        if top.ends_with("breaks") {
            messages.push(Err(refused(Code::Internal, "INTERNAL", "the disk is on fire")));
        }
        Ok(Response::new(iter(messages)))
    }

    async fn write_archive(
        &self,
        request: Request<Streaming<WriteArchiveRequest>>,
    ) -> Result<Response<WriteArchiveResponse>, Status> {
        let mut messages = request.into_inner();
        let top = normal(&messages.message().await?.unwrap().path);
        self.0.lock().unwrap().uploads += 1;
        if top.starts_with("/full") {
            return Err(refused(Code::ResourceExhausted, "GUEST_DISK_FULL", "the disk is full"));
        }
        let mut archive = Vec::new();
        loop {
            match messages.message().await {
                Ok(Some(message)) => {
                    let data = message.body.unwrap_or_default().data;
                    assert!(data.len() <= 1 << 20, "the contract allows 1 MiB");
                    archive.extend_from_slice(&data);
                }
                Ok(None) => break,
                Err(status) => {
                    self.0.lock().unwrap().broken_uploads += 1;
                    return Err(status);
                }
            }
        }
        let mut made = vec![(top.clone(), Entry::Directory)];
        for entry in tar::Archive::new(archive.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = format!("{top}/{}", entry.path().unwrap().to_string_lossy());
            let mode = entry.header().mode().unwrap();
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
            let is_directory = entry.header().entry_type().is_dir();
            made.push((path, if is_directory { Entry::Directory } else { Entry::File { content, mode } }));
        }
        let entries = i64::try_from(made.len()).unwrap() - 1;
        self.0.lock().unwrap().files.extend(made);
        Ok(Response::new(WriteArchiveResponse { entries, bytes: 0 }))
    }
}

/// A short file of an archive under a name that stands there as it is, whatever it is.
fn archived(name: &str, entry: &Entry) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_size(0);
    header.set_mode(0o755);
    let mut data = Vec::new();
    match entry {
        Entry::File { content, mode } => {
            header.set_mode(*mode);
            header.set_size(content.len() as u64);
            data.clone_from(content);
            data.resize(content.len().next_multiple_of(512), 0);
        }
        Entry::Directory => header.set_entry_type(tar::EntryType::Directory),
        Entry::Link(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_link_name(target).unwrap();
        }
    }
    header.set_cksum();
    [header.as_bytes(), data.as_slice()].concat()
}

#[tonic::async_trait]
impl FileUrlService for Files {
    async fn create_download_url(
        &self,
        request: Request<CreateDownloadUrlRequest>,
    ) -> Result<Response<CreateDownloadUrlResponse>, Status> {
        let request = request.into_inner();
        let url = format!("http://mesh/download?path={}&for={:?}", request.path, request.expires_in);
        Ok(Response::new(CreateDownloadUrlResponse {
            url,
            expires_at: Some(prost_types::Timestamp::default()),
        }))
    }

    async fn create_upload_url(
        &self,
        request: Request<CreateUploadUrlRequest>,
    ) -> Result<Response<CreateUploadUrlResponse>, Status> {
        let request = request.into_inner();
        let url = format!("http://mesh/upload?path={}&for={:?}", request.path, request.expires_in);
        Ok(Response::new(CreateUploadUrlResponse {
            url,
            expires_at: Some(prost_types::Timestamp::default()),
        }))
    }
}

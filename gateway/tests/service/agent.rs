//! A host that runs nothing: what it is asked decides what it answers.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use oc_mesh::{
    caller::Caller,
    error::{Reason, status},
    handoff::Handoffs,
};
use oc_proto::{
    google::api::HttpBody,
    v1::{
        exec_service_server::ExecService, file_service_server::FileService,
        network_service_server::NetworkService, *,
    },
};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    sessions::{Attachment, Sessions},
    websocket::PATIENCE,
};

/// One upload, as far as it came.
#[derive(Debug, Clone, Default)]
pub struct Upload {
    pub path: String,
    pub bytes: u64,
    pub messages: usize,
    pub largest: usize,
    /// `None` while it runs.
    pub whole: Option<bool>,
}

/// What the host saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Path, `oc-sandbox-id`, caller.
    pub calls: Mutex<Vec<(&'static str, String, Caller)>>,
    pub uploads: watch::Sender<Vec<Upload>>,
    /// Runs that were given up before they ended.
    pub cancelled: Arc<Notify>,
    /// Lets what was paused go on: an upload, or a command.
    pub go_on: Notify,
    pub sessions: Sessions,
    /// Signals that were sent to sessions.
    pub signals: Mutex<Vec<Option<i32>>>,
    /// MCP servers of agents that were started.
    pub mcp_servers: Mutex<Vec<Option<prost_types::Struct>>>,
    /// Where connections to ports are handed over, if they are.
    pub handoffs: Mutex<Option<Handoffs>>,
}

#[derive(Debug, Clone, Default)]
pub struct FakeAgent(pub Arc<Seen>);

impl FakeAgent {
    pub fn note<T>(&self, rpc: &'static str, request: &Request<T>) {
        let headers = request.metadata().clone().into_headers();
        let sandbox = headers["oc-sandbox-id"].to_str().unwrap().to_owned();
        self.0.calls.lock().push((rpc, sandbox, Caller::from_headers(&headers).unwrap()));
    }

    /// Waits until it was called so often.
    pub async fn called(&self, times: usize) {
        let called = async {
            while self.0.calls.lock().len() < times {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, called).await.expect("it is not called");
    }
}

struct OnDrop(Arc<Notify>, bool);

impl Drop for OnDrop {
    fn drop(&mut self) {
        if self.1 {
            self.0.notify_one();
        }
    }
}

#[tonic::async_trait]
impl ExecService for FakeAgent {
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        self.note("Run", &request);
        let request = request.into_inner();
        let mut guard = OnDrop(Arc::clone(&self.0.cancelled), true);
        let mut answer = RunResponse::default();
        match request.cmd.as_str() {
            "echo" => answer.stdout = Bytes::from(request.args.join(" ")),
            "cat" => answer.stdout = request.stdin,
            "sleep" => tokio::time::sleep(Duration::from_secs(request.args[0].parse().unwrap())).await,
            "paused" => self.0.go_on.notified().await,
            "bytes" => answer.stdout = Bytes::from_static(b"\xff\0ok"),
            "much" => answer.stdout = Bytes::from(vec![b'x'; 4 << 20]),
            "fail" => {
                guard.1 = false;
                return Err(status(request.args[0].parse::<Reason>().unwrap(), "as asked"));
            }
            "bare" => {
                guard.1 = false;
                return Err(Status::unknown("secret: unix:///run/inside.sock"));
            }
            other => answer.stderr = Bytes::from(other.to_owned()),
        }
        guard.1 = false;
        Ok(Response::new(answer))
    }

    async fn run_async(
        &self,
        request: Request<RunAsyncRequest>,
    ) -> Result<Response<RunAsyncResponse>, Status> {
        self.note("RunAsync", &request);
        let runs = request.get_ref().cmd == "sleep";
        let started_at = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
        Ok(Response::new(if runs {
            RunAsyncResponse { exec_id: Some("e-1".into()), running: true, started_at, ..Default::default() }
        } else {
            RunAsyncResponse { exit_code: Some(0), stdout: "done".into(), started_at, ..Default::default() }
        }))
    }

    async fn start_exec(
        &self,
        request: Request<StartExecRequest>,
    ) -> Result<Response<StartExecResponse>, Status> {
        self.note("StartExec", &request);
        Ok(Response::new(StartExecResponse { session: Some(Sessions::described("e-1")) }))
    }

    async fn start_terminal(
        &self,
        request: Request<StartTerminalRequest>,
    ) -> Result<Response<StartTerminalResponse>, Status> {
        self.note("StartTerminal", &request);
        Ok(Response::new(StartTerminalResponse { session: Some(Sessions::described("t-1")) }))
    }

    async fn list_execs(
        &self,
        request: Request<ListExecsRequest>,
    ) -> Result<Response<ListExecsResponse>, Status> {
        self.note("ListExecs", &request);
        let ended = ExecSession { running: false, exit_code: Some(0), ..Sessions::described("e-2") };
        Ok(Response::new(ListExecsResponse { sessions: vec![Sessions::described("e-1"), ended] }))
    }

    async fn get_exec(&self, request: Request<GetExecRequest>) -> Result<Response<GetExecResponse>, Status> {
        self.note("GetExec", &request);
        Ok(Response::new(GetExecResponse {
            session: Some(Sessions::described(&request.get_ref().session_id)),
        }))
    }

    async fn get_exec_result(
        &self,
        request: Request<GetExecResultRequest>,
    ) -> Result<Response<GetExecResultResponse>, Status> {
        self.note("GetExecResult", &request);
        Ok(Response::new(GetExecResultResponse { running: true, ..Default::default() }))
    }

    async fn kill_exec(
        &self,
        request: Request<KillExecRequest>,
    ) -> Result<Response<KillExecResponse>, Status> {
        self.note("KillExec", &request);
        self.0.signals.lock().push(request.into_inner().signal);
        Ok(Response::new(KillExecResponse {}))
    }

    async fn resize_terminal(
        &self,
        request: Request<ResizeTerminalRequest>,
    ) -> Result<Response<ResizeTerminalResponse>, Status> {
        self.note("ResizeTerminal", &request);
        Ok(Response::new(ResizeTerminalResponse {}))
    }

    type AttachExecStream = Attachment;

    async fn attach_exec(
        &self,
        request: Request<Streaming<AttachExecRequest>>,
    ) -> Result<Response<Attachment>, Status> {
        self.note("AttachExec", &request);
        self.0.sessions.attach(request).await
    }
}

/// Bytes of one message of an archive.
pub const ARCHIVE_PART: usize = 512 << 10;

type Reads = Pin<Box<dyn Stream<Item = Result<ReadFileResponse, Status>> + Send>>;

fn part(data: Bytes) -> ReadFileResponse {
    ReadFileResponse { info: None, body: Some(HttpBody { data, ..Default::default() }) }
}

#[tonic::async_trait]
impl FileService for FakeAgent {
    type ReadFileStream = Reads;

    async fn read_file(&self, request: Request<ReadFileRequest>) -> Result<Response<Reads>, Status> {
        self.note("ReadFile", &request);
        let request = request.into_inner();
        let mut name = request.path.trim_start_matches('/').split('/');
        let (kind, size) = (name.next().unwrap_or_default(), name.next().and_then(|size| size.parse().ok()));
        let size: usize = size.unwrap_or(0);
        let info = FileInfo { size: size as i64, ..Default::default() };
        const PIECE: usize = 256 << 10;
        let whole = move |sent: usize| {
            let pieces = (0..sent.div_ceil(PIECE))
                .map(move |index| Ok(part(Bytes::from(vec![index as u8; PIECE.min(sent - index * PIECE)]))));
            let first = ReadFileResponse { info: Some(info.clone()), body: None };
            stream::iter(std::iter::once(Ok(first)).chain(pieces))
        };
        Ok(Response::new(match kind {
            "zeros" => Box::pin(whole(size)),
            // Says another size than it sends, as kernel files do.
            "liar" => Box::pin(whole(3)),
            "hollow" => Box::pin(whole(0)),
            "breaks" => Box::pin(
                whole(size / 2).chain(stream::iter([Err(status(Reason::HostUnavailable, "the host died"))])),
            ),
            "denied" => return Err(status(Reason::NotAFile, "a directory")),
            "late" => Box::pin(stream::iter([Err(status(Reason::FileNotFound, "no such file"))])),
            _ => return Err(status(Reason::FileNotFound, "no such file")),
        }))
    }

    async fn write_file(
        &self,
        request: Request<Streaming<WriteFileRequest>>,
    ) -> Result<Response<WriteFileResponse>, Status> {
        self.note("WriteFile", &request);
        let mut stream = request.into_inner();
        let index = {
            let mut index = 0;
            self.0.uploads.send_modify(|uploads| {
                index = uploads.len();
                uploads.push(Upload::default());
            });
            index
        };
        let change =
            |change: &dyn Fn(&mut Upload)| self.0.uploads.send_modify(|uploads| change(&mut uploads[index]));
        loop {
            let message = match stream.message().await {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => {
                    change(&|upload| upload.whole = Some(false));
                    return Err(error);
                }
            };
            let size = message.body.as_ref().map_or(0, |body| body.data.len());
            change(&|upload| {
                if !message.path.is_empty() {
                    upload.path.clone_from(&message.path);
                }
                upload.bytes += size as u64;
                upload.messages += 1;
                upload.largest = upload.largest.max(size);
            });
            match message.path.as_str() {
                "/full" => return Err(status(Reason::GuestDiskFull, "no space left")),
                "/paused" => self.0.go_on.notified().await,
                _ => {}
            }
        }
        change(&|upload| upload.whole = Some(true));
        Ok(Response::new(WriteFileResponse::default()))
    }

    async fn list_directory(
        &self,
        request: Request<ListDirectoryRequest>,
    ) -> Result<Response<ListDirectoryResponse>, Status> {
        self.note("ListDirectory", &request);
        let entries = match request.get_ref().path.as_str() {
            "/empty" => vec![],
            "/many" => (0..100_000)
                .map(|index| FileInfo {
                    name: format!("file-{index}"),
                    path: format!("/many/file-{index}"),
                    r#type: FileType::File.into(),
                    ..Default::default()
                })
                .collect(),
            path => vec![FileInfo {
                name: "a".into(),
                path: format!("{path}/a"),
                r#type: FileType::Directory.into(),
                is_dir: true,
                size: 4096,
                mode: 0o755,
                modified_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5_000_000 }),
                ..Default::default()
            }],
        };
        Ok(Response::new(ListDirectoryResponse { entries }))
    }

    async fn stat_file(
        &self,
        request: Request<StatFileRequest>,
    ) -> Result<Response<StatFileResponse>, Status> {
        self.note("StatFile", &request);
        let path = request.into_inner().path;
        if path.contains('\0') || path.split('/').any(|component| component == "..") {
            return Err(status(Reason::InvalidPath, "no such path can be"));
        }
        Ok(Response::new(StatFileResponse { info: Some(FileInfo { path, ..Default::default() }) }))
    }

    async fn make_directory(
        &self,
        request: Request<MakeDirectoryRequest>,
    ) -> Result<Response<MakeDirectoryResponse>, Status> {
        self.note("MakeDirectory", &request);
        Ok(Response::new(MakeDirectoryResponse {}))
    }

    async fn remove_file(
        &self,
        request: Request<RemoveFileRequest>,
    ) -> Result<Response<RemoveFileResponse>, Status> {
        self.note("RemoveFile", &request);
        Ok(Response::new(RemoveFileResponse {}))
    }

    async fn rename_file(
        &self,
        request: Request<RenameFileRequest>,
    ) -> Result<Response<RenameFileResponse>, Status> {
        self.note("RenameFile", &request);
        Ok(Response::new(RenameFileResponse {}))
    }

    type WatchDirectoryStream = stream::Iter<std::vec::IntoIter<Result<WatchDirectoryResponse, Status>>>;

    /// Says that it has begun, and ends.
    async fn watch_directory(
        &self,
        request: Request<WatchDirectoryRequest>,
    ) -> Result<Response<Self::WatchDirectoryStream>, Status> {
        self.note("WatchDirectory", &request);
        Ok(Response::new(stream::iter(vec![Ok(WatchDirectoryResponse::default())])))
    }

    type ReadArchiveStream = stream::Iter<std::vec::IntoIter<Result<ReadArchiveResponse, Status>>>;

    /// Three messages, and then what the path asks for.
    async fn read_archive(
        &self,
        request: Request<ReadArchiveRequest>,
    ) -> Result<Response<Self::ReadArchiveStream>, Status> {
        self.note("ReadArchive", &request);
        let part = |byte| {
            let body = HttpBody { data: Bytes::from(vec![byte; ARCHIVE_PART]), ..Default::default() };
            Ok(ReadArchiveResponse { body: Some(body) })
        };
        let mut parts = vec![part(0), part(1), part(2)];
        match request.get_ref().path.as_str() {
            "/nothing" => return Err(status(Reason::FileNotFound, "no such directory")),
            "/breaks" => parts.push(Err(status(Reason::Internal, "the disk failed"))),
            _ => {}
        }
        Ok(Response::new(stream::iter(parts)))
    }

    /// Counts messages as entries.
    async fn write_archive(
        &self,
        request: Request<Streaming<WriteArchiveRequest>>,
    ) -> Result<Response<WriteArchiveResponse>, Status> {
        self.note("WriteArchive", &request);
        let mut stream = request.into_inner();
        let mut done = WriteArchiveResponse::default();
        while let Some(message) = stream.message().await? {
            if message.path == "/hostile" {
                return Err(status(Reason::InvalidPath, "it leads out"));
            }
            done.entries += 1;
            done.bytes += message.body.map_or(0, |body| body.data.len() as i64);
        }
        Ok(Response::new(done))
    }
}

#[tonic::async_trait]
impl NetworkService for FakeAgent {
    async fn get_network(
        &self,
        request: Request<GetNetworkRequest>,
    ) -> Result<Response<GetNetworkResponse>, Status> {
        self.note("GetNetwork", &request);
        Ok(Response::new(GetNetworkResponse { network: Some(Network::default()) }))
    }
}

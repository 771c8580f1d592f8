//! The guest of a process: it answers for the sandbox that it was last told of.

use std::sync::{Arc, atomic::Ordering};

use oc_proto::{
    mesh::{
        ActivateRequest, ActivateResponse, QuiesceRequest, QuiesceResponse, WakeRequest, WakeResponse,
        guest_service_server::GuestService,
    },
    v1::{exec_service_server::ExecService, *},
};
use tonic::{Request, Response, Status, Streaming};

use super::{Process, World, take_one};

#[derive(Clone)]
pub(super) struct FakeGuest {
    pub(super) world: Arc<World>,
    pub(super) vm: String,
    pub(super) process: Process,
}

#[tonic::async_trait]
impl GuestService for FakeGuest {
    async fn activate(
        &self,
        request: Request<ActivateRequest>,
    ) -> Result<Response<ActivateResponse>, Status> {
        self.world.step().await;
        if self.process.paused.load(Ordering::SeqCst) || self.process.exit.is_cancelled() {
            return Err(Status::unavailable("paused or dead"));
        }
        let request = request.into_inner();
        *self.process.sandbox.lock() = request.sandbox_id.clone();
        self.world.activations.lock().push((self.vm.clone(), request));
        self.world.step().await;
        Ok(Response::new(ActivateResponse::default()))
    }

    async fn wake(&self, request: Request<WakeRequest>) -> Result<Response<WakeResponse>, Status> {
        self.world.step().await;
        if self.process.paused.load(Ordering::SeqCst) || self.process.exit.is_cancelled() {
            return Err(Status::unavailable("paused or dead"));
        }
        assert_eq!(request.get_ref().entropy.len(), 64);
        if take_one(&self.world.failing_wakes) {
            return Err(Status::unavailable("it hangs"));
        }
        Ok(Response::new(WakeResponse::default()))
    }

    async fn quiesce(&self, _: Request<QuiesceRequest>) -> Result<Response<QuiesceResponse>, Status> {
        if take_one(&self.world.restless) {
            return Err(Status::deadline_exceeded("somebody writes"));
        }
        Ok(Response::new(QuiesceResponse::default()))
    }
}

#[tonic::async_trait]
impl ExecService for FakeGuest {
    /// `wait` runs until the VM dies; everything else echoes the sandbox.
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        if request.get_ref().cmd == "wait" {
            self.process.exit.cancelled().await;
            return Err(Status::unavailable("the link broke"));
        }
        let stdout = self.process.sandbox.lock().clone().into_bytes().into();
        Ok(Response::new(RunResponse { stdout, ..Default::default() }))
    }

    async fn run_async(&self, _: Request<RunAsyncRequest>) -> Result<Response<RunAsyncResponse>, Status> {
        Err(Status::unimplemented("run_async"))
    }

    async fn start_exec(&self, _: Request<StartExecRequest>) -> Result<Response<StartExecResponse>, Status> {
        Err(Status::unimplemented("start_exec"))
    }

    async fn start_terminal(
        &self,
        _: Request<StartTerminalRequest>,
    ) -> Result<Response<StartTerminalResponse>, Status> {
        Err(Status::unimplemented("start_terminal"))
    }

    async fn list_execs(&self, _: Request<ListExecsRequest>) -> Result<Response<ListExecsResponse>, Status> {
        Err(Status::unimplemented("list_execs"))
    }

    async fn get_exec(&self, _: Request<GetExecRequest>) -> Result<Response<GetExecResponse>, Status> {
        Err(Status::unimplemented("get_exec"))
    }

    async fn get_exec_result(
        &self,
        _: Request<GetExecResultRequest>,
    ) -> Result<Response<GetExecResultResponse>, Status> {
        Err(Status::unimplemented("get_exec_result"))
    }

    async fn kill_exec(&self, _: Request<KillExecRequest>) -> Result<Response<KillExecResponse>, Status> {
        Err(Status::unimplemented("kill_exec"))
    }

    async fn resize_terminal(
        &self,
        _: Request<ResizeTerminalRequest>,
    ) -> Result<Response<ResizeTerminalResponse>, Status> {
        Err(Status::unimplemented("resize_terminal"))
    }

    type AttachExecStream = tokio_stream::Empty<Result<AttachExecResponse, Status>>;

    async fn attach_exec(
        &self,
        _: Request<Streaming<AttachExecRequest>>,
    ) -> Result<Response<Self::AttachExecStream>, Status> {
        Err(Status::unimplemented("attach_exec"))
    }
}

/// Only what an adoption asks.
pub(super) mod files {
    use std::pin::Pin;

    use oc_proto::v1::{file_service_server::FileService, *};
    use tokio_stream::Stream;
    use tonic::{Request, Response, Status, Streaming};

    pub struct Root;

    macro_rules! unimplemented_calls {
        ($($name:ident: $request:ty => $response:ty;)*) => {
            #[tonic::async_trait]
            impl FileService for Root {
                type ReadFileStream = Pin<Box<dyn Stream<Item = Result<ReadFileResponse, Status>> + Send>>;

                async fn stat_file(&self, _: Request<StatFileRequest>) -> Result<Response<StatFileResponse>, Status> {
                    Ok(Response::new(StatFileResponse::default()))
                }

                async fn read_file(&self, _: Request<ReadFileRequest>) -> Result<Response<Self::ReadFileStream>, Status> {
                    Err(Status::unimplemented(""))
                }

                $(async fn $name(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                    Err(Status::unimplemented(""))
                })*

    type WatchDirectoryStream = Pin<Box<dyn Stream<Item = Result<WatchDirectoryResponse, Status>> + Send>>;

    /// Says that it has begun, and then nothing for ever.
    async fn watch_directory(
        &self,
        _: Request<WatchDirectoryRequest>,
    ) -> Result<Response<Self::WatchDirectoryStream>, Status> {
        use tokio_stream::StreamExt as _;
        let begun = tokio_stream::once(Ok(WatchDirectoryResponse::default()));
        Ok(Response::new(Box::pin(begun.chain(tokio_stream::pending()))))
    }

    type ReadArchiveStream = tokio_stream::Empty<Result<ReadArchiveResponse, Status>>;

    async fn read_archive(
        &self,
        _: Request<ReadArchiveRequest>,
    ) -> Result<Response<Self::ReadArchiveStream>, Status> {
        Err(Status::unimplemented("read_archive"))
    }

    async fn write_archive(
        &self,
        _: Request<Streaming<WriteArchiveRequest>>,
    ) -> Result<Response<WriteArchiveResponse>, Status> {
        Err(Status::unimplemented("write_archive"))
    }
}
        };
    }

    unimplemented_calls! {
        write_file: Streaming<WriteFileRequest> => WriteFileResponse;
        list_directory: ListDirectoryRequest => ListDirectoryResponse;
        make_directory: MakeDirectoryRequest => MakeDirectoryResponse;
        remove_file: RemoveFileRequest => RemoveFileResponse;
        rename_file: RenameFileRequest => RenameFileResponse;
    }
}

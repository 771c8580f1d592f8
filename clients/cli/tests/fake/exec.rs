//! Commands that are no processes.

use std::time::Duration;

use oc_proto::v1::{exec_service_server::ExecService, *};
use tonic::{Code, Request, Response, Status, Streaming};

use super::refused;

pub struct Exec;

#[tonic::async_trait]
impl ExecService for Exec {
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        let deadline = request.metadata().get("grpc-timeout").map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        let mut answer = RunResponse::default();
        match request.cmd.as_str() {
            "echo" => answer.stdout = format!("{}\n", request.args.join(" ")).into(),
            "cat" => answer.stdout = request.stdin,
            "bytes" => {
                answer.stdout = b"\xff\0out"[..].into();
                answer.stderr = b"\xfeerr"[..].into();
            }
            "exit" => answer.exit_code = request.args[0].parse().unwrap(),
            "sleep" => {
                (answer.exit_code, answer.timed_out) = (-1, true);
                answer.stderr = "the timeout ended the command\n".into();
            }
            "much" => (answer.truncated, answer.stdout_bytes, answer.stdout) = (true, 99, "end".into()),
            "describe" => {
                let mut envs: Vec<_> = request.envs.into_iter().collect();
                envs.sort();
                answer.stdout =
                    format!("{:?} {envs:?} {} {} {deadline:?}", request.timeout, request.cwd, request.user)
                        .into();
            }
            "slow" => tokio::time::sleep(Duration::from_secs(60)).await,
            "secret" => {
                return Err(refused(Code::PermissionDenied, "COMMAND_NOT_EXECUTABLE", "not executable"));
            }
            other => {
                return Err(refused(
                    Code::NotFound,
                    "COMMAND_NOT_FOUND",
                    &format!("there is no command {other}"),
                ));
            }
        }
        Ok(Response::new(answer))
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

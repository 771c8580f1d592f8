//! `oc.v1.ExecService`: one command, from its start to its last byte.

mod launch;
mod output;
mod ring;
mod spawn;

use std::{sync::Arc, time::Duration};

use oc_proto::v1::{exec_service_server::ExecService, *};
use prost::bytes::Bytes;
use tokio::{
    io::AsyncWriteExt as _,
    net::unix::pipe,
    sync::Semaphore,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tonic::{Request, Response, Status, Streaming};

use self::{launch::Launched, output::Tail};
use crate::{identity::Identity, refusal::Refusal};

/// Commands at once. Each may hold two tails of output.
const MAX_COMMANDS: usize = 64;
/// Seconds that a command has where the request does not say.
const DEFAULT_TIMEOUT: i32 = 60;
/// After a command has ended, what it left running may hold its pipes open; it is not waited for longer.
const LINGER: Duration = Duration::from_millis(200);
/// Name and arguments of a command, bytes.
const MAX_ARGS: usize = 128 << 10;
/// Environment of a request, bytes.
const MAX_ENVS: usize = 128 << 10;
/// Standard input, bytes.
const MAX_STDIN: usize = 1 << 20;

/// Runs commands.
#[derive(Clone, Debug)]
pub struct Exec {
    identity: Identity,
    room: Arc<Semaphore>,
}

impl Exec {
    /// Runs commands in the environment that `identity` has.
    pub fn new(identity: Identity) -> Self {
        Self { identity, room: Arc::new(Semaphore::new(MAX_COMMANDS)) }
    }
}

#[tonic::async_trait]
impl ExecService for Exec {
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        let Ok(_room) = self.room.try_acquire() else {
            return Err(Refusal::Overloaded.status(format!("{MAX_COMMANDS} commands run already")));
        };
        let request = request.into_inner();
        let time_limit = check(&request)?;
        let envs = self.identity.envs();
        let stdin = request.stdin.clone();
        let launched = spawn_blocking(move || launch::launch(&request, envs))
            .await
            .map_err(|error| Refusal::Internal.status(error.to_string()))??;
        Ok(Response::new(finish(launched, stdin, time_limit).await))
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

/// Refuses what is too large or makes no sense; how long the command may take otherwise.
fn check(request: &RunRequest) -> Result<Option<Duration>, Status> {
    let invalid = |text: String| Err(Refusal::InvalidArgument.status(text));
    if request.cmd.is_empty() {
        return invalid("cmd is empty".into());
    }
    let args = request.cmd.len() + request.args.iter().map(|arg| arg.len() + 1).sum::<usize>();
    if args > MAX_ARGS {
        return invalid(format!("cmd and args are {args} bytes; at most {MAX_ARGS} are taken"));
    }
    let envs: usize = request.envs.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
    if envs > MAX_ENVS {
        return invalid(format!("envs are {envs} bytes; at most {MAX_ENVS} are taken"));
    }
    if request.stdin.len() > MAX_STDIN {
        return invalid(format!("stdin is {} bytes; at most {MAX_STDIN} are taken", request.stdin.len()));
    }
    if request.envs.keys().any(|key| key.is_empty() || key.contains('=')) {
        return invalid("a name in envs is empty or has a '='".into());
    }
    match request.timeout.unwrap_or(DEFAULT_TIMEOUT) {
        0 => Ok(None),
        seconds => match u64::try_from(seconds) {
            Ok(seconds) => Ok(Some(Duration::from_secs(seconds))),
            Err(_) => invalid("timeout is negative".into()),
        },
    }
}

async fn finish(launched: Launched, stdin: Bytes, time_limit: Option<Duration>) -> RunResponse {
    // Dropped if the caller goes away: the process is ended then.
    let Launched { mut process, stdin: writer, stdout, stderr } = launched;
    let (mut out, mut err) = (Tail::new(), Tail::new());
    let (exit_code, timed_out) = {
        let mut reading = std::pin::pin!(async {
            tokio::join!(out.read_all(stdout), err.read_all(stderr), feed(writer, &stdin));
        });
        let limit = async {
            match time_limit {
                Some(limit) => sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        let mut limit = std::pin::pin!(limit);
        let mut drained = false;
        let ended = loop {
            tokio::select! {
                code = process.exit() => break Some(code),
                () = &mut reading, if !drained => drained = true,
                () = &mut limit => break None,
            }
        };
        if ended.is_none() {
            process.kill_group();
            process.exit().await;
        }
        if !drained {
            // What does not come now is held by a process that the command left behind.
            let _ = timeout(LINGER, reading).await;
        }
        (ended.unwrap_or(-1), ended.is_none())
    };
    if timed_out {
        let seconds = time_limit.unwrap_or_default().as_secs();
        err.add_line(&format!("oc: killed after the timeout of {seconds} s"));
    }
    RunResponse {
        exit_code,
        truncated: out.is_truncated() || err.is_truncated(),
        stdout_bytes: out.total(),
        stderr_bytes: err.total(),
        stdout: out.into_bytes(),
        stderr: err.into_bytes(),
        timed_out,
    }
}

/// Writes all of the input. A command need not read it.
async fn feed(writer: Option<pipe::Sender>, stdin: &[u8]) {
    if let Some(mut writer) = writer {
        let _ = writer.write_all(stdin).await;
    }
}

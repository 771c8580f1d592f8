//! `oc.v1.ExecService`: commands and terminals.
//!
//! `Run` is a call as long as its command ([`run`]); everything else is a session ([`session`]), which outlives calls.
//! [`launch`] and [`spawn`] start either's process.

pub mod attach;
pub mod attachments;
mod budget;
pub mod drive;
pub mod launch;
mod output;
pub mod ring;
mod run;
pub mod session;
pub mod sessions;
mod spawn;
mod stdin;
pub mod terminal;

use std::{sync::Arc, time::Duration};

use oc_proto::v1::{exec_service_server::ExecService, *};
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};
use tonic::{Request, Response, Status, Streaming};

use self::{
    drive::Limits,
    launch::{Channels, Invocation, Wanted, What},
    run::Running,
    session::Session,
    sessions::{Order, Sessions},
    terminal::Size,
};
use crate::refusal::Refusal;

/// Calls of `Run` at once. Each may hold two tails of output.
const MAX_COMMANDS: usize = 64;
/// Seconds that a command has where the request does not say.
const DEFAULT_TIMEOUT: i32 = 60;
/// Standard input of a command, bytes.
const MAX_STDIN: usize = 1 << 20;
/// `RunAsync` waits for so long, as the published clients expect of a command that ends soon.
const ENDS_SOON: Duration = Duration::from_millis(400);
/// What is kept of what a command of `RunAsync` writes, bytes: as much as `Run` keeps of one stream.
const ASYNC_RING: usize = 4 << 20;
/// How long `GetExecResult` waits: where the request does not say, and at most, milliseconds.
const RESULT_WAIT_MS: (i32, i32) = (500, 30_000);
/// Size of a terminal where the request does not say.
const TERMINAL: TerminalSize = TerminalSize { cols: 80, rows: 24 };
/// The signal of `KillExec` where the request does not say: `SIGKILL`.
const KILL: i32 = 9;

/// Runs commands.
#[derive(Clone, Debug)]
pub struct Exec {
    sessions: Sessions,
    room: Arc<Semaphore>,
}

impl Exec {
    /// Runs commands beside these sessions.
    pub fn new(sessions: Sessions) -> Self {
        Self { sessions, room: Arc::new(Semaphore::new(MAX_COMMANDS)) }
    }

    fn describe(&self, session: &Session) -> ExecSession {
        session.describe(self.sessions.identity().sandbox_id())
    }
}

/// A time limit in seconds; none where it is 0.
pub(crate) fn seconds(name: &str, seconds: i32) -> Result<Option<Duration>, Status> {
    match u64::try_from(seconds) {
        Ok(0) => Ok(None),
        Ok(seconds) => Ok(Some(Duration::from_secs(seconds))),
        Err(_) => Err(Refusal::InvalidArgument.status(format!("{name} is negative"))),
    }
}

fn check_stdin(stdin: &[u8]) -> Result<(), Status> {
    if stdin.len() > MAX_STDIN {
        let text = format!("stdin is {} bytes; at most {MAX_STDIN} are taken", stdin.len());
        return Err(Refusal::InvalidArgument.status(text));
    }
    Ok(())
}

#[tonic::async_trait]
impl ExecService for Exec {
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        let Ok(_room) = self.room.try_acquire() else {
            return Err(Refusal::Overloaded.status(format!("{MAX_COMMANDS} commands run already")));
        };
        let RunRequest { cmd, args, envs, cwd, user, stdin, timeout, .. } = request.into_inner();
        let program = What::of_command(cmd, args);
        let invocation = Invocation { program, envs, cwd, user };
        invocation.check()?;
        check_stdin(&stdin)?;
        let time_limit = seconds("timeout", timeout.unwrap_or(DEFAULT_TIMEOUT))?;
        let envs = self.sessions.identity().envs();
        let wanted = Wanted::Pipes { stdin: !stdin.is_empty() };
        let (process, channels) = spawn_blocking(move || invocation.launch(envs, wanted))
            .await
            .map_err(|error| Refusal::Internal.status(error.to_string()))??;
        let Channels::Pipes { stdin: writer, stdout, stderr } = channels else {
            return Err(Refusal::Internal.status("a command without pipes"));
        };
        let running = Running { process, stdin: writer, stdout, stderr };
        Ok(Response::new(running.finish(stdin, time_limit).await))
    }

    async fn run_async(
        &self,
        request: Request<RunAsyncRequest>,
    ) -> Result<Response<RunAsyncResponse>, Status> {
        let RunAsyncRequest { cmd, args, envs, cwd, user, stdin, timeout: limit, .. } = request.into_inner();
        let program = What::of_command(cmd, args);
        check_stdin(&stdin)?;
        let limits =
            Limits { time: seconds("timeout", limit.unwrap_or(DEFAULT_TIMEOUT))?, ..Limits::default() };
        let order = Order {
            kind: ExecKind::Command,
            invocation: Invocation { program, envs, cwd, user },
            wanted: Wanted::Pipes { stdin: !stdin.is_empty() },
            limits,
            ring_bytes: ASYNC_RING,
        };
        let session = self.sessions.start(order).await?;
        if !stdin.is_empty() {
            session.stdin().put(stdin);
        }
        session.stdin().end();
        let has_ended = timeout(ENDS_SOON, session.ended()).await.is_ok();
        let started_at = Some(session.facts().started_at.into());
        if !has_ended {
            let exec_id = Some(session.facts().id.clone());
            let running = true;
            return Ok(Response::new(RunAsyncResponse {
                exec_id,
                running,
                started_at,
                ..Default::default()
            }));
        }
        // Its ID is nobody's.
        self.sessions.remove(&session.facts().id);
        let GetExecResultResponse { exit_code, stdout, stderr, truncated, timed_out, .. } = session.result();
        Ok(Response::new(RunAsyncResponse {
            exec_id: None,
            running: false,
            started_at,
            exit_code,
            stdout,
            stderr,
            truncated,
            timed_out,
        }))
    }

    async fn start_exec(
        &self,
        request: Request<StartExecRequest>,
    ) -> Result<Response<StartExecResponse>, Status> {
        let request = request.into_inner();
        let size = request.terminal.map(Size::parse).transpose()?;
        let limits = Limits {
            time: seconds("timeout", request.timeout)?,
            alone: seconds("maxRunAfterDisconnect", request.max_run_after_disconnect)?,
            leaves_nothing: false,
        };
        let order = Order {
            kind: if size.is_some() { ExecKind::Terminal } else { ExecKind::Command },
            invocation: Invocation {
                program: What::Program(request.cmd, request.args),
                envs: request.envs,
                cwd: request.cwd,
                user: request.user,
            },
            wanted: size.map_or(Wanted::Pipes { stdin: true }, Wanted::Terminal),
            limits,
            ring_bytes: usize::try_from(request.ring_bytes).unwrap_or(usize::MAX),
        };
        let session = self.sessions.start(order).await?;
        Ok(Response::new(StartExecResponse { session: Some(self.describe(&session)) }))
    }

    async fn start_terminal(
        &self,
        request: Request<StartTerminalRequest>,
    ) -> Result<Response<StartTerminalResponse>, Status> {
        let request = request.into_inner();
        let or = |cells, usual| if cells == 0 { usual } else { cells };
        let size =
            TerminalSize { cols: or(request.cols, TERMINAL.cols), rows: or(request.rows, TERMINAL.rows) };
        let alone = seconds("maxRunAfterDisconnect", request.max_run_after_disconnect)?;
        let program = match request.shell.is_empty() {
            true => What::LoginShell,
            false => What::Program(request.shell, Vec::new()),
        };
        let order = Order {
            kind: ExecKind::Terminal,
            invocation: Invocation { program, envs: request.envs, cwd: request.cwd, user: request.user },
            wanted: Wanted::Terminal(Size::parse(size)?),
            limits: Limits { alone, ..Limits::default() },
            ring_bytes: 0,
        };
        let session = self.sessions.start(order).await?;
        Ok(Response::new(StartTerminalResponse { session: Some(self.describe(&session)) }))
    }

    async fn list_execs(&self, _: Request<ListExecsRequest>) -> Result<Response<ListExecsResponse>, Status> {
        let sessions = self.sessions.list(None).iter().map(|session| self.describe(session)).collect();
        Ok(Response::new(ListExecsResponse { sessions }))
    }

    async fn get_exec(&self, request: Request<GetExecRequest>) -> Result<Response<GetExecResponse>, Status> {
        let session = self.sessions.find(&request.into_inner().session_id)?;
        Ok(Response::new(GetExecResponse { session: Some(self.describe(&session)) }))
    }

    async fn get_exec_result(
        &self,
        request: Request<GetExecResultRequest>,
    ) -> Result<Response<GetExecResultResponse>, Status> {
        let request = request.into_inner();
        let session = self.sessions.find(&request.session_id)?;
        let wait = request.wait_ms.unwrap_or(RESULT_WAIT_MS.0);
        let wait = u64::try_from(wait.min(RESULT_WAIT_MS.1))
            .map_err(|_| Refusal::InvalidArgument.status("waitMs is negative"))?;
        // How it stands is told either way.
        let _ = timeout(Duration::from_millis(wait), session.ended()).await;
        Ok(Response::new(session.result()))
    }

    async fn kill_exec(
        &self,
        request: Request<KillExecRequest>,
    ) -> Result<Response<KillExecResponse>, Status> {
        let request = request.into_inner();
        self.sessions.find(&request.session_id)?.signal(request.signal.unwrap_or(KILL))?;
        Ok(Response::new(KillExecResponse {}))
    }

    async fn resize_terminal(
        &self,
        request: Request<ResizeTerminalRequest>,
    ) -> Result<Response<ResizeTerminalResponse>, Status> {
        let ResizeTerminalRequest { session_id, cols, rows, .. } = request.into_inner();
        let session = self.sessions.find(&session_id)?;
        session.resize(Size::parse(TerminalSize { cols, rows })?)?;
        Ok(Response::new(ResizeTerminalResponse {}))
    }

    type AttachExecStream = attach::Events;

    async fn attach_exec(
        &self,
        request: Request<Streaming<AttachExecRequest>>,
    ) -> Result<Response<Self::AttachExecStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(AttachExecRequest {
            session_id, input: Some(attach_exec_request::Input::Start(start)), ..
        }) = first
        else {
            return Err(Refusal::InvalidArgument.status("the first message has no start"));
        };
        let session = self.sessions.find(&session_id)?;
        let sandbox_id = self.sessions.identity().sandbox_id();
        Ok(Response::new(attach::attach(session, sandbox_id, start, requests)?))
    }
}

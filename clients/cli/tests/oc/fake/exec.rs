//! Commands that are no processes, and connections to them that break when they are told to.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use oc_proto::v1::{
    attach_exec_request::Input, attach_exec_response::Event, exec_service_server::ExecService, *,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{State, refused, sessions::Session};

/// All sessions.
#[derive(Default)]
pub struct Sessions {
    pub all: Vec<Session>,
    pub started: Vec<StartExecRequest>,
    pub terminals: Vec<StartTerminalRequest>,
    /// How clients attached.
    pub attached: Vec<AttachStart>,
    /// When the next connections break.
    pub breaks: VecDeque<Break>,
    /// Marked when anything has changed.
    pub changed: watch::Sender<()>,
}

/// When a connection breaks.
#[derive(Clone, Copy)]
pub struct Break {
    /// After so many bytes of output.
    pub output: usize,
    /// After so many bytes of input, the last of which are taken and not confirmed.
    pub input: usize,
    pub how: How,
}

#[derive(Clone, Copy)]
pub enum How {
    Unavailable,
    BrokenPipe,
    Ends,
}

impl Break {
    const NEVER: Self = Self { output: usize::MAX, input: usize::MAX, how: How::Ends };

    fn status(self) -> Option<Status> {
        match self.how {
            How::Unavailable => Some(refused(Code::Unavailable, "HOST_UNAVAILABLE", "the host is gone")),
            How::BrokenPipe => Some(Status::unknown("broken pipe")),
            How::Ends => None,
        }
    }
}

impl Sessions {
    pub fn find(&mut self, id: &str) -> Result<&mut Session, Status> {
        let found = self.all.iter_mut().find(|session| session.id == id);
        found
            .ok_or_else(|| refused(Code::NotFound, "SESSION_NOT_FOUND", &format!("there is no session {id}")))
    }

    pub fn add(&mut self, cmd: &str, args: &[String], terminal: Option<TerminalSize>) -> ExecSession {
        let id = format!("s{}", self.all.len() + 1);
        let session = Session::start(&id, cmd, args, terminal);
        let described = session.describe();
        self.all.push(session);
        described
    }
}

pub struct Exec(pub Arc<Mutex<State>>);

type Events = mpsc::Sender<Result<AttachExecResponse, Status>>;

impl Exec {
    /// Does something to the sessions, and lets all see it.
    fn change<T>(&self, change: impl FnOnce(&mut Sessions) -> T) -> T {
        change_sessions(&self.0, change)
    }

    /// What cannot be started.
    fn check(cmd: &str) -> Result<(), Status> {
        match cmd {
            "secret" => Err(refused(Code::PermissionDenied, "COMMAND_NOT_EXECUTABLE", "not executable")),
            "nothing" => Err(refused(Code::NotFound, "COMMAND_NOT_FOUND", "there is no command nothing")),
            _ => Ok(()),
        }
    }
}

/// Does something to the sessions, and lets all see it.
pub fn change_sessions<T>(state: &Mutex<State>, change: impl FnOnce(&mut Sessions) -> T) -> T {
    let sessions = &mut state.lock().unwrap().sessions;
    let result = change(sessions);
    sessions.changed.send_replace(());
    result
}

#[tonic::async_trait]
impl ExecService for Exec {
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        let deadline = request.metadata().get("grpc-timeout").map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        Self::check(&request.cmd)?;
        let mut answer = RunResponse::default();
        match request.cmd.as_str() {
            "cat" => answer.stdout = request.stdin,
            "exit" => answer.exit_code = request.args[0].parse().unwrap(),
            "sleep" => (answer.exit_code, answer.timed_out) = (-1, true),
            "describe" => {
                let mut envs: Vec<_> = request.envs.into_iter().collect();
                envs.sort();
                answer.stdout =
                    format!("{:?} {envs:?} {} {} {deadline:?}", request.timeout, request.cwd, request.user)
                        .into();
            }
            "slow" => tokio::time::sleep(Duration::from_secs(60)).await,
            other => panic!("there is no command {other}"),
        }
        Ok(Response::new(answer))
    }

    async fn run_async(&self, _: Request<RunAsyncRequest>) -> Result<Response<RunAsyncResponse>, Status> {
        Err(Status::unimplemented("run_async"))
    }

    async fn start_exec(
        &self,
        request: Request<StartExecRequest>,
    ) -> Result<Response<StartExecResponse>, Status> {
        let request = request.into_inner();
        Self::check(&request.cmd)?;
        let session = self.change(|sessions| {
            let session = sessions.add(&request.cmd, &request.args, request.terminal);
            sessions.started.push(request);
            session
        });
        Ok(Response::new(StartExecResponse { session: Some(session) }))
    }

    async fn start_terminal(
        &self,
        request: Request<StartTerminalRequest>,
    ) -> Result<Response<StartTerminalResponse>, Status> {
        let request = request.into_inner();
        let size = TerminalSize { cols: request.cols, rows: request.rows };
        let session = self.change(|sessions| {
            sessions.terminals.push(request);
            sessions.add("shell", &[], Some(size))
        });
        Ok(Response::new(StartTerminalResponse { session: Some(session) }))
    }

    async fn list_execs(&self, _: Request<ListExecsRequest>) -> Result<Response<ListExecsResponse>, Status> {
        let sessions = self.change(|sessions| sessions.all.iter().map(Session::describe).collect());
        Ok(Response::new(ListExecsResponse { sessions }))
    }

    async fn get_exec(&self, request: Request<GetExecRequest>) -> Result<Response<GetExecResponse>, Status> {
        let id = request.into_inner().session_id;
        let session = self.change(|sessions| Ok::<_, Status>(sessions.find(&id)?.describe()))?;
        Ok(Response::new(GetExecResponse { session: Some(session) }))
    }

    async fn get_exec_result(
        &self,
        request: Request<GetExecResultRequest>,
    ) -> Result<Response<GetExecResultResponse>, Status> {
        let id = request.into_inner().session_id;
        // The first call comes too early.
        let answer = self.change(|sessions| {
            let session = sessions.find(&id)?;
            let running = session.exit.is_none();
            if running {
                session.end(3);
            }
            Ok::<_, Status>(GetExecResultResponse {
                running,
                exit_code: session.exit.map(|(code, _)| code).filter(|_| !running),
                stdout: session.written(ExecStream::Stdout).into(),
                stderr: session.written(ExecStream::Stderr).into(),
                truncated: session.dropped > 0,
                timed_out: session.exit.is_some_and(|(_, timed_out)| timed_out),
            })
        })?;
        Ok(Response::new(answer))
    }

    async fn kill_exec(
        &self,
        request: Request<KillExecRequest>,
    ) -> Result<Response<KillExecResponse>, Status> {
        let request = request.into_inner();
        self.change(|sessions| {
            sessions.find(&request.session_id)?.signal(request.signal.unwrap_or(9));
            Ok::<_, Status>(())
        })?;
        Ok(Response::new(KillExecResponse {}))
    }

    async fn resize_terminal(
        &self,
        _: Request<ResizeTerminalRequest>,
    ) -> Result<Response<ResizeTerminalResponse>, Status> {
        Err(Status::unimplemented("resize_terminal"))
    }

    type AttachExecStream = ReceiverStream<Result<AttachExecResponse, Status>>;

    async fn attach_exec(
        &self,
        request: Request<Streaming<AttachExecRequest>>,
    ) -> Result<Response<Self::AttachExecStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.unwrap();
        let Some(Input::Start(start)) = first.input else { panic!("the first message is no start") };
        let (id, name) = (first.session_id, start.attachment_id.clone());
        assert!(start.acknowledges && !name.is_empty() && start.hold_ms <= 60_000);
        let (attached, limits) = self.change(|sessions| {
            let session = sessions.find(&id)?;
            let offset = start.offset.max(session.dropped as u64).min(session.log.len() as u64);
            let attached = ExecAttached {
                session: Some(session.describe()),
                offset,
                dropped_bytes: offset.saturating_sub(start.offset),
                stdin_offset: session.accepted.get(&name).copied().unwrap_or(0),
            };
            sessions.attached.push(start);
            Ok::<_, Status>((attached, sessions.breaks.pop_front().unwrap_or(Break::NEVER)))
        })?;
        let (events, stream) = mpsc::channel(4);
        let offset = usize::try_from(attached.offset).unwrap();
        events.try_send(Ok(AttachExecResponse { event: Some(Event::Attached(attached)) })).unwrap();
        // What ends one direction ends both.
        let stop = watch::Sender::new(());
        let output = Output { state: Arc::clone(&self.0), id: id.clone(), offset, limits };
        let (output, stopped) = (output.send(events.clone()), stop.subscribe());
        let taker = Taker { state: Arc::clone(&self.0), id, name, limits };
        tokio::spawn(until(stop.clone(), stopped, output));
        let (input, stopped) = (taker.take(requests, events), stop.subscribe());
        tokio::spawn(until(stop, stopped, input));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Does `work` until the other direction stops, and stops it.
async fn until(stop: watch::Sender<()>, mut stopped: watch::Receiver<()>, work: impl Future<Output = ()>) {
    tokio::select! {
        () = work => {}
        _ = stopped.changed() => {}
    }
    stop.send_replace(());
}

/// Sends a session's output until it ends or the connection does.
struct Output {
    state: Arc<Mutex<State>>,
    id: String,
    offset: usize,
    limits: Break,
}

impl Output {
    async fn send(mut self, events: Events) {
        let mut changes = self.state.lock().unwrap().sessions.changed.subscribe();
        let mut left = self.limits.output;
        loop {
            changes.mark_unchanged();
            let event = self.next(left);
            match event {
                Some(event) => {
                    if let Ok(AttachExecResponse { event: Some(Event::Output(output)) }) = &event {
                        left -= output.data.len();
                        self.offset += output.data.len();
                    }
                    let is_last = !matches!(&event, Ok(AttachExecResponse { event: Some(Event::Output(_)) }));
                    if events.send(event).await.is_err() || is_last {
                        return;
                    }
                }
                None if left == 0 => return,
                None => tokio::select! {
                    _ = changes.changed() => {}
                    () = events.closed() => return,
                },
            }
        }
    }

    fn next(&self, left: usize) -> Option<Result<AttachExecResponse, Status>> {
        let mut state = self.state.lock().unwrap();
        let session = state.sessions.find(&self.id).unwrap();
        if left == 0 {
            return self.limits.status().map(Err);
        }
        let event = if let Some((stream, data)) = session.output(self.offset, left) {
            Event::Output(ExecOutput { offset: self.offset as u64, stream: stream.into(), data: data.into() })
        } else if session.hibernates {
            return Some(Err(refused(Code::Aborted, "INTERRUPTED", "the sandbox hibernates")));
        } else {
            let (exit_code, timed_out) = session.exit?;
            Event::Exit(ExecExit { exit_code, timed_out, offset: self.offset as u64 })
        };
        Some(Ok(AttachExecResponse { event: Some(event) }))
    }
}

/// Takes what a client says.
struct Taker {
    state: Arc<Mutex<State>>,
    id: String,
    name: String,
    limits: Break,
}

impl Taker {
    async fn take(self, mut requests: Streaming<AttachExecRequest>, events: Events) {
        let mut left = self.limits.input;
        while let Ok(Some(request)) = requests.message().await {
            let mut goes = false;
            let accepted = change_sessions(&self.state, |sessions| {
                let session = sessions.find(&self.id).unwrap();
                match request.input.unwrap() {
                    Input::Start(_) => panic!("a second start"),
                    Input::Stdin(stdin) => return Some(self.accept(session, &stdin, &mut left)),
                    Input::StdinEnd(_) => session.take_end(),
                    Input::Resize(size) => session.resize(size),
                    Input::Signal(signal) => session.signal(signal.signal),
                    Input::Acknowledge(acknowledge) => {
                        assert!(acknowledge.offset <= session.log.len() as u64);
                        session.acknowledged = session.acknowledged.max(acknowledge.offset);
                    }
                    Input::Detach(_) => {
                        session.detached += 1;
                        goes = true;
                    }
                }
                None
            });
            if goes {
                return;
            }
            if left == 0 {
                if let Some(status) = self.limits.status() {
                    let _ = events.send(Err(status)).await;
                }
                return;
            }
            if let Some(offset) = accepted {
                let event = Event::StdinAccepted(ExecStdinAccepted { offset });
                let _ = events.send(Ok(AttachExecResponse { event: Some(event) })).await;
            }
        }
        // It has ended its side, and still hears what there is to hear.
        events.closed().await;
    }

    fn accept(&self, session: &mut Session, stdin: &ExecStdin, left: &mut usize) -> u64 {
        assert!(stdin.data.len() <= 1 << 20, "the contract allows 1 MiB");
        let come = session.accepted.get(&self.name).copied().unwrap_or(0);
        assert!(stdin.offset <= come, "a gap in the input");
        let known = usize::try_from(come - stdin.offset).unwrap().min(stdin.data.len());
        let new = &stdin.data[known..];
        let new = &new[..new.len().min(*left)];
        *left -= new.len();
        session.take(new);
        let come = come + new.len() as u64;
        session.accepted.insert(self.name.clone(), come);
        come
    }
}

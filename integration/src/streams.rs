//! A client of sessions that is as careful as one can be: it comes back after whatever dies, from where it was.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use oc_proto::v1::{
    AttachExecRequest, AttachExecResponse, AttachStart, ExecAcknowledgement, ExecExit, ExecStdin,
    ExecStdinEnd, ExecStream, StartExecRequest, attach_exec_request::Input, attach_exec_response::Event,
    exec_service_client::ExecServiceClient,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming, transport::Channel};

use crate::mesh::{Mesh, PATIENCE};

/// Input on the way at once, bytes, as the contract advises.
const ON_THE_WAY: u64 = 128 << 10;
/// The longest that the session's output is held for us.
const HOLD_MS: u32 = 60_000;
const PAUSE: Duration = Duration::from_millis(50);
/// Requests that wait to be sent.
const WAITING: usize = 16;

/// Calls of one sandbox's sessions, through the gateway.
#[derive(Clone, Debug)]
pub struct Sessions {
    url: String,
    key: String,
    sandbox_id: String,
}

/// A connection to a session.
#[derive(Debug)]
pub struct Connection {
    /// What we say.
    pub said: mpsc::Sender<AttachExecRequest>,
    /// What we are told.
    pub told: Streaming<AttachExecResponse>,
}

impl Connection {
    /// Says something; `false` if nobody listens.
    pub async fn say(&self, input: Input) -> bool {
        let request = AttachExecRequest { input: Some(input), ..Default::default() };
        self.said.send(request).await.is_ok()
    }

    /// What comes next.
    ///
    /// # Errors
    ///
    /// How the stream broke, also where it ended or nothing came for a long time.
    pub async fn next(&mut self) -> Result<Event, Status> {
        let message = timeout(PATIENCE, self.told.message())
            .await
            .map_err(|_| Status::deadline_exceeded("nothing came"))??
            .ok_or_else(|| Status::out_of_range("the stream has ended"))?;
        message.event.ok_or_else(|| Status::internal("an event that says nothing"))
    }
}

/// What became of a session.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: ExecExit,
    /// How often we had to come back.
    pub returns: usize,
}

/// How far whoever follows a session is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// How often it was cut off.
    pub returns: usize,
    /// The bytes of output that it has read.
    pub offset: u64,
}

impl Sessions {
    /// Those of a sandbox.
    pub fn of(mesh: &Mesh, sandbox_id: &str) -> Self {
        Self { url: mesh.url.clone(), key: mesh.key.clone(), sandbox_id: sandbox_id.to_owned() }
    }

    /// The same with another key.
    #[must_use]
    pub fn with_key(mut self, key: &str) -> Self {
        key.clone_into(&mut self.key);
        self
    }

    /// The sandbox.
    pub fn sandbox_id(&self) -> &str {
        &self.sandbox_id
    }

    /// A client on a connection of its own.
    ///
    /// # Errors
    ///
    /// `UNAVAILABLE` if the gateway cannot be reached.
    pub async fn client(&self) -> Result<ExecServiceClient<Channel>, Status> {
        let endpoint =
            Channel::from_shared(self.url.clone()).map_err(|error| Status::internal(error.to_string()))?;
        let channel = endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(ExecServiceClient::new(channel).max_decoding_message_size(8 << 20))
    }

    /// A request with our key.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Ok(key) = self.key.parse() {
            request.metadata_mut().insert("x-api-key", key);
        }
        request
    }

    /// Starts a session of a shell's script; its ID.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub async fn start(&self, script: &str) -> anyhow::Result<String> {
        let args = vec!["-c".to_owned(), script.to_owned()];
        self.start_with(StartExecRequest { cmd: "sh".into(), args, ..Default::default() }).await
    }

    /// Starts a session; its ID.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub async fn start_with(&self, mut request: StartExecRequest) -> anyhow::Result<String> {
        self.sandbox_id.clone_into(&mut request.sandbox_id);
        let answer = self.client().await?.start_exec(self.request(request)).await?.into_inner();
        Ok(answer.session.context("no session")?.session_id)
    }

    /// Attaches, on a connection of its own.
    ///
    /// # Errors
    ///
    /// What the server says.
    pub async fn attach(&self, session_id: &str, start: AttachStart) -> Result<Connection, Status> {
        self.attach_by(self.client().await?, session_id, start).await
    }

    /// Attaches by a client that others may use, too.
    ///
    /// # Errors
    ///
    /// What the server says.
    pub async fn attach_by(
        &self,
        mut client: ExecServiceClient<Channel>,
        session_id: &str,
        start: AttachStart,
    ) -> Result<Connection, Status> {
        let (said, requests) = mpsc::channel(WAITING);
        let first = AttachExecRequest {
            sandbox_id: self.sandbox_id.clone(),
            session_id: session_id.to_owned(),
            input: Some(Input::Start(start)),
        };
        // There is room.
        let _ = said.try_send(first);
        let request = self.request(ReceiverStream::new(requests));
        let told = client.attach_exec(request).await?.into_inner();
        Ok(Connection { said, told })
    }

    /// Sends all of `stdin` to a session, in pieces of these sizes in turn, and reads all that it writes to its end, through
    /// whatever dies meanwhile.
    ///
    /// # Errors
    ///
    /// If a byte is missing or comes twice, or it does not go on for a long time.
    pub async fn follow(&self, session_id: &str, stdin: &[u8], pieces: &[usize]) -> anyhow::Result<Outcome> {
        self.follow_and_tell(session_id, stdin, pieces, &watch::Sender::default()).await
    }

    /// As [`Self::follow`], and tells how far it is.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn follow_and_tell(
        &self,
        session_id: &str,
        stdin: &[u8],
        pieces: &[usize],
        progress: &watch::Sender<Progress>,
    ) -> anyhow::Result<Outcome> {
        let mut follower = Follower {
            progress: progress.clone(),
            outcome: Outcome::default(),
            offset: 0,
            stdin: stdin.to_owned(),
            pieces: pieces.to_owned(),
            piece: 0,
        };
        let mut last = Instant::now();
        loop {
            let before = follower.offset;
            let broken = match self.attach(session_id, follower.start(session_id)).await {
                Ok(connection) => match follower.go_on(connection).await? {
                    Ok(()) => return Ok(follower.outcome),
                    Err(broken) => {
                        follower.outcome.returns += 1;
                        follower.tell();
                        broken
                    }
                },
                Err(refused) => refused,
            };
            if follower.offset > before {
                last = Instant::now();
            }
            let comes_back =
                [Code::Unavailable, Code::Aborted, Code::Cancelled, Code::Unknown, Code::Internal];
            if !comes_back.contains(&broken.code()) || last.elapsed() > PATIENCE {
                bail!("{} {session_id}: {broken}", self.sandbox_id);
            }
            sleep(PAUSE).await;
        }
    }
}

struct Follower {
    progress: watch::Sender<Progress>,
    outcome: Outcome,
    offset: u64,
    stdin: Vec<u8>,
    pieces: Vec<usize>,
    piece: usize,
}

impl Follower {
    fn tell(&self) {
        self.progress.send_replace(Progress { returns: self.outcome.returns, offset: self.offset });
    }

    fn start(&self, session_id: &str) -> AttachStart {
        AttachStart {
            offset: self.offset,
            attachment_id: format!("follower of {session_id}"),
            acknowledges: true,
            hold_ms: HOLD_MS,
            heartbeat_ms: 1000,
        }
    }

    /// Until the session has ended, or the connection.
    async fn go_on(&mut self, mut connection: Connection) -> anyhow::Result<Result<(), Status>> {
        let attached = match connection.next().await {
            Ok(Event::Attached(attached)) => attached,
            Ok(other) => bail!("first of all came {other:?}"),
            Err(broken) => return Ok(Err(broken)),
        };
        ensure!(attached.offset == self.offset, "{attached:?} for {}", self.offset);
        let (mut sent, mut accepted, mut has_ended) = (attached.stdin_offset, attached.stdin_offset, false);
        loop {
            let total = self.stdin.len() as u64;
            if sent < total && sent - accepted < ON_THE_WAY {
                let size = self.pieces[self.piece % self.pieces.len()].max(1);
                self.piece += 1;
                let begin = usize::try_from(sent)?;
                let data = self.stdin[begin..self.stdin.len().min(begin + size)].to_vec();
                let length = data.len() as u64;
                if connection.say(Input::Stdin(ExecStdin { offset: sent, data: data.into() })).await {
                    sent += length;
                }
            } else if sent == total && !has_ended {
                has_ended = connection.say(Input::StdinEnd(ExecStdinEnd {})).await;
            }
            let wants_to_say = sent < total && sent - accepted < ON_THE_WAY;
            let event = if wants_to_say {
                // What is there already; the rest waits for us.
                match timeout(Duration::from_millis(1), connection.told.message()).await {
                    Ok(Ok(Some(message))) => message.event.context("an event that says nothing")?,
                    Ok(Ok(None)) => bail!("it ended without an exit"),
                    Ok(Err(broken)) => return Ok(Err(broken)),
                    Err(_) => continue,
                }
            } else {
                match connection.next().await {
                    Ok(event) => event,
                    Err(broken) => return Ok(Err(broken)),
                }
            };
            match event {
                Event::Output(output) => {
                    ensure!(output.offset == self.offset, "{} for {}", output.offset, self.offset);
                    self.offset += output.data.len() as u64;
                    self.tell();
                    match output.stream() {
                        ExecStream::Stderr => self.outcome.stderr.extend_from_slice(&output.data),
                        _ => self.outcome.stdout.extend_from_slice(&output.data),
                    }
                    let acknowledged = ExecAcknowledgement { offset: self.offset };
                    connection.say(Input::Acknowledge(acknowledged)).await;
                }
                Event::StdinAccepted(told) => accepted = told.offset,
                Event::Exit(exit) => {
                    ensure!(exit.offset == self.offset, "{exit:?} at {}", self.offset);
                    self.outcome.exit = exit;
                    return Ok(Ok(()));
                }
                Event::Dropped(dropped) => bail!("{dropped:?}"),
                Event::Attached(again) => bail!("attached twice: {again:?}"),
                Event::Replayed(_) | Event::Heartbeat(_) => {}
            }
        }
    }
}

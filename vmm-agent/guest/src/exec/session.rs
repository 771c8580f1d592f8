//! One session: a process, its log, and who is attached to it.
//!
//! ```text
//!   process ── stdout, stderr ──▶ ring ──▶ every reader, from its own offset
//!      ▲                           │ waits while it would drop what a reader has not had
//!      └──────── stdin queue ◀── every client
//! ```
//!
//! This is the part that everybody shares; [`super::drive`] is the task that moves its bytes.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use nix::sys::signal::Signal;
use oc_proto::v1::{ExecKind, ExecSession, ExecStream, GetExecResultResponse, TerminalSize};
use prost::bytes::Bytes;
use tokio::{
    sync::Notify,
    time::{Instant, timeout, timeout_at},
};
use tonic::Status;

use super::{
    attachments::{Attachments, Wait},
    budget::Room,
    ring::{Piece, Ring},
    stdin::Stdin,
    terminal::{Size, Terminal},
};
use crate::{children::Group, refusal::Refusal};

/// What every ring may take, bytes, however many there are.
const GRANTED: usize = 64 << 10;
/// Input that finds no room for this long is refused where its sender cannot wait.
const TAKES_INPUT_WITHIN: Duration = Duration::from_secs(10);

/// What a session is, for good.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its ID.
    pub id: String,
    /// What it is.
    pub kind: ExecKind,
    /// The program, as it was asked for.
    pub command: String,
    /// The arguments after its name.
    pub args: Vec<String>,
    /// When it was started.
    pub started_at: SystemTime,
    /// What its ring may take, bytes.
    pub ring_bytes: usize,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code; -1 after the timeout.
    pub exit_code: i32,
    /// Whether the timeout ended it.
    pub timed_out: bool,
    /// When, of the clock on the wall.
    pub at: SystemTime,
    /// When, of the one that only goes on.
    pub since: Instant,
}

/// A session.
#[derive(Debug)]
pub struct Session {
    facts: Facts,
    group: Group,
    stdin: Stdin,
    state: Mutex<State>,
    /// Output came, or the end.
    written: Notify,
    /// Somebody took output, came or went.
    taken: Notify,
}

/// What changes.
#[derive(Debug)]
pub struct State {
    /// What was written.
    pub ring: Ring,
    /// Who is attached.
    pub attachments: Attachments,
    room: Room,
    /// Its terminal, as long as it runs, and the size of that, for good.
    terminal: Option<Arc<Terminal>>,
    size: Option<Size>,
    ended: Option<Ended>,
}

impl State {
    /// How it ended, once it has and all of its output is in the ring.
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }
}

impl Session {
    /// One whose process has just been started.
    pub fn new(facts: Facts, group: Group, terminal: Option<(Arc<Terminal>, Size)>) -> Arc<Self> {
        let room = Room::new(GRANTED.min(facts.ring_bytes));
        let (terminal, size) = terminal.unzip();
        let state = State {
            ring: Ring::new(room.get()),
            attachments: Attachments::new(Instant::now()),
            room,
            terminal,
            size,
            ended: None,
        };
        Arc::new(Self {
            facts,
            group,
            stdin: Stdin::default(),
            state: Mutex::new(state),
            written: Notify::new(),
            taken: Notify::new(),
        })
    }

    /// What changes. Not to be held over a wait.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A ring and its readers are whole whatever panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is, for good.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What its ring may take as it is now, bytes. More, if there is any, once that much was written.
    pub fn room(&self) -> usize {
        self.lock().room.get()
    }

    /// Its processes' group.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Its input.
    pub fn stdin(&self) -> &Stdin {
        &self.stdin
    }

    /// As it is told to clients of the sandbox called so.
    pub fn describe(&self, sandbox_id: String) -> ExecSession {
        let state = self.lock();
        let ended = state.ended;
        ExecSession {
            session_id: self.facts.id.clone(),
            sandbox_id,
            command: self.facts.command.clone(),
            args: self.facts.args.clone(),
            running: ended.is_none(),
            exit_code: ended.map(|ended| ended.exit_code),
            started_at: Some(self.facts.started_at.into()),
            ended_at: ended.map(|ended| ended.at.into()),
            attached_clients: i32::try_from(state.attachments.live()).unwrap_or(i32::MAX),
            kind: self.facts.kind.into(),
            output_bytes: state.ring.end(),
            dropped_bytes: state.ring.begin(),
            timed_out: ended.is_some_and(|ended| ended.timed_out),
            terminal: state.size.map(TerminalSize::from),
        }
    }

    /// How it stands, and what it wrote as far as that is kept.
    pub fn result(&self) -> GetExecResultResponse {
        let state = self.lock();
        GetExecResultResponse {
            running: state.ended.is_none(),
            exit_code: state.ended.map(|ended| ended.exit_code),
            stdout: state.ring.of_stream(ExecStream::Stdout),
            stderr: state.ring.of_stream(ExecStream::Stderr),
            truncated: state.ring.begin() > 0,
            timed_out: state.ended.is_some_and(|ended| ended.timed_out),
        }
    }

    /// Puts input in, and waits for room for a while.
    ///
    /// # Errors
    ///
    /// `SESSION_ENDED`; `OVERLOADED` if there is none.
    pub async fn write(&self, bytes: Bytes) -> Result<(), Status> {
        match timeout(TAKES_INPUT_WITHIN, self.stdin.room()).await {
            Ok(Ok(())) => self.stdin.put(bytes),
            Ok(Err(_)) => return Err(self.has_ended()),
            Err(_) => {
                return Err(
                    Refusal::Overloaded.status(format!("session {} does not read its input", self.facts.id))
                );
            }
        }
        Ok(())
    }

    /// The refusal of what needs a session that runs.
    pub fn has_ended(&self) -> Status {
        Refusal::SessionEnded.status(format!("session {} has ended, or its input has", self.facts.id))
    }

    /// Sends a signal to its processes. Fine if it has ended.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT`.
    pub fn signal(&self, number: i32) -> Result<(), Status> {
        let signal = Signal::try_from(number)
            .map_err(|_| Refusal::InvalidArgument.status(format!("there is no signal {number}")))?;
        let state = self.lock();
        if state.ended.is_none() {
            if let Some(terminal) = &state.terminal {
                terminal.signal_foreground(signal);
            }
            self.group.signal(signal);
        }
        Ok(())
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    ///
    /// `NO_TERMINAL`, `SESSION_ENDED`.
    pub fn resize(&self, size: Size) -> Result<(), Status> {
        let mut state = self.lock();
        if state.size.is_none() {
            return Err(Refusal::NoTerminal.status(format!("session {} has no terminal", self.facts.id)));
        }
        let terminal = state.terminal.as_ref().ok_or_else(|| self.has_ended())?;
        terminal.resize(size).map_err(|error| Refusal::Internal.status(format!("the terminal: {error}")))?;
        state.size = Some(size);
        Ok(())
    }

    /// Completes when output comes, or the end.
    pub fn written(&self) -> tokio::sync::futures::Notified<'_> {
        self.written.notified()
    }

    /// Tells readers to look again.
    pub fn tell_written(&self) {
        self.written.notify_waiters();
    }

    /// Tells whoever waits that a reader has taken something, come or gone.
    pub fn tell_taken(&self) {
        self.taken.notify_waiters();
    }

    /// Completes when somebody takes output, comes or goes.
    pub fn taken(&self) -> tokio::sync::futures::Notified<'_> {
        self.taken.notified()
    }

    /// Puts output in, once that drops nothing that somebody still needs.
    pub async fn put(&self, stream: ExecStream, bytes: Bytes) {
        loop {
            let mut taken = std::pin::pin!(self.taken.notified());
            taken.as_mut().enable();
            let wait = {
                let mut state = self.lock();
                let State { ring, attachments, room, .. } = &mut *state;
                while ring.is_full_with(bytes.len()) && room.grow(self.facts.ring_bytes) {
                    ring.set_capacity(room.get());
                }
                match attachments.wait(ring, bytes.len(), Instant::now()) {
                    None => {
                        ring.push(stream, bytes);
                        break;
                    }
                    Some(wait) => wait,
                }
            };
            match wait {
                Wait::ForIt => taken.await,
                Wait::Until(until) => timeout_at(until, taken).await.unwrap_or_default(),
            }
        }
        self.written.notify_waiters();
    }

    /// Notes the end. Nothing is put in afterwards.
    pub fn end(&self, exit_code: i32, timed_out: bool) {
        {
            let mut state = self.lock();
            state.ended = Some(Ended { exit_code, timed_out, at: SystemTime::now(), since: Instant::now() });
            state.terminal = None;
            let taken = state.ring.taken();
            state.room.shrink(taken);
        }
        self.stdin.close();
        self.written.notify_waiters();
        self.taken.notify_waiters();
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Ended {
        loop {
            let mut written = std::pin::pin!(self.written.notified());
            written.as_mut().enable();
            if let Some(ended) = self.lock().ended {
                return ended;
            }
            written.await;
        }
    }

    /// The output at `offset`, or how it ended if there is none and none will follow.
    pub fn read(&self, offset: u64, limit: usize) -> Read {
        let state = self.lock();
        match (state.ring.read(offset, limit), state.ended) {
            (Some(piece), _) => Read::Piece(piece),
            (None, Some(ended)) => Read::End(ended, state.ring.end()),
            (None, None) => Read::Nothing,
        }
    }
}

/// What there is to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// Output.
    Piece(Piece),
    /// Nothing, and nothing will follow: how it ended, and how much it wrote.
    End(Ended, u64),
    /// Nothing yet.
    Nothing,
}

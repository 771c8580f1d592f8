//! `AttachExec`: one connection of one client to a session.
//!
//! What the client says is read by a task of its own, so that an acknowledgement or a signal is never stuck behind output
//! that the client does not take. What it is told is made as it takes it: nothing waits here but in the session's ring.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, stream};
use oc_proto::v1::{
    AttachExecRequest, AttachExecResponse, AttachStart, ExecAttached, ExecDropped, ExecExit, ExecHeartbeat,
    ExecOutput, ExecReplayed, ExecStdin, ExecStdinAccepted, attach_exec_request::Input,
    attach_exec_response::Event,
};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep_until},
};
use tonic::{Status, Streaming};

use super::{
    attachments::{Connection, Gap, Terms, TooMany},
    ring::Piece,
    session::{Read, Session},
    terminal::Size,
};
use crate::refusal::Refusal;

/// Output in one message, bytes.
const MAX_OUTPUT: usize = 256 << 10;
/// Input in one message, bytes.
const MAX_STDIN: usize = 1 << 20;
/// Longest name of an attachment, characters.
const MAX_NAME: usize = 64;
/// The longest that an attachment is held.
const MAX_HOLD: Duration = Duration::from_secs(60);
/// Between signs of life: where nobody says otherwise, and at least.
const HEARTBEAT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(1));
/// Input that has come is told at once when it is so much, and else within [`TOLD_WITHIN`].
const TOLD_AT: u64 = 64 << 10;
const TOLD_WITHIN: Duration = Duration::from_millis(100);

/// What a client is told.
pub type Events = Pin<Box<dyn Stream<Item = Result<AttachExecResponse, Status>> + Send>>;

/// Attaches to `session` as `start` says, and goes on with what `requests` say.
///
/// # Errors
///
/// `INVALID_ARGUMENT`; `OVERLOADED` where too many are attached.
pub fn attach(
    session: Arc<Session>,
    sandbox_id: String,
    start: AttachStart,
    requests: Streaming<AttachExecRequest>,
) -> Result<Events, Status> {
    let (terms, heartbeat) = parse(&start)?;
    let is_named = !terms.name.is_empty();
    let (connection, begin, replayed, stdin) = {
        let mut state = session.lock();
        let begin = start.offset.clamp(state.ring.begin(), state.ring.end());
        let connection = state.attachments.attach(terms, begin).map_err(|TooMany| {
            Refusal::Overloaded.status("as many clients are attached to the session as may be")
        })?;
        (connection, begin, state.ring.end(), state.attachments.stdin(connection.key))
    };
    // An older connection of the same name learns of it, and so does whoever waits for a reader.
    session.tell_written();
    session.tell_taken();
    let attached = ExecAttached {
        session: Some(session.describe(sandbox_id)),
        offset: begin,
        dropped_bytes: begin.saturating_sub(start.offset),
        stdin_offset: stdin,
    };
    let (over, heard) = watch::channel(None);
    let (come, accepted) = watch::channel(stdin);
    let listener = Listener { session: Arc::clone(&session), connection, requests, come };
    let task = tokio::spawn(async move {
        let ended = listener.listen().await;
        over.send_replace(Some(ended));
    });
    let speaker = Speaker {
        place: Place { session, connection, is_broken: true, listener: task.abort_handle() },
        heard,
        accepted: is_named.then_some(accepted),
        told: stdin,
        unsaid_since: None,
        next: begin,
        replayed: Some(replayed),
        heartbeat,
        attached: Some(attached),
        is_over: false,
    };
    Ok(Box::pin(stream::unfold(speaker, |mut speaker| async move {
        let told = speaker.next().await?;
        Some((told, speaker))
    })))
}

fn parse(start: &AttachStart) -> Result<(Terms, Duration), Status> {
    let invalid = |text: String| Err(Refusal::InvalidArgument.status(text));
    if start.attachment_id.chars().count() > MAX_NAME {
        return invalid(format!("attachmentID is longer than {MAX_NAME} characters"));
    }
    let hold = Duration::from_millis(start.hold_ms.into());
    if hold > MAX_HOLD {
        return invalid(format!("holdMs is more than {}", MAX_HOLD.as_millis()));
    }
    let heartbeat = match start.heartbeat_ms {
        0 => HEARTBEAT.0,
        millis => Duration::from_millis(millis.into()).max(HEARTBEAT.1),
    };
    let name = start.attachment_id.clone();
    Ok((Terms { name, acknowledges: start.acknowledges, hold }, heartbeat))
}

/// A connection's place among the attachments, which is given up however it ends.
struct Place {
    session: Arc<Session>,
    connection: Connection,
    /// Whether its end is not what the client meant.
    is_broken: bool,
    listener: AbortHandle,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.listener.abort();
        self.session.lock().attachments.detach(self.connection, self.is_broken, Instant::now());
        self.session.tell_taken();
    }
}

/// How the client's side ended.
#[derive(Clone, Debug)]
enum Heard {
    /// It goes.
    Detached,
    /// It says nothing more, and listens on.
    Quiet,
    /// It broke off, or what it said cannot be.
    Broken(Status),
}

/// Reads what the client says.
struct Listener {
    session: Arc<Session>,
    connection: Connection,
    requests: Streaming<AttachExecRequest>,
    /// Input that has come, bytes.
    come: watch::Sender<u64>,
}

impl Listener {
    async fn listen(mut self) -> Heard {
        loop {
            let request = match self.requests.message().await {
                Ok(Some(request)) => request,
                Ok(None) => return Heard::Quiet,
                Err(error) => return Heard::Broken(error),
            };
            let heard = match request.input {
                None => Ok(()),
                Some(Input::Start(_)) => {
                    Err(Refusal::InvalidArgument.status("start comes in the first message, and only there"))
                }
                Some(Input::Stdin(stdin)) => self.take(stdin).await,
                Some(Input::StdinEnd(_)) => {
                    self.session.stdin().end();
                    Ok(())
                }
                Some(Input::Resize(size)) => Size::parse(size).and_then(|size| self.session.resize(size)),
                Some(Input::Signal(signal)) => self.session.signal(signal.signal),
                Some(Input::Acknowledge(acknowledged)) => {
                    self.session.lock().attachments.acknowledged(self.connection, acknowledged.offset);
                    self.session.tell_taken();
                    Ok(())
                }
                Some(Input::Detach(_)) => return Heard::Detached,
            };
            if let Err(error) = heard {
                return Heard::Broken(error);
            }
        }
    }

    /// Takes what has not come yet. Input to a session that has ended is nobody's any more, which its exit tells.
    async fn take(&self, stdin: ExecStdin) -> Result<(), Status> {
        let ExecStdin { offset, mut data } = stdin;
        if data.len() > MAX_STDIN {
            return Err(Refusal::InvalidArgument
                .status(format!("stdin is {} bytes; at most {MAX_STDIN} are taken", data.len())));
        }
        if self.session.stdin().room().await.is_err() {
            return Ok(());
        }
        let mut state = self.session.lock();
        if !state.attachments.is_current(self.connection) {
            return Ok(());
        }
        let key = self.connection.key;
        let known = state.attachments.known_input(key, offset, data.len()).map_err(|Gap { come }| {
            Refusal::InvalidArgument.status(format!("stdin goes on at {offset}, but {come} bytes have come"))
        })?;
        let fresh = data.split_off(known);
        state.attachments.input(key, fresh.len());
        // With the count, so that nobody sees one without the other.
        self.session.stdin().put(fresh);
        self.come.send_replace(state.attachments.stdin(key));
        Ok(())
    }
}

/// Makes what the client is told.
struct Speaker {
    place: Place,
    heard: watch::Receiver<Option<Heard>>,
    /// Input that has come, bytes; `None` where the client has no name to come back under.
    accepted: Option<watch::Receiver<u64>>,
    /// How much of it was told.
    told: u64,
    /// Since when that is less.
    unsaid_since: Option<Instant>,
    /// The next byte to send.
    next: u64,
    /// Where the replay ends, until that is told.
    replayed: Option<u64>,
    heartbeat: Duration,
    /// The first message, until it is told.
    attached: Option<ExecAttached>,
    is_over: bool,
}

impl Speaker {
    /// The next message; `None` after the last.
    async fn next(&mut self) -> Option<Result<AttachExecResponse, Status>> {
        let alive_until = Instant::now() + self.heartbeat;
        let session = Arc::clone(&self.place.session);
        while !self.is_over {
            let mut written = pin!(session.written());
            written.as_mut().enable();
            let heard = self.heard.borrow_and_update().clone();
            match &heard {
                Some(Heard::Detached) => {
                    self.end(false);
                    return None;
                }
                Some(Heard::Broken(error)) => {
                    self.end(true);
                    return Some(Err(error.clone()));
                }
                Some(Heard::Quiet) | None => {}
            }
            match self.ready() {
                Ok(None) => {}
                Ok(Some(event)) => return Some(Ok(AttachExecResponse { event: Some(event) })),
                Err(error) => return Some(Err(error)),
            }
            let until = self.unsaid_since.map_or(alive_until, |since| alive_until.min(since + TOLD_WITHIN));
            let accepted = self.accepted.as_mut();
            let come = async {
                let changed = match accepted {
                    Some(accepted) => accepted.changed().await.is_ok(),
                    None => false,
                };
                if !changed {
                    // Nothing can come: the listener is gone, or nobody wants to know.
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = written => {}
                () = come => {}
                // Its task ends after it has said how, and says nothing more.
                _ = self.heard.changed(), if heard.is_none() => {}
                () = sleep_until(until) => {
                    if Instant::now() >= alive_until {
                        let heartbeat = ExecHeartbeat { offset: self.next };
                        return Some(Ok(AttachExecResponse { event: Some(Event::Heartbeat(heartbeat)) }));
                    }
                }
            }
        }
        None
    }

    /// What can be told at once.
    fn ready(&mut self) -> Result<Option<Event>, Status> {
        if let Some(attached) = self.attached.take() {
            return Ok(Some(Event::Attached(attached)));
        }
        let (session, connection) = (&self.place.session, self.place.connection);
        if !session.lock().attachments.is_current(connection) {
            self.end(false);
            let text = "another connection has attached under the same name";
            return Err(Refusal::AttachedElsewhere.status(text));
        }
        let unsaid = self.accepted.as_ref().map_or(0, |accepted| *accepted.borrow() - self.told);
        if unsaid > 0 {
            let since = *self.unsaid_since.get_or_insert_with(Instant::now);
            if unsaid >= TOLD_AT || since.elapsed() >= TOLD_WITHIN {
                self.told += unsaid;
                self.unsaid_since = None;
                return Ok(Some(Event::StdinAccepted(ExecStdinAccepted { offset: self.told })));
            }
        }
        // What was there before ends exactly where that is told.
        let mut most = MAX_OUTPUT;
        if let Some(until) = self.replayed {
            match until.saturating_sub(self.next) {
                0 => {
                    self.replayed = None;
                    return Ok(Some(Event::Replayed(ExecReplayed { offset: self.next })));
                }
                left => most = most.min(usize::try_from(left).unwrap_or(most)),
            }
        }
        match session.read(self.next, most) {
            Read::Piece(piece) => Ok(Some(self.tell(piece))),
            Read::End(ended, offset) => {
                self.end(false);
                let (exit_code, timed_out) = (ended.exit_code, ended.timed_out);
                Ok(Some(Event::Exit(ExecExit { exit_code, timed_out, offset })))
            }
            Read::Nothing => Ok(None),
        }
    }

    /// Output; before it what is missing, if something is.
    fn tell(&mut self, piece: Piece) -> Event {
        if piece.offset > self.next {
            let dropped = ExecDropped { offset: self.next, bytes: piece.offset - self.next };
            self.next = piece.offset;
            return Event::Dropped(dropped);
        }
        self.next = piece.offset + piece.bytes.len() as u64;
        self.place.session.lock().attachments.sent(self.place.connection, self.next);
        self.place.session.tell_taken();
        let Piece { offset, stream, bytes } = piece;
        Event::Output(ExecOutput { offset, stream: stream.into(), data: bytes })
    }

    /// Nothing is told any more.
    fn end(&mut self, is_broken: bool) {
        self.is_over = true;
        self.place.is_broken = is_broken;
    }
}

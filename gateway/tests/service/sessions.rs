//! Sessions of the fake host: what they wrote, what came to them, and how their attachments are to behave.

use std::{collections::HashMap, pin::Pin, time::Duration};

use bytes::Bytes;
use futures_util::Stream;
use oc_mesh::error::{Reason, status};
use oc_proto::v1::{attach_exec_request::Input, attach_exec_response::Event, *};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(20);

pub type Attachment = Pin<Box<dyn Stream<Item = Result<AttachExecResponse, Status>> + Send>>;

/// All sessions, by ID.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<HashMap<String, Session>>);

/// One of them.
#[derive(Debug, Clone)]
pub struct Session(watch::Sender<State>);

/// What the session is, what happened to it, and what is to happen.
#[derive(Debug, Clone, Default)]
pub struct State {
    output: Vec<(u64, ExecStream, Bytes)>,
    written: u64,
    exit: Option<i32>,
    /// What its process has read.
    pub stdin: Vec<u8>,
    /// How much of each named attachment's input has come.
    come: HashMap<String, u64>,
    /// The first messages of its attachments.
    pub starts: Vec<AttachStart>,
    /// All that was acknowledged.
    pub acknowledged: u64,
    /// Messages of its attachments but for the first.
    pub inputs: Vec<Input>,
    pub detached: usize,
    pub attached: usize,
    /// Bytes of output that were handed over to the transport.
    pub sent: u64,
    /// Attachments end when this grows.
    breaks: usize,
    /// How attachments end then, and are refused as long as this is set.
    refuses: Option<Reason>,
    /// Output without end.
    floods: bool,
    /// Input is not read.
    pub deaf: bool,
    /// Input is read, and nobody told.
    pub mute: bool,
    /// Output is sent twice as much as is due: from before the byte that was asked for.
    pub repeats: bool,
}

impl Sessions {
    /// The session of this ID, from now on.
    pub fn start(&self, id: &str) -> Session {
        let session = Session(watch::Sender::default());
        self.0.lock().insert(id.to_owned(), session.clone());
        session
    }

    pub async fn attach(
        &self,
        request: Request<Streaming<AttachExecRequest>>,
    ) -> Result<Response<Attachment>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.unwrap();
        let Some(Input::Start(start)) = first.input else {
            return Err(status(Reason::InvalidArgument, "the first message is not `start`"));
        };
        let session = self.0.lock().get(&first.session_id).cloned();
        let session = session.ok_or_else(|| status(Reason::SessionNotFound, "there is no such session"))?;
        session.0.send_modify(|state| state.starts.push(start.clone()));
        if let Some(reason) = session.0.borrow().refuses {
            return Err(status(reason, "as asked"));
        }
        Ok(Response::new(Box::pin(session.attachment(start, requests))))
    }
}

fn message(event: Event) -> Result<AttachExecResponse, Status> {
    Ok(AttachExecResponse { event: Some(event) })
}

/// Counts an attachment while it lasts.
struct Counted(watch::Sender<State>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|state| state.attached -= 1);
    }
}

impl Session {
    fn attachment(
        self,
        start: AttachStart,
        mut requests: Streaming<AttachExecRequest>,
    ) -> impl Stream<Item = Result<AttachExecResponse, Status>> {
        let mut changes = self.0.subscribe();
        self.0.send_modify(|state| state.attached += 1);
        let counted = Counted(self.0.clone());
        let (events, mut accepted) = mpsc::channel(1024);
        let (this, attachment_id) = (self.clone(), start.attachment_id.clone());
        // Beside the output, as a guest does: what is blocked there does not block this.
        tokio::spawn(async move {
            let mut changes = this.0.subscribe();
            while changes.wait_for(|state| !state.deaf).await.is_ok() {
                let Ok(Some(AttachExecRequest { input: Some(input), .. })) = requests.message().await else {
                    return;
                };
                // What came while it was deaf is lost with the connection, if that breaks.
                if changes.borrow().deaf {
                    continue;
                }
                if let Some(event) = this.take(&attachment_id, input) {
                    let _ = events.send(event).await;
                }
            }
        });
        async_stream::stream! {
            let _counted = counted;
            let seen = changes.borrow_and_update().clone();
            let mut next = start.offset.min(seen.written);
            yield message(Event::Attached(ExecAttached {
                session: Some(ExecSession { session_id: "e-1".into(), running: true, ..Default::default() }),
                offset: next,
                dropped_bytes: 0,
                stdin_offset: seen.come.get(&start.attachment_id).copied().unwrap_or(0),
            }));
            let mut is_open = true;
            if seen.repeats {
                next = 0;
            }
            let mut replayed = false;
            loop {
                let state = changes.borrow_and_update().clone();
                if state.breaks != seen.breaks {
                    let reason = state.refuses.unwrap_or(Reason::HostUnavailable);
                    yield Err(status(reason, "as asked"));
                    return;
                }
                for (offset, stream, data) in &state.output {
                    let end = offset + data.len() as u64;
                    if end > next {
                        let data = data.slice((next.max(*offset) - offset) as usize..);
                        let offset = end - data.len() as u64;
                        next = end;
                        self.0.send_modify(|state| state.sent += data.len() as u64);
                        yield message(Event::Output(ExecOutput { offset, stream: (*stream).into(), data }));
                    }
                }
                if !std::mem::replace(&mut replayed, true) {
                    yield message(Event::Replayed(ExecReplayed { offset: next }));
                }
                if let Some(exit_code) = state.exit {
                    yield message(Event::Exit(ExecExit { exit_code, timed_out: false, offset: next }));
                    return;
                }
                if state.floods {
                    let data = Bytes::from(vec![b'x'; 256 << 10]);
                    let (offset, stream) = (next, ExecStream::Stdout.into());
                    next += data.len() as u64;
                    self.0.send_modify(|state| state.sent += data.len() as u64);
                    yield message(Event::Output(ExecOutput { offset, stream, data }));
                    continue;
                }
                tokio::select! {
                    _ = changes.changed() => {}
                    event = accepted.recv(), if is_open => match event {
                        Some(event) => yield message(event),
                        // Ended with `detach`, or it broke.
                        None if self.0.borrow().detached > 0 => return,
                        None => is_open = false,
                    }
                }
            }
        }
    }

    fn take(&self, attachment: &str, input: Input) -> Option<Event> {
        let mut accepted = None;
        self.0.send_modify(|state| {
            match &input {
                Input::Stdin(stdin) => {
                    let come = state.come.entry(attachment.to_owned()).or_default();
                    let known = come.checked_sub(stdin.offset).expect("a gap in the input") as usize;
                    let new = stdin.data.get(known..).unwrap_or_default();
                    *come += new.len() as u64;
                    let offset = *come;
                    state.stdin.extend_from_slice(new);
                    accepted = (!state.mute).then_some(Event::StdinAccepted(ExecStdinAccepted { offset }));
                }
                Input::Acknowledge(acknowledged) => state.acknowledged = acknowledged.offset,
                Input::Detach(_) => state.detached += 1,
                _ => {}
            }
            state.inputs.push(input);
        });
        accepted
    }

    /// It writes.
    pub fn write(&self, stream: ExecStream, data: impl Into<Bytes>) {
        let data = data.into();
        self.0.send_modify(|state| {
            let offset = state.written;
            state.written += data.len() as u64;
            state.output.push((offset, stream, data));
        });
    }

    pub fn say(&self, text: &str) {
        self.write(ExecStream::Stdout, text.to_owned());
    }

    pub fn exit(&self, code: i32) {
        self.0.send_modify(|state| state.exit = Some(code));
    }

    /// It writes without end.
    pub fn flood(&self) {
        self.0.send_modify(|state| state.floods = true);
    }

    /// Whatever is attached breaks off, as if the host's agent died.
    pub fn break_off(&self) {
        self.0.send_modify(|state| state.breaks += 1);
    }

    /// The same, and nobody may attach until [`Session::relent`].
    pub fn refuse(&self, reason: Reason) {
        self.0.send_modify(|state| {
            state.breaks += 1;
            state.refuses = Some(reason);
        });
    }

    pub fn relent(&self) {
        self.0.send_modify(|state| state.refuses = None);
    }

    pub fn change(&self, change: impl FnOnce(&mut State)) {
        self.0.send_modify(change);
    }

    pub fn state(&self) -> State {
        self.0.borrow().clone()
    }

    /// Waits until something is true of it.
    pub async fn until(&self, what: impl Fn(&State) -> bool) -> State {
        let mut changes = self.0.subscribe();
        let seen = tokio::time::timeout(PATIENCE, changes.wait_for(|state| what(state))).await;
        match seen {
            Ok(state) => state.unwrap().clone(),
            Err(_) => panic!("not in time: {:?}", self.0.borrow()),
        }
    }
}

impl Sessions {
    /// How REST's answers about sessions look.
    pub fn described(id: &str) -> ExecSession {
        ExecSession {
            session_id: id.into(),
            sandbox_id: "sb-1".into(),
            command: "bash".into(),
            args: vec!["-l".into()],
            running: true,
            started_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            attached_clients: 1,
            kind: ExecKind::Command.into(),
            ..Default::default()
        }
    }
}

//! The pump of a client that speaks the contract's own messages: they are passed on as they are, both ways. The client
//! resumes by itself, so whatever ends the call ends the connection, with a code that says whether to attach again.

use std::{collections::VecDeque, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use oc_proto::v1::{AttachExecRequest, attach_exec_request::Input};
use prost::Message as _;
use tokio::{sync::mpsc, time::Instant};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    Limits,
    attach::Target,
    closing::{self, Close},
    cut::Cut,
    host::{self, Downlink, Host},
    liveness::{Action, Liveness},
    path::Named,
    published::Garbage,
    report::Report,
    resumed::room,
    socket::{Event, Socket},
};
use crate::{failure::presentable, upstream::Patience};

/// Largest message from a client: 1 MiB of input, and what is around it.
pub const MAX_MESSAGE: usize = (1 << 20) + 256;
/// Messages of so many bytes wait for the host; then the client is not read.
const MAX_WAITING: usize = 256 << 10;
/// What a message costs at least.
const MESSAGE_COST: usize = 128;
/// How long a client may take to say where it begins.
const STARTS_WITHIN: Duration = Duration::from_secs(10);
/// How long an end may take, on either side.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
/// How long a client may take for the last of its output.
const TAKES_THE_REST_WITHIN: Duration = Duration::from_secs(60);

/// A client and its call.
#[derive(Debug)]
pub struct Relayed {
    socket: Socket,
    target: Arc<Target>,
    report: Report,
    patience: Patience,
    uplink: Option<mpsc::Sender<Bytes>>,
    link: Link,
    waiting: VecDeque<Bytes>,
    waiting_bytes: usize,
    alive: Liveness,
    starts_until: Instant,
    /// The client said that it does not come back.
    detached: bool,
}

/// The way to the host.
enum Link {
    /// The client has not said yet where it begins.
    Unstarted,
    Calling(BoxFuture<'static, Result<Host, Status>>),
    Called(Downlink),
}

/// What a link brings.
enum Brought {
    Called(Result<Host, Status>),
    Message(Result<Option<Bytes>, Status>),
}

/// Why it is over.
enum End {
    Over,
    Closed(u16),
    Unreadable(Error),
    Vanished,
    Said(Close),
    Failed(Status),
}

impl Relayed {
    /// Waits for the client's first message.
    #[must_use]
    pub fn new(
        socket: Socket,
        target: Arc<Target>,
        patience: Patience,
        limits: Limits,
        report: Report,
    ) -> Self {
        let now = Instant::now();
        Self {
            socket,
            target,
            report,
            patience,
            uplink: None,
            link: Link::Unstarted,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            alive: Liveness::new(limits.patience, now),
            starts_until: now + STARTS_WITHIN,
            detached: false,
        }
    }

    /// Relays until either side is done, and ends both.
    pub async fn run(mut self, draining: CancellationToken) {
        let end = self.pump(&draining).await;
        let patience = match end {
            End::Over => TAKES_THE_REST_WITHIN,
            End::Vanished => Duration::ZERO,
            _ => ENDS_WITHIN,
        };
        let close = match end {
            End::Over => Some(Close::ended()),
            End::Said(close) => Some(close),
            End::Failed(error) => Some(Close::failed(&error)),
            End::Unreadable(error) => Close::unreadable(&error),
            End::Closed(code) => {
                self.report.code = code;
                None
            }
            End::Vanished => None,
        };
        if let Some(close) = &close {
            self.report.code = close.code;
        }
        self.report.bytes_sent = self.socket.bytes_sent;
        self.report.bytes_received = self.socket.bytes_received;
        let host = match (self.uplink, self.link) {
            // Only who said that he goes is waited for: for all others the connection broke, and is held.
            (Some(uplink), Link::Called(downlink)) if self.detached => Some(Host { uplink, downlink }),
            _ => None,
        };
        let (socket, waiting) = (&mut self.socket, self.waiting);
        tokio::join!(
            async {
                match close {
                    Some(close) => socket.close(&close, patience).await,
                    None => socket.answer_close(patience).await,
                }
            },
            async {
                let Some(host) = host else { return };
                let sent = async {
                    for message in waiting {
                        let _ = host.uplink.send(message).await;
                    }
                };
                if tokio::time::timeout(ENDS_WITHIN, sent).await.is_ok() {
                    host.end(None, ENDS_WITHIN).await;
                }
            },
        );
    }

    async fn pump(&mut self, draining: &CancellationToken) -> End {
        let mut stop = pin!(draining.cancelled());
        let mut timer = pin!(tokio::time::sleep_until(self.due()));
        loop {
            let due = self.due();
            if due < timer.deadline() {
                timer.as_mut().reset(due);
            }
            let reading = self.waiting_bytes < MAX_WAITING;
            let flushed = self.socket.is_flushed();
            let step = tokio::select! {
                biased;
                () = &mut stop => Err(End::Said(Close::draining())),
                event = self.socket.event(reading) => self.on_client(event),
                () = room(self.uplink.as_ref()), if !self.waiting.is_empty() => {
                    self.send_on();
                    Ok(())
                }
                brought = self.link.next(), if flushed => self.on_host(brought),
                () = &mut timer => {
                    let step = self.on_time(reading);
                    timer.as_mut().reset(self.due());
                    step
                }
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Sends what has waited longest.
    fn send_on(&mut self) {
        let Some(message) = self.waiting.pop_front() else { return };
        self.waiting_bytes -= message.len() + MESSAGE_COST;
        if self.uplink.as_ref().is_some_and(|uplink| uplink.try_send(message).is_err()) {
            // The host takes no more; why, comes with its answer.
            self.uplink = None;
        }
    }

    fn due(&self) -> Instant {
        let due = self.alive.due();
        if matches!(self.link, Link::Unstarted) { due.min(self.starts_until) } else { due }
    }

    fn on_client(&mut self, event: Event) -> Result<(), End> {
        let now = Instant::now();
        match event {
            Event::Flushed => self.alive.sent(now),
            Event::Alive => self.alive.received(now),
            Event::Message(Message::Binary(message)) => {
                self.alive.received(now);
                self.on_message(message)?;
            }
            Event::Message(_) => return Err(End::Said(Close::garbage(Garbage::Text))),
            Event::Closed(frame) => {
                return Err(End::Closed(frame.map_or(closing::NO_CODE, |frame| frame.code.into())));
            }
            Event::Broken(error) => return Err(End::Unreadable(error)),
        }
        Ok(())
    }

    fn on_message(&mut self, message: Bytes) -> Result<(), End> {
        let decoded = AttachExecRequest::decode(message.clone())
            .map_err(|_| End::Said(Close::invalid("a message is not an `AttachExecRequest`")))?;
        self.detached |= matches!(decoded.input, Some(Input::Detach(_)));
        if matches!(self.link, Link::Unstarted) {
            let first = host::framed(&first(decoded, &self.target.session).map_err(End::Said)?);
            let (target, patience) = (Arc::clone(&self.target), self.patience);
            self.link = Link::Calling(Box::pin(async move { target.call(first, patience).await }));
        } else {
            self.waiting_bytes += message.len() + 5 + MESSAGE_COST;
            self.waiting.push_back(host::framed_bytes(&message));
        }
        Ok(())
    }

    fn on_host(&mut self, brought: Brought) -> Result<(), End> {
        match brought {
            Brought::Called(Ok(host)) => {
                self.uplink = Some(host.uplink);
                self.link = Link::Called(host.downlink);
            }
            Brought::Message(Ok(Some(message))) => self.socket.send(Cut::whole(message)),
            Brought::Message(Ok(None)) => return Err(End::Over),
            Brought::Called(Err(error)) | Brought::Message(Err(error)) => {
                return Err(End::Failed(presentable(error)));
            }
        }
        Ok(())
    }

    fn on_time(&mut self, reading: bool) -> Result<(), End> {
        let now = Instant::now();
        if matches!(self.link, Link::Unstarted) && now >= self.starts_until {
            return Err(End::Said(Close::policy("the first message did not come in time")));
        }
        let flushed = self.socket.is_flushed();
        // The client has asked for its own signs of life, and judges the host by them.
        self.alive.heard(now);
        loop {
            match self.alive.act(now) {
                Action::Wait => return Ok(()),
                Action::ClientGone if flushed && reading => return Err(End::Vanished),
                Action::ClientGone => self.alive.received(now),
                Action::Ping => self.socket.ping(),
                Action::KeepAlive | Action::HostGone => {}
            }
        }
    }
}

/// The first message as it goes to the host: the path has named the session.
fn first(mut message: AttachExecRequest, session: &Named) -> Result<AttachExecRequest, Close> {
    let same = |given: &str, named: &str| given.is_empty() || given == named;
    if !matches!(message.input, Some(Input::Start(_))) {
        return Err(Close::invalid("the first message must be `start`"));
    }
    if !same(&message.sandbox_id, &session.sandbox_id) || !same(&message.session_id, &session.session_id) {
        return Err(Close::invalid("`sandbox_id` and `session_id` must be those of the path, or empty"));
    }
    message.sandbox_id.clone_from(&session.sandbox_id);
    message.session_id.clone_from(&session.session_id);
    Ok(message)
}

impl Link {
    async fn next(&mut self) -> Brought {
        match self {
            Self::Unstarted => std::future::pending().await,
            Self::Calling(calling) => Brought::Called(calling.await),
            Self::Called(downlink) => Brought::Message(downlink.next().await),
        }
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Unstarted => "unstarted",
            Self::Calling(_) => "calling",
            Self::Called(_) => "called",
        })
    }
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::{AttachStart, ExecDetach};

    use super::*;
    use crate::ws::path::Kind;

    #[test]
    fn the_first_message_is_for_the_session_of_the_path() {
        let session = Named {
            kind: Kind::Exec,
            sandbox_id: "sb-1".into(),
            session_id: "e-1".into(),
            route: "/sandboxes/{sandbox_id}/exec/{session_id}",
        };
        let start = |sandbox_id: &str, session_id: &str| AttachExecRequest {
            sandbox_id: sandbox_id.into(),
            session_id: session_id.into(),
            input: Some(Input::Start(AttachStart { offset: 7, ..Default::default() })),
        };
        assert_eq!(first(start("", ""), &session), Ok(start("sb-1", "e-1")));
        assert_eq!(first(start("sb-1", "e-1"), &session), Ok(start("sb-1", "e-1")));
        for wrong in [
            start("sb-2", ""),
            start("", "e-2"),
            AttachExecRequest { input: None, ..start("", "") },
            AttachExecRequest { input: Some(Input::Detach(ExecDetach {})), ..start("", "") },
        ] {
            assert_eq!(first(wrong, &session).unwrap_err().code, closing::INVALID);
        }
    }
}

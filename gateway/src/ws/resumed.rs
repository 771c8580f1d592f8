//! The pump of a client that speaks the published framing, and cannot resume: the gateway does it for it.
//!
//! The gateway attaches under a name that it made up, keeps the input that has not come yet and the client's place in
//! the output, acknowledges what the client took, and attaches again from there when the host's agent was killed: the
//! client sees each byte once, and one end of the replay. One task does all of it, and each direction waits for its own
//! reader alone: output is not read from the host before the client has taken what came before, input is not read from
//! the client while [`MAX_ON_THE_WAY`](super::stdin::MAX_ON_THE_WAY) of it has not come, and acknowledgements pass by
//! both.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use oc_mesh::error::{Reason, status};
use oc_proto::v1::{
    AttachExecRequest, AttachStart, ExecAcknowledgement, ExecAttached, ExecDetach, ExecStdin,
    attach_exec_request::Input, attach_exec_response,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_tungstenite::tungstenite::Error;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    Limits,
    attach::{Target, may_pass},
    closing::{self, Close},
    host::{self, Downlink, Host},
    liveness::{Action, Liveness},
    output::{Due, Output},
    path::Kind,
    published,
    report::Report,
    socket::{Event, Socket},
    stdin::Stdin,
};
use crate::failure::presentable;

/// Largest message from a client: 1 MiB of input, and the byte in front of it.
pub const MAX_MESSAGE: usize = (1 << 20) + 1;
/// What was taken is acknowledged together if it comes within this time.
const SOON: Duration = Duration::from_millis(20);
/// A host that ends an attachment sooner than this has not really come back.
const CAME_BACK: Duration = Duration::from_secs(1);
/// How often in a row a host may do so.
const MAX_RELAPSES: u32 = 10;
/// How long a client may take for the last of its output.
const TAKES_THE_REST_WITHIN: Duration = Duration::from_secs(60);
/// How long a close may take.
const CLOSES_WITHIN: Duration = Duration::from_secs(5);

/// The name that an attachment has, and where it begins.
#[derive(Debug, Clone)]
pub struct Name(String);

impl Name {
    /// One that nobody else has.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }

    /// Attaches under this name from this byte on.
    #[must_use]
    pub fn start(&self, offset: u64, limits: &Limits) -> AttachStart {
        AttachStart {
            offset,
            attachment_id: self.0.clone(),
            acknowledges: true,
            hold_ms: u32::try_from(limits.resume.as_millis()).unwrap_or(u32::MAX),
            heartbeat_ms: 0,
        }
    }
}

/// A client and its session.
#[derive(Debug)]
pub struct Resumed {
    socket: Socket,
    target: Arc<Target>,
    name: Name,
    limits: Limits,
    report: Report,
    uplink: Option<mpsc::Sender<Bytes>>,
    link: Link,
    session: Session,
    alive: Liveness,
    attached: Instant,
    relapses: u32,
    replayed: bool,
    exited: bool,
}

/// What is known of both directions.
#[derive(Debug)]
struct Session {
    stdin: Stdin,
    output: Output,
    acknowledge: bool,
    acknowledge_at: Option<Instant>,
}

/// The way to the host.
enum Link {
    Attached(Downlink),
    Broken(BoxFuture<'static, Result<(Host, ExecAttached), Status>>),
}

/// What a link brings.
enum Brought {
    Message(Result<Option<Bytes>, Status>),
    Attached(Box<Result<(Host, ExecAttached), Status>>),
}

/// Why it is over.
enum End {
    Exited,
    Closed(u16),
    Unreadable(Error),
    Vanished,
    Said(Close),
    Failed(Status),
    Draining,
}

impl Resumed {
    /// Begins where a host said that the attachment begins.
    #[must_use]
    pub fn new(
        socket: Socket,
        target: Arc<Target>,
        name: Name,
        (host, attached): (Host, ExecAttached),
        limits: Limits,
        report: Report,
    ) -> Self {
        let now = Instant::now();
        let session = Session {
            stdin: Stdin::default(),
            output: Output::starting_at(attached.offset),
            acknowledge: false,
            acknowledge_at: None,
        };
        Self {
            socket,
            target,
            name,
            limits,
            report,
            uplink: Some(host.uplink),
            link: Link::Attached(host.downlink),
            session,
            alive: Liveness::new(limits.patience, now),
            attached: now,
            relapses: 0,
            replayed: false,
            exited: false,
        }
    }

    /// Pumps until either side is done, and ends both.
    pub async fn run(mut self, draining: CancellationToken) {
        let end = self.pump(&draining).await;
        let detach = !matches!(end, End::Exited | End::Failed(_));
        let patience = match end {
            End::Exited => TAKES_THE_REST_WITHIN,
            End::Vanished => Duration::ZERO,
            _ => CLOSES_WITHIN,
        };
        let close = match end {
            End::Exited => Some(Close::ended()),
            End::Said(close) => Some(close),
            End::Failed(error) => Some(Close::failed(&error)),
            End::Draining => Some(Close::draining()),
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
        self.report.missed_bytes = self.session.output.missed;
        let host = match (self.uplink, self.link) {
            (Some(uplink), Link::Attached(downlink)) => Some(Host { uplink, downlink }),
            _ => None,
        };
        let last = detach.then(|| framed(Input::Detach(ExecDetach {})));
        let socket = &mut self.socket;
        tokio::join!(
            async {
                match close {
                    Some(close) => socket.close(&close, patience).await,
                    None => socket.answer_close(patience).await,
                }
            },
            async {
                if let Some(host) = host {
                    host.end(last, CLOSES_WITHIN).await;
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
            let reading = self.session.stdin.has_room();
            let flushed = self.socket.is_flushed();
            let step = tokio::select! {
                biased;
                () = &mut stop => Err(End::Draining),
                event = self.socket.event(reading) => self.on_client(event),
                () = room(self.uplink.as_ref()), if self.session.has_something_to_say() => {
                    let sent = self.uplink.as_ref().map(|uplink| uplink.try_send(self.session.say()));
                    if let Some(Err(_)) = sent {
                        // The host takes no more; why, comes with its answer.
                        self.uplink = None;
                    }
                    Ok(())
                }
                brought = self.link.next(), if flushed || self.link.is_broken() => self.on_host(brought),
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

    /// When to look at the clock again.
    fn due(&self) -> Instant {
        let due = self.alive.due();
        self.session.acknowledge_at.map_or(due, |at| due.min(at))
    }

    fn on_client(&mut self, event: Event) -> Result<(), End> {
        let now = Instant::now();
        match event {
            Event::Flushed => {
                self.alive.sent(now);
                if self.exited {
                    return Err(End::Exited);
                }
                self.session.taken(now);
            }
            Event::Alive => self.alive.received(now),
            Event::Message(message) => {
                self.alive.received(now);
                match published::input(self.kind(), message) {
                    Ok(input) => self.session.stdin.push(&input),
                    Err(garbage) => return Err(End::Said(Close::garbage(garbage))),
                }
            }
            Event::Closed(frame) => {
                return Err(End::Closed(frame.map_or(closing::NO_CODE, |frame| frame.code.into())));
            }
            Event::Broken(error) => return Err(End::Unreadable(error)),
        }
        Ok(())
    }

    fn on_host(&mut self, brought: Brought) -> Result<(), End> {
        self.alive.heard(Instant::now());
        match brought {
            Brought::Message(Ok(Some(message))) => {
                self.on_message(host::decode(message).map_err(End::Failed)?.event);
                // A terminal's end has no message of its own.
                if self.exited && self.socket.is_flushed() { Err(End::Exited) } else { Ok(()) }
            }
            Brought::Message(Ok(None)) => {
                Err(End::Failed(status(Reason::Internal, "the attachment ended before the session")))
            }
            Brought::Message(Err(error)) => self.on_break(presentable(error)),
            Brought::Attached(outcome) => {
                let (host, attached) = outcome.map_err(|error| End::Failed(presentable(error)))?;
                self.attached = Instant::now();
                self.report.reattached += 1;
                self.session.restart(&attached);
                self.uplink = Some(host.uplink);
                self.link = Link::Attached(host.downlink);
                Ok(())
            }
        }
    }

    fn on_message(&mut self, event: Option<attach_exec_response::Event>) {
        use attach_exec_response::Event;
        let kind = self.kind();
        match event {
            Some(Event::Output(output)) => {
                let stream = output.stream();
                let data = self.session.output.take(output.offset, output.data);
                if !data.is_empty() {
                    self.socket.send(published::output(kind, stream, data));
                }
            }
            Some(Event::Replayed(_)) => self.end_replay(),
            Some(Event::Dropped(gap)) => self.session.output.skip_to(gap.offset.saturating_add(gap.bytes)),
            Some(Event::StdinAccepted(accepted)) => self.session.stdin.accept(accepted.offset),
            Some(Event::Exit(exit)) => {
                // Nobody waits for it in vain.
                self.end_replay();
                if let Some(exit) = published::exit(kind, exit.exit_code) {
                    self.socket.send(exit);
                }
                self.exited = true;
            }
            Some(Event::Attached(_) | Event::Heartbeat(_)) | None => {}
        }
    }

    fn end_replay(&mut self) {
        if !std::mem::replace(&mut self.replayed, true)
            && let Some(replayed) = published::replayed(self.kind())
        {
            self.socket.send(replayed);
        }
    }

    /// The call ended with an error: attaches again if it may pass.
    fn on_break(&mut self, error: Status) -> Result<(), End> {
        if !may_pass(&error) {
            return Err(End::Failed(error));
        }
        self.relapses = if self.attached.elapsed() < CAME_BACK { self.relapses + 1 } else { 0 };
        if self.relapses > MAX_RELAPSES {
            return Err(End::Failed(error));
        }
        let start = self.name.start(self.session.output.next(), &self.limits);
        let first = host::framed(&self.target.first_message(start));
        let (target, within) = (Arc::clone(&self.target), self.limits.resume);
        self.uplink = None;
        self.link = Link::Broken(Box::pin(async move { target.reattach(first, within).await }));
        Ok(())
    }

    fn on_time(&mut self, reading: bool) -> Result<(), End> {
        let now = Instant::now();
        if self.session.acknowledge_at.is_some_and(|at| at <= now) {
            self.session.acknowledge = true;
            self.session.acknowledge_at = None;
        }
        let flushed = self.socket.is_flushed();
        if !flushed || self.link.is_broken() {
            // It is not listened to.
            self.alive.heard(now);
        }
        loop {
            match self.alive.act(now) {
                Action::Wait => return Ok(()),
                Action::ClientGone if flushed && reading => return Err(End::Vanished),
                Action::ClientGone => self.alive.received(now),
                Action::Ping => self.socket.ping(),
                Action::KeepAlive if flushed => {
                    if let Some(keepalive) = published::keepalive(self.kind()) {
                        self.socket.send(keepalive);
                    }
                }
                Action::KeepAlive => {}
                Action::HostGone => {
                    self.on_break(status(
                        Reason::HostUnavailable,
                        "the sandbox's host says nothing any more",
                    ))?;
                }
            }
        }
    }

    fn kind(&self) -> Kind {
        self.target.session.kind
    }
}

impl Session {
    /// The client has taken all that it was sent.
    fn taken(&mut self, now: Instant) {
        match self.output.due() {
            Due::Never => {}
            Due::Soon => self.acknowledge_at = self.acknowledge_at.or(Some(now + SOON)),
            Due::Now => self.acknowledge = true,
        }
    }

    fn has_something_to_say(&self) -> bool {
        self.acknowledge || self.stdin.has_unsent()
    }

    /// The next message to the host. Acknowledgements first: the session may wait for one.
    fn say(&mut self) -> Bytes {
        if self.acknowledge {
            self.acknowledge = false;
            self.acknowledge_at = None;
            let offset = self.output.acknowledge();
            return framed(Input::Acknowledge(ExecAcknowledgement { offset }));
        }
        let (offset, data) = self.stdin.send().unwrap_or_default();
        framed(Input::Stdin(ExecStdin { offset, data }))
    }

    /// Attached again.
    fn restart(&mut self, attached: &ExecAttached) {
        self.output.skip_to(attached.offset);
        self.output.restart();
        self.stdin.restart(attached.stdin_offset);
        self.acknowledge = false;
        self.acknowledge_at = None;
    }
}

impl Link {
    fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_))
    }

    async fn next(&mut self) -> Brought {
        match self {
            Self::Attached(downlink) => Brought::Message(downlink.next().await),
            Self::Broken(attaching) => Brought::Attached(Box::new(attaching.await)),
        }
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Attached(_) => "attached",
            Self::Broken(_) => "broken",
        })
    }
}

/// Detaches for a client that went before it was there.
pub async fn detach(host: Host) {
    host.end(Some(framed(Input::Detach(ExecDetach {}))), CLOSES_WITHIN).await;
}

/// Waits until a message can be sent to the host, or it takes no more. For ever while there is no host.
pub async fn room(uplink: Option<&mpsc::Sender<Bytes>>) {
    match uplink {
        // Nobody else sends, so the room is still there when the permit is given back.
        Some(uplink) => drop(uplink.reserve().await),
        None => std::future::pending().await,
    }
}

/// A message after the first, which need not name the session again.
fn framed(input: Input) -> Bytes {
    host::framed(&AttachExecRequest { input: Some(input), ..Default::default() })
}

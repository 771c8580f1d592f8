//! What one attachment knows, whichever connections it has: which bytes of output were dealt with, which bytes of input
//! have come, and so what to say next and where to go on after a connection broke. No I/O: values in, values out.

use std::collections::VecDeque;

use bytes::Bytes;
use oc_proto::v1::{
    AttachExecRequest, AttachExecResponse, AttachStart, ExecAcknowledgement, ExecDetach, ExecExit,
    ExecOutput, ExecSignal, ExecStdin, ExecStdinEnd, ExecStream, TerminalSize,
    attach_exec_request::Input as Say, attach_exec_response::Event,
};

/// Input that is kept until the session has it. The contract advises against more being on the way.
pub const INPUT_BYTES: usize = 256 << 10;
/// Input per message; the contract allows 1 MiB.
const MESSAGE_BYTES: usize = 64 << 10;
/// For how long the session keeps what we have not acknowledged, and waits for us, after a connection broke.
const HOLD_MS: u32 = 15_000;
/// How often a session that writes nothing says that it is there.
const HEARTBEAT_MS: u32 = 5_000;
/// Signals that wait to be sent; whoever sends more has not been heard for long.
const SIGNALS: usize = 16;

/// Both directions of an attachment.
#[derive(Debug)]
pub struct Ledger {
    sandbox_id: String,
    session_id: String,
    attachment_id: String,
    /// Counts connections: what an older one still asks for is not answered.
    connection: u64,
    phase: Phase,
    output: Output,
    input: Input,
    signals: VecDeque<i32>,
    /// The window's size, and whether this connection was told.
    size: Option<(TerminalSize, bool)>,
    goes: bool,
    /// Events that came, but for the first of each connection.
    heard: u64,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It has said nothing.
    New,
    /// It has named the session.
    Named,
    /// It was answered: now it is known what the session has of our input.
    Attached,
    /// It has said that nothing follows.
    Over,
}

#[derive(Debug, Default)]
struct Output {
    /// The next byte that we want.
    wanted: u64,
    /// Every byte before this one is written to where it belongs.
    dealt_with: u64,
    /// What the session was told of that, on this connection.
    acknowledged: u64,
}

#[derive(Debug, Default)]
struct Input {
    /// How many bytes the session has for certain.
    accepted: u64,
    /// Those that follow.
    kept: VecDeque<u8>,
    /// How many of them were sent on this connection.
    sent: usize,
    /// Whether nothing follows them, and whether this connection was told.
    end: Option<bool>,
}

/// What a connection is to do.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// Send this.
    Send(AttachExecRequest),
    /// Ask again when something has changed.
    Wait,
    /// End its side.
    End,
}

/// What an event means.
#[derive(Debug, Default, PartialEq)]
pub struct Received {
    /// Bytes of output that will never come.
    pub missing: u64,
    /// The next bytes of output, and where they belong.
    pub output: Option<(ExecStream, Bytes)>,
    /// The session has ended.
    pub exit: Option<ExecExit>,
    /// The session has forgotten input that it had: what is to come next cannot be known.
    pub is_input_lost: bool,
}

impl Ledger {
    /// An attachment that wants the output from `offset` on.
    pub fn new(sandbox_id: String, session_id: String, attachment_id: String, offset: u64) -> Self {
        Self {
            sandbox_id,
            session_id,
            attachment_id,
            connection: 0,
            phase: Phase::Over,
            output: Output { wanted: offset, dealt_with: offset, acknowledged: offset },
            input: Input::default(),
            signals: VecDeque::new(),
            size: None,
            goes: false,
            heard: 0,
        }
    }

    /// Begins a connection and returns its number. Whatever older ones had on the way may be lost.
    pub fn connect(&mut self) -> u64 {
        self.connection += 1;
        self.phase = Phase::New;
        if let Some((_, is_told)) = &mut self.size {
            *is_told = false;
        }
        if let Some(is_told) = &mut self.input.end {
            *is_told = false;
        }
        self.connection
    }

    /// What this connection is to say next.
    pub fn next(&mut self, connection: u64) -> Next {
        if connection != self.connection {
            return Next::End;
        }
        match self.phase {
            Phase::New => {
                self.phase = Phase::Named;
                self.output.acknowledged = self.output.wanted;
                let start = AttachStart {
                    offset: self.output.wanted,
                    attachment_id: self.attachment_id.clone(),
                    acknowledges: true,
                    hold_ms: HOLD_MS,
                    heartbeat_ms: HEARTBEAT_MS,
                };
                Next::Send(AttachExecRequest {
                    sandbox_id: self.sandbox_id.clone(),
                    session_id: self.session_id.clone(),
                    input: Some(Say::Start(start)),
                })
            }
            Phase::Named if !self.goes => Next::Wait,
            Phase::Named | Phase::Attached => self.say().map_or(Next::Wait, |say| {
                Next::Send(AttachExecRequest { input: Some(say), ..AttachExecRequest::default() })
            }),
            Phase::Over => Next::End,
        }
    }

    /// Signals go first: they must not wait behind input that nobody reads.
    fn say(&mut self) -> Option<Say> {
        if self.phase == Phase::Attached {
            if let Some(signal) = self.signals.pop_front() {
                return Some(Say::Signal(ExecSignal { signal }));
            }
            if let Some((size, is_told @ false)) = &mut self.size {
                *is_told = true;
                return Some(Say::Resize(*size));
            }
            if self.output.dealt_with > self.output.acknowledged {
                self.output.acknowledged = self.output.dealt_with;
                return Some(Say::Acknowledge(ExecAcknowledgement { offset: self.output.acknowledged }));
            }
        }
        let Input { accepted, kept, sent, end } = &mut self.input;
        if self.phase == Phase::Attached && *sent < kept.len() {
            let data: Bytes = kept.iter().skip(*sent).take(MESSAGE_BYTES).copied().collect();
            let offset = *accepted + *sent as u64;
            *sent += data.len();
            return Some(Say::Stdin(ExecStdin { offset, data }));
        }
        if self.goes {
            // What was typed before has been sent; where nobody has answered yet, it cannot be.
            self.phase = Phase::Over;
            return Some(Say::Detach(ExecDetach {}));
        }
        if let Some(is_told @ false) = end {
            *is_told = true;
            return Some(Say::StdinEnd(ExecStdinEnd {}));
        }
        None
    }

    /// Takes in an event of the connection that is there.
    pub fn receive(&mut self, message: AttachExecResponse) -> Received {
        let event = match message.event {
            Some(Event::Attached(attached)) => {
                self.phase = match self.phase {
                    Phase::Over => Phase::Over,
                    _ => Phase::Attached,
                };
                let is_input_lost = attached.stdin_offset < self.input.accepted;
                self.input.accept(attached.stdin_offset);
                self.input.sent = 0;
                return Received {
                    missing: self.skip_to(attached.offset),
                    is_input_lost,
                    ..Received::default()
                };
            }
            event => event,
        };
        self.heard += 1;
        match event {
            Some(Event::Output(output)) => self.take(output),
            Some(Event::Dropped(dropped)) => {
                let missing = self.skip_to(dropped.offset.saturating_add(dropped.bytes));
                Received { missing, ..Received::default() }
            }
            Some(Event::Exit(exit)) => {
                let missing = self.skip_to(exit.offset);
                Received { missing, exit: Some(exit), ..Received::default() }
            }
            Some(Event::StdinAccepted(accepted)) => {
                self.input.accept(accepted.offset);
                Received::default()
            }
            Some(Event::Attached(_) | Event::Replayed(_) | Event::Heartbeat(_)) | None => Received::default(),
        }
    }

    /// Bytes that came before, as far as they overlap, are left out.
    fn take(&mut self, output: ExecOutput) -> Received {
        let stream = output.stream();
        let missing = self.skip_to(output.offset);
        let known = self.output.wanted.saturating_sub(output.offset);
        let mut data = output.data;
        let known = usize::try_from(known).unwrap_or(usize::MAX).min(data.len());
        let data = data.split_off(known);
        self.output.wanted += data.len() as u64;
        let output = (!data.is_empty()).then_some((stream, data));
        Received { missing, output, ..Received::default() }
    }

    /// Moves on to `offset`, if it lies ahead, and says over how many bytes.
    fn skip_to(&mut self, offset: u64) -> u64 {
        let missing = offset.saturating_sub(self.output.wanted);
        self.output.wanted += missing;
        missing
    }

    /// All output that came is written to where it belongs.
    pub fn dealt_with(&mut self) {
        self.output.dealt_with = self.output.wanted;
    }

    /// The next byte of output.
    pub fn offset(&self) -> u64 {
        self.output.wanted
    }

    /// Events that came: more than before where a connection was of any use.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// How many bytes of input may be added.
    pub fn room(&self) -> usize {
        INPUT_BYTES.saturating_sub(self.input.kept.len())
    }

    /// Adds input.
    pub fn add_input(&mut self, bytes: &[u8]) {
        self.input.kept.extend(bytes);
    }

    /// Says that no more input follows.
    pub fn end_input(&mut self) {
        self.input.end.get_or_insert(false);
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: i32) {
        if self.signals.len() < SIGNALS {
            self.signals.push_back(signal);
        }
    }

    /// Tells the size of the window.
    pub fn resize(&mut self, size: TerminalSize) {
        self.size = Some((size, false));
    }

    /// Goes for good.
    pub fn go(&mut self) {
        self.goes = true;
    }

    /// Whether we go for good.
    pub fn goes(&self) -> bool {
        self.goes
    }
}

impl Input {
    /// The session has the first `offset` bytes.
    fn accept(&mut self, offset: u64) {
        let more = usize::try_from(offset.saturating_sub(self.accepted)).unwrap_or(usize::MAX);
        let more = more.min(self.kept.len());
        self.kept.drain(..more);
        self.accepted += more as u64;
        self.sent = self.sent.saturating_sub(more);
    }
}

#[cfg(test)]
mod tests;

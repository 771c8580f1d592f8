//! `AttachAgent`: an agent's events, as one client takes them.

use std::{
    collections::VecDeque,
    pin::{Pin, pin},
    sync::Arc,
};

use futures_util::{Stream, stream};
use oc_proto::v1::{
    AgentDropped, AgentEvent, AgentExit, AttachAgentResponse, ExecStream, attach_agent_response::Event,
};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tonic::Status;

use super::events::{Found, Lines};
use crate::{
    exec::{
        attachments::{Connection, Terms, TooMany},
        ring::Piece,
        session::{Read, Session},
    },
    refusal::Refusal,
};

/// What is taken out of the ring at once, bytes.
const MAX_PIECE: usize = 256 << 10;

/// What a client is told.
pub type Events = Pin<Box<dyn Stream<Item = Result<AttachAgentResponse, Status>> + Send>>;

/// Attaches to `session`, from the event that begins at `offset`. `room` is given back when the client goes.
///
/// # Errors
///
/// `OVERLOADED` where too many are attached.
pub fn attach(session: Arc<Session>, offset: u64, room: OwnedSemaphorePermit) -> Result<Events, Status> {
    let (connection, next) = {
        let mut state = session.lock();
        // Later than all there is: nothing is waited for that may never come.
        let next = offset.min(state.ring.end());
        let connection = state.attachments.attach(Terms::default(), next).map_err(|TooMany| {
            Refusal::Overloaded.status("as many clients are attached to the agent as may be")
        })?;
        (connection, next)
    };
    session.tell_taken();
    let speaker = Speaker {
        place: Place { session, connection, _room: room },
        next,
        lines: Lines::default(),
        waiting: VecDeque::new(),
        is_over: false,
    };
    Ok(Box::pin(stream::unfold(speaker, |mut speaker| async move {
        let event = speaker.next().await?;
        Some((Ok(AttachAgentResponse { event: Some(event) }), speaker))
    })))
}

/// A client's place among those that are attached, which is given up however it ends.
struct Place {
    session: Arc<Session>,
    connection: Connection,
    _room: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.session.lock().attachments.detach(self.connection, true, Instant::now());
        self.session.tell_taken();
    }
}

/// Makes what the client is told, as it takes it.
struct Speaker {
    place: Place,
    /// The next byte to read.
    next: u64,
    lines: Lines,
    waiting: VecDeque<Event>,
    is_over: bool,
}

impl Speaker {
    /// The next event; `None` after the last.
    async fn next(&mut self) -> Option<Event> {
        let session = Arc::clone(&self.place.session);
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            let mut written = pin!(session.written());
            written.as_mut().enable();
            match session.read(self.next, MAX_PIECE) {
                Read::Piece(piece) => self.take(&piece),
                Read::End(ended, end) => {
                    self.skip_to(end);
                    self.waiting.extend(self.lines.end().map(told));
                    self.waiting.push_back(Event::Exit(AgentExit { exit_code: ended.exit_code }));
                    self.is_over = true;
                }
                // Ended by what is written, by the agent's end, or by the client's.
                Read::Nothing => written.await,
            }
        }
    }

    fn take(&mut self, piece: &Piece) {
        self.skip_to(piece.offset);
        self.next = piece.offset + piece.bytes.len() as u64;
        if piece.stream == ExecStream::Stdout {
            let waiting = &mut self.waiting;
            self.lines.push(piece.offset, &piece.bytes, |found| waiting.push_back(told(found)));
        }
        self.place.session.lock().attachments.sent(self.place.connection, self.next);
        self.place.session.tell_taken();
    }

    /// Tells what the ring has dropped, if it has.
    fn skip_to(&mut self, offset: u64) {
        if offset > self.next {
            self.waiting.push_back(told(self.lines.gap(offset - self.next)));
            self.next = offset;
        }
    }
}

fn told(found: Found) -> Event {
    match found {
        Found::Event { kind, json, next_offset } => {
            Event::Agent(AgentEvent { r#type: kind, json, next_offset })
        }
        Found::Dropped(bytes) => Event::Dropped(AgentDropped { bytes }),
    }
}

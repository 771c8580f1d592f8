//! What an agent says, as it comes. A stream that breaks is begun again after the last event that came: nothing is missing,
//! and nothing comes twice.

use std::time::Duration;

use oc_proto::v1::{AttachAgentRequest, AttachAgentResponse, attach_agent_response::Event};
use serde_json::Value;
use tokio::time::timeout;
use tonic::{Request, Status};

use super::render;
use crate::{
    arguments::agents::OneAgent,
    attachment::Outage,
    connection::Connection,
    failure::Failure,
    output::{self, Output},
};

/// For a stream to come about; a hibernated sandbox wakes meanwhile.
const OPENING: Duration = Duration::from_secs(30);
/// Errors of the wrapper that say that a prompt was not taken: no turn ends after them.
const REFUSALS: [&str; 2] = ["bad_command", "too_many_prompts"];

/// How long an agent is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Until it has done what it was told.
    TurnEnds,
    /// Until it ends.
    End,
}

/// Why it is followed no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It has done what it was told.
    Done,
    /// It could not.
    Failed,
    /// It was stopped.
    Interrupted,
    /// It has ended.
    Exited(i32),
}

/// How a stream ended.
enum Broken {
    Over(Ended),
    Off(Failure),
}

/// The events of one agent.
#[derive(Debug)]
pub struct Events<'a> {
    connection: &'a Connection,
    agent: &'a OneAgent,
    offset: u64,
    output: Output,
    /// Whether something went wrong in this turn.
    has_failed: bool,
}

impl<'a> Events<'a> {
    /// Those from `offset` on.
    pub fn new(connection: &'a Connection, agent: &'a OneAgent, offset: u64, output: Output) -> Self {
        Self { connection, agent, offset, output, has_failed: false }
    }

    /// Prints them.
    pub async fn follow(&mut self, until: Until) -> Result<Ended, Failure> {
        let mut outage = None;
        loop {
            let offset = self.offset;
            let failure = match self.stream(until).await? {
                Broken::Over(ended) => return Ok(ended),
                Broken::Off(failure) => failure,
            };
            if self.offset > offset {
                outage = None;
            }
            let outage = outage.get_or_insert_with(|| {
                output::note(format_args!("oc: {failure}; attaching again"));
                Outage::begin()
            });
            let Some(pause) = outage.pause() else {
                output::note(format_args!("oc: the agent may go on: `{}`", self.way_back()));
                return Err(failure);
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn way_back(&self) -> String {
        format!("oc agent attach {} {} --offset {}", self.agent.id, self.agent.session, self.offset)
    }

    async fn stream(&mut self, until: Until) -> Result<Broken, Failure> {
        let request = AttachAgentRequest {
            sandbox_id: self.agent.id.clone(),
            session_id: self.agent.session.clone(),
            offset: self.offset,
        };
        let mut client = self.connection.agents();
        let mut events = match timeout(OPENING, client.attach_agent(Request::new(request))).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return self.broken(status),
            Err(_) => return Ok(Broken::Off(Failure::Stalled("the agent is silent".to_owned()))),
        };
        loop {
            let event = match events.message().await {
                Ok(Some(event)) => event,
                Ok(None) => {
                    return Ok(Broken::Off(Failure::Stalled("the agent's stream ended early".to_owned())));
                }
                Err(status) => return self.broken(status),
            };
            if let Some(ended) = self.take(event, until)? {
                return Ok(Broken::Over(ended));
            }
        }
    }

    fn broken(&self, status: Status) -> Result<Broken, Failure> {
        let failure = Failure::from(status);
        if failure.has_reason("INTERRUPTED") {
            let id = &self.agent.id;
            let way_back = self.way_back();
            return Err(Failure::Interrupted(format!(
                "{id} hibernated; the agent goes on when it wakes: `{way_back}`"
            )));
        }
        if failure.is_passing() { Ok(Broken::Off(failure)) } else { Err(failure) }
    }

    /// Prints an event, and says whether it was the last that is waited for.
    fn take(&mut self, event: AttachAgentResponse, until: Until) -> Result<Option<Ended>, Failure> {
        let event = match event.event {
            Some(Event::Agent(event)) => event,
            Some(Event::Dropped(dropped)) => {
                output::note(format_args!("oc: {} bytes of events are missing here", dropped.bytes));
                return Ok(None);
            }
            Some(Event::Exit(exit)) => {
                // Nobody who waits for the end of a turn gets it.
                let code = if exit.exit_code == 0 && until == Until::TurnEnds { 1 } else { exit.exit_code };
                return Ok(Some(Ended::Exited(code)));
            }
            None => return Ok(None),
        };
        self.offset = event.next_offset;
        let json: Value = serde_json::from_str(&event.json).unwrap_or_default();
        if self.output.is_json() {
            self.output.line(&event.json)?;
        } else if let Some(text) = render::text(&event.r#type, &json) {
            self.output.line(&text)?;
        }
        let is_refused = REFUSALS.iter().any(|code| json["code"] == *code);
        let ended = match event.r#type.as_str() {
            "error" if is_refused => Some(Ended::Failed),
            "error" => {
                self.has_failed = true;
                None
            }
            "result" => {
                self.has_failed |= json["is_error"] == true;
                None
            }
            "turn_complete" if std::mem::take(&mut self.has_failed) => Some(Ended::Failed),
            "turn_complete" => Some(Ended::Done),
            "interrupted" => Some(Ended::Interrupted),
            _ => None,
        };
        Ok(ended.filter(|_| until == Until::TurnEnds))
    }
}

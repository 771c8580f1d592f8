//! Agents that say what they are expected to. Their streams break after every other event.

use std::sync::{Arc, Mutex};

use futures_util::{StreamExt as _, stream, stream::BoxStream};
use oc_proto::v1::{agent_session_service_server::AgentSessionService, attach_agent_response::Event, *};
use serde_json::{Value, json};
use tonic::{Code, Request, Response, Status};

use super::{State, exec::change_sessions, refused, sessions::Session};

pub struct Agents(pub Arc<Mutex<State>>);

fn say(session: &mut Session, event: &Value) {
    session.write(ExecStream::Stdout, format!("{event}\n").as_bytes());
}

/// What an agent says to a prompt.
fn answer(session: &mut Session, prompt: &str) {
    if prompt.is_empty() {
        return;
    }
    say(session, &json!({ "type": "system", "subtype": "init", "session_id": "c1", "model": "m1" }));
    let content = json!([
        { "type": "text", "text": format!("about {prompt}") },
        { "type": "tool_use", "name": "Bash", "input": { "command": "ls" } },
    ]);
    say(session, &json!({ "type": "assistant", "message": { "content": content } }));
    match prompt {
        "hang" => return,
        "die" => return session.end(3),
        "fail" => say(session, &json!({ "type": "error", "code": "api_error", "message": "no key" })),
        _ => say(
            session,
            &json!({ "type": "result", "subtype": "success", "is_error": false, "num_turns": 1 }),
        ),
    }
    say(session, &json!({ "type": "turn_complete", "claude_session_id": "c1" }));
}

impl Agents {
    fn with<T>(&self, id: &str, change: impl FnOnce(&mut Session) -> T) -> Result<T, Status> {
        change_sessions(&self.0, |sessions| Ok(change(sessions.find(id)?)))
    }
}

fn describe(session: &Session) -> AgentSession {
    AgentSession {
        session_id: session.id.clone(),
        sandbox_id: "sb-1".into(),
        running: session.exit.is_none(),
        started_at: None,
        exit_code: session.exit.map(|(code, _)| code),
    }
}

#[tonic::async_trait]
impl AgentSessionService for Agents {
    async fn start_agent(
        &self,
        request: Request<StartAgentRequest>,
    ) -> Result<Response<StartAgentResponse>, Status> {
        let request = request.into_inner();
        if request.sandbox_id == "sb-bare" {
            return Err(refused(Code::FailedPrecondition, "AGENT_NOT_INSTALLED", "there is no agent"));
        }
        let prompt = request.prompt.clone();
        self.0.lock().unwrap().agents_started.push(request);
        let session = change_sessions(&self.0, |sessions| {
            let id = sessions.add("agent", &[], None).session_id;
            let session = sessions.find(&id)?;
            session.kind = ExecKind::Agent;
            say(session, &json!({ "type": "ready" }));
            answer(session, &prompt);
            Ok::<_, Status>(describe(session))
        })?;
        Ok(Response::new(StartAgentResponse { session: Some(session) }))
    }

    async fn list_agents(
        &self,
        _: Request<ListAgentsRequest>,
    ) -> Result<Response<ListAgentsResponse>, Status> {
        let sessions = change_sessions(&self.0, |sessions| sessions.all.iter().map(describe).collect());
        Ok(Response::new(ListAgentsResponse { sessions }))
    }

    async fn prompt_agent(
        &self,
        request: Request<PromptAgentRequest>,
    ) -> Result<Response<PromptAgentResponse>, Status> {
        let request = request.into_inner();
        self.with(&request.session_id, |session| answer(session, &request.text))?;
        self.0.lock().unwrap().told.push(request.text);
        Ok(Response::new(PromptAgentResponse {}))
    }

    async fn interrupt_agent(
        &self,
        request: Request<InterruptAgentRequest>,
    ) -> Result<Response<InterruptAgentResponse>, Status> {
        let request = request.into_inner();
        self.with(&request.session_id, |session| say(session, &json!({ "type": "interrupted" })))?;
        self.0.lock().unwrap().told.push("interrupt".into());
        Ok(Response::new(InterruptAgentResponse {}))
    }

    async fn configure_agent(
        &self,
        _: Request<ConfigureAgentRequest>,
    ) -> Result<Response<ConfigureAgentResponse>, Status> {
        Err(Status::unimplemented("configure_agent"))
    }

    async fn kill_agent(
        &self,
        request: Request<KillAgentRequest>,
    ) -> Result<Response<KillAgentResponse>, Status> {
        let request = request.into_inner();
        self.with(&request.session_id, |session| session.signal(request.signal.unwrap_or(9)))?;
        Ok(Response::new(KillAgentResponse {}))
    }

    type AttachAgentStream = BoxStream<'static, Result<AttachAgentResponse, Status>>;

    async fn attach_agent(
        &self,
        request: Request<AttachAgentRequest>,
    ) -> Result<Response<Self::AttachAgentStream>, Status> {
        let request = request.into_inner();
        self.with(&request.session_id, |_| ())?;
        let changes = {
            let mut state = self.0.lock().unwrap();
            state.agents_attached.push(request.offset);
            state.sessions.changed.subscribe()
        };
        let start =
            (Arc::clone(&self.0), request.session_id, usize::try_from(request.offset).unwrap(), changes);
        let events = stream::unfold(start, async |(state, id, offset, mut changes)| {
            loop {
                changes.mark_unchanged();
                let next = {
                    let mut state = state.lock().unwrap();
                    let session = state.sessions.find(&id).unwrap();
                    let line = session.log[offset..].split_inclusive(|&byte| byte == b'\n').next();
                    match (line, session.exit) {
                        (Some(line), _) => Some((Some(line.to_vec()), 0)),
                        (None, Some((code, _))) => Some((None, code)),
                        (None, None) => None,
                    }
                };
                let event = match next {
                    None => {
                        changes.changed().await.unwrap();
                        continue;
                    }
                    Some((None, exit_code)) => (Event::Exit(AgentExit { exit_code }), offset),
                    Some((Some(line), _)) => {
                        let next = offset + line.len();
                        let json = String::from_utf8(line).unwrap().trim_end().to_owned();
                        let kind =
                            serde_json::from_str::<Value>(&json).unwrap()["type"].as_str().unwrap().into();
                        (Event::Agent(AgentEvent { r#type: kind, json, next_offset: next as u64 }), next)
                    }
                };
                let message = Ok(AttachAgentResponse { event: Some(event.0) });
                return Some((message, (state, id, event.1, changes)));
            }
        });
        let breaks = stream::iter([Err(refused(Code::Unavailable, "HOST_UNAVAILABLE", "the host is gone"))]);
        Ok(Response::new(events.take(2).chain(breaks).boxed()))
    }
}

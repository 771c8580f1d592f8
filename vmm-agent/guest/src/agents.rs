//! `oc.v1.AgentSessionService`: agents, as sessions of a wrapper that speaks JSON lines.
//!
//! ```text
//!   commands ──▶ session's input ──▶ wrapper (template, /usr/local/bin) ──▶ the SDK
//!   events   ◀── session's ring  ◀──────┘
//! ```
//!
//! The wrapper is a process like any other of the sandbox's user, who may replace it: what it writes is trusted no more
//! than what a command does.

mod attach;
mod commands;
mod events;

use std::sync::Arc;

use nix::sys::signal::Signal;
use oc_proto::v1::{agent_session_service_server::AgentSessionService, *};
use tokio::{sync::Semaphore, task::spawn_blocking};
use tonic::{Code, Request, Response, Status};

use crate::{
    exec::{
        drive::Limits,
        launch::{Invocation, Wanted, What},
        seconds,
        session::Session,
        sessions::{Order, Sessions},
    },
    refusal::Refusal,
};

/// The wrapper (`vmm-agent/templates/base/agent`).
const WRAPPER: &str = "/usr/local/bin/claude-agent-wrapper";
/// What is kept of events, bytes: the longest that is passed on, and as much again.
const RING: usize = 2 * events::MAX_LINE;
/// Attached at once, in all. Each may hold the longest line.
const MAX_ATTACHED: usize = 16;
/// The signal of `KillAgent` where the request does not say: `SIGKILL`.
const KILL: i32 = 9;

/// Runs agents.
#[derive(Clone, Debug)]
pub struct Agents {
    sessions: Sessions,
    room: Arc<Semaphore>,
}

impl Agents {
    /// Runs agents as sessions among these.
    pub fn new(sessions: Sessions) -> Self {
        Self { sessions, room: Arc::new(Semaphore::new(MAX_ATTACHED)) }
    }

    fn find(&self, id: &str) -> Result<Arc<Session>, Status> {
        let session = self.sessions.find(id)?;
        match session.facts().kind {
            ExecKind::Agent => Ok(session),
            _ => Err(Refusal::SessionNotFound.status(format!("session {id} is no agent"))),
        }
    }

    fn describe(&self, session: &Session) -> AgentSession {
        let ExecSession { session_id, sandbox_id, running, started_at, exit_code, .. } =
            session.describe(self.sessions.identity().sandbox_id());
        AgentSession { session_id, sandbox_id, running, started_at, exit_code }
    }
}

/// Signals an agent and all that it has started: its commands are in sessions of their own, and would run on.
fn kill(session: &Session, number: i32) -> Result<(), Status> {
    let family = session.group().family();
    let is_running = session.lock().ended().is_none();
    session.signal(number)?;
    if let (true, Ok(signal)) = (is_running, Signal::try_from(number)) {
        family.signal(signal);
    }
    Ok(())
}

#[tonic::async_trait]
impl AgentSessionService for Agents {
    async fn start_agent(
        &self,
        request: Request<StartAgentRequest>,
    ) -> Result<Response<StartAgentResponse>, Status> {
        let mut request = request.into_inner();
        let input = commands::start(&mut request)?;
        let order = Order {
            kind: ExecKind::Agent,
            invocation: Invocation {
                program: What::Program(WRAPPER.into(), Vec::new()),
                envs: request.envs,
                cwd: request.cwd,
                user: String::new(),
            },
            wanted: Wanted::Pipes { stdin: true },
            limits: Limits {
                time: None,
                alone: seconds("maxRunAfterDisconnect", request.max_run_after_disconnect)?,
                // A wrapper that is killed cannot end the SDK's process, which would go on with the turn.
                leaves_nothing: true,
            },
            ring_bytes: RING,
        };
        let session = self.sessions.start(order).await.map_err(|status| match status.code() {
            Code::NotFound => {
                Refusal::AgentNotInstalled.status(format!("the sandbox's template has no agent: {WRAPPER}"))
            }
            _ => status,
        })?;
        // It has just been made: there is room. One that has ended already tells so itself.
        session.stdin().put(input);
        Ok(Response::new(StartAgentResponse { session: Some(self.describe(&session)) }))
    }

    async fn list_agents(
        &self,
        _: Request<ListAgentsRequest>,
    ) -> Result<Response<ListAgentsResponse>, Status> {
        let agents = self.sessions.list(Some(ExecKind::Agent));
        let sessions = agents.iter().map(|session| self.describe(session)).collect();
        Ok(Response::new(ListAgentsResponse { sessions }))
    }

    async fn prompt_agent(
        &self,
        request: Request<PromptAgentRequest>,
    ) -> Result<Response<PromptAgentResponse>, Status> {
        let PromptAgentRequest { session_id, text, .. } = request.into_inner();
        self.find(&session_id)?.write(commands::prompt(&text)?).await?;
        Ok(Response::new(PromptAgentResponse {}))
    }

    async fn interrupt_agent(
        &self,
        request: Request<InterruptAgentRequest>,
    ) -> Result<Response<InterruptAgentResponse>, Status> {
        self.find(&request.into_inner().session_id)?.write(commands::interrupt()).await?;
        Ok(Response::new(InterruptAgentResponse {}))
    }

    async fn configure_agent(
        &self,
        request: Request<ConfigureAgentRequest>,
    ) -> Result<Response<ConfigureAgentResponse>, Status> {
        let ConfigureAgentRequest { session_id, options, .. } = request.into_inner();
        let options = options.unwrap_or_default();
        self.find(&session_id)?.write(commands::configure(options, String::new())?).await?;
        Ok(Response::new(ConfigureAgentResponse {}))
    }

    async fn kill_agent(
        &self,
        request: Request<KillAgentRequest>,
    ) -> Result<Response<KillAgentResponse>, Status> {
        let KillAgentRequest { session_id, signal, .. } = request.into_inner();
        let session = self.find(&session_id)?;
        let signal = signal.unwrap_or(KILL);
        spawn_blocking(move || kill(&session, signal))
            .await
            .map_err(|error| Refusal::Internal.status(error.to_string()))??;
        Ok(Response::new(KillAgentResponse {}))
    }

    type AttachAgentStream = attach::Events;

    async fn attach_agent(
        &self,
        request: Request<AttachAgentRequest>,
    ) -> Result<Response<Self::AttachAgentStream>, Status> {
        let AttachAgentRequest { session_id, offset, .. } = request.into_inner();
        let session = self.find(&session_id)?;
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            let text = format!("{MAX_ATTACHED} clients are attached to agents already");
            return Err(Refusal::Overloaded.status(text));
        };
        Ok(Response::new(attach::attach(session, offset, room)?))
    }
}

//! Agents of the fake host.

use oc_proto::v1::{agent_session_service_server::AgentSessionService, *};
use tonic::{Request, Response, Status};

use crate::agent::FakeAgent;

fn session() -> AgentSession {
    AgentSession { session_id: "a-1".into(), running: true, ..Default::default() }
}

#[tonic::async_trait]
impl AgentSessionService for FakeAgent {
    async fn start_agent(
        &self,
        request: Request<StartAgentRequest>,
    ) -> Result<Response<StartAgentResponse>, Status> {
        self.note("StartAgent", &request);
        self.0.mcp_servers.lock().push(request.into_inner().mcp_servers);
        Ok(Response::new(StartAgentResponse { session: Some(session()) }))
    }

    async fn list_agents(
        &self,
        request: Request<ListAgentsRequest>,
    ) -> Result<Response<ListAgentsResponse>, Status> {
        self.note("ListAgents", &request);
        Ok(Response::new(ListAgentsResponse { sessions: vec![session()] }))
    }

    async fn prompt_agent(
        &self,
        request: Request<PromptAgentRequest>,
    ) -> Result<Response<PromptAgentResponse>, Status> {
        self.note("PromptAgent", &request);
        Ok(Response::new(PromptAgentResponse {}))
    }

    async fn interrupt_agent(
        &self,
        request: Request<InterruptAgentRequest>,
    ) -> Result<Response<InterruptAgentResponse>, Status> {
        self.note("InterruptAgent", &request);
        Ok(Response::new(InterruptAgentResponse {}))
    }

    async fn configure_agent(
        &self,
        request: Request<ConfigureAgentRequest>,
    ) -> Result<Response<ConfigureAgentResponse>, Status> {
        self.note("ConfigureAgent", &request);
        Ok(Response::new(ConfigureAgentResponse {}))
    }

    async fn kill_agent(
        &self,
        request: Request<KillAgentRequest>,
    ) -> Result<Response<KillAgentResponse>, Status> {
        self.note("KillAgent", &request);
        Ok(Response::new(KillAgentResponse {}))
    }

    type AttachAgentStream = tokio_stream::Empty<Result<AttachAgentResponse, Status>>;

    async fn attach_agent(
        &self,
        request: Request<AttachAgentRequest>,
    ) -> Result<Response<Self::AttachAgentStream>, Status> {
        self.note("AttachAgent", &request);
        Ok(Response::new(tokio_stream::empty()))
    }
}

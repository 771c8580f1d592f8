//! Sandboxes, keys and hosts over maps.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use oc_proto::v1::{
    Checkpoint, ClearNodeRequest, ClearNodeResponse, CreateCheckpointRequest, CreateKeyRequest,
    CreateKeyResponse, CreateSandboxRequest, CreateSandboxResponse, DeleteKeyRequest, DeleteKeyResponse,
    DeleteSandboxRequest, DeleteSandboxResponse, ForkCheckpointRequest, ForkSandboxRequest,
    GetSandboxRequest, GetSandboxResponse, HibernateSandboxRequest, HibernateSandboxResponse,
    HibernationTier, Key, ListKeysRequest, ListKeysResponse, ListNodesRequest, ListNodesResponse,
    ListSandboxesRequest, ListSandboxesResponse, Node, Preview, RefreshTokenRequest, RefreshTokenResponse,
    Sandbox, SandboxState, SetTimeoutRequest, SetTimeoutResponse, StartAgentRequest, WakeSandboxRequest,
    WakeSandboxResponse, WatchDirectoryRequest, WatchSandboxRequest, key_service_server::KeyService,
    node_service_server::NodeService, sandbox_service_server::SandboxService,
};
use tonic::{Code, Request, Response, Status};

use super::{exec::Sessions, files::Entry, refused, watch};

/// Everything there is.
#[derive(Default)]
pub struct State {
    pub sandboxes: BTreeMap<String, Sandbox>,
    pub created: Vec<CreateSandboxRequest>,
    pub checkpoints: Vec<Checkpoint>,
    /// Requests for checkpoints, for forks of checkpoints and for forks of sandboxes.
    pub taken: Vec<CreateCheckpointRequest>,
    pub forked_checkpoints: Vec<ForkCheckpointRequest>,
    pub forked_sandboxes: Vec<ForkSandboxRequest>,
    pub keys: Vec<Key>,
    pub files: BTreeMap<String, Entry>,
    /// Where streams of changes were begun.
    pub watched: Vec<WatchSandboxRequest>,
    /// How often hosts were listed: the pool fills meanwhile.
    pub looks: i32,
    /// Uploads that began.
    pub uploads: usize,
    /// Uploads that broke.
    pub broken_uploads: usize,
    pub sessions: Sessions,
    /// What agents were told, and how they were started.
    pub told: Vec<String>,
    pub agents_started: Vec<StartAgentRequest>,
    /// Where streams of agents' events were begun.
    pub agents_attached: Vec<u64>,
    /// Connections to ports, and what came from the clients that had something to say.
    pub forwarded: Vec<(u32, Vec<u8>)>,
    pub previews: Vec<Preview>,
    /// By sandbox, what its ports ask for.
    pub preview_tokens: BTreeMap<String, String>,
    /// Directories that were watched.
    pub directories_watched: Vec<WatchDirectoryRequest>,
}

pub struct Sandboxes(pub Arc<Mutex<State>>);

impl Sandboxes {
    fn find(&self, id: &str) -> Result<Sandbox, Status> {
        let found = self.0.lock().unwrap().sandboxes.get(id).cloned();
        found
            .ok_or_else(|| refused(Code::NotFound, "SANDBOX_NOT_FOUND", &format!("there is no sandbox {id}")))
    }
}

#[tonic::async_trait]
impl SandboxService for Sandboxes {
    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Result<Response<CreateSandboxResponse>, Status> {
        let request = request.into_inner();
        if request.template_id == "none" {
            return Err(refused(Code::NotFound, "TEMPLATE_NOT_FOUND", "there is no template none"));
        }
        if request.template_id == "full" {
            return Err(refused(Code::Unavailable, "NO_CAPACITY", "no host has room"));
        }
        let mut state = self.0.lock().unwrap();
        let sandbox = Sandbox {
            sandbox_id: format!("sb-{:020}", state.created.len()),
            template_id: "base".into(),
            state: SandboxState::Running.into(),
            cpu_count: 1,
            memory_mb: 1024,
            worker_id: "local".into(),
            timeout: request.timeout.unwrap_or(300),
            metadata: request.metadata.clone(),
            ..Sandbox::default()
        };
        state.created.push(request);
        state.sandboxes.insert(sandbox.sandbox_id.clone(), sandbox.clone());
        Ok(Response::new(CreateSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn get_sandbox(
        &self,
        request: Request<GetSandboxRequest>,
    ) -> Result<Response<GetSandboxResponse>, Status> {
        let sandbox = self.find(&request.into_inner().sandbox_id)?;
        Ok(Response::new(GetSandboxResponse { sandbox: Some(sandbox) }))
    }

    /// Pages of two, whatever was asked for.
    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Result<Response<ListSandboxesResponse>, Status> {
        let after = request.into_inner().page_token;
        let state = self.0.lock().unwrap();
        let mut rest = state.sandboxes.values().filter(|sandbox| sandbox.sandbox_id > after);
        let sandboxes: Vec<_> = rest.by_ref().take(2).cloned().collect();
        let next_page_token = rest
            .next()
            .and_then(|_| sandboxes.last())
            .map(|last| last.sandbox_id.clone())
            .unwrap_or_default();
        Ok(Response::new(ListSandboxesResponse { sandboxes, next_page_token }))
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Result<Response<DeleteSandboxResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        self.find(&id)?;
        self.0.lock().unwrap().sandboxes.remove(&id);
        note_deletion(&id);
        Ok(Response::new(DeleteSandboxResponse {}))
    }

    async fn hibernate_sandbox(
        &self,
        request: Request<HibernateSandboxRequest>,
    ) -> Result<Response<HibernateSandboxResponse>, Status> {
        let id = &request.get_ref().sandbox_id;
        let state = SandboxState::Hibernated.into();
        let sandbox = Sandbox { state, ..self.find(id)? };
        self.0.lock().unwrap().sandboxes.insert(id.clone(), sandbox);
        let (sandbox_id, size_bytes) = (id.clone(), 5 << 20);
        let tier = HibernationTier::Stored.into();
        Ok(Response::new(HibernateSandboxResponse {
            sandbox_id,
            state,
            size_bytes,
            tier,
            ..Default::default()
        }))
    }

    async fn wake_sandbox(
        &self,
        request: Request<WakeSandboxRequest>,
    ) -> Result<Response<WakeSandboxResponse>, Status> {
        let id = &request.get_ref().sandbox_id;
        let sandbox =
            Sandbox { state: SandboxState::Running.into(), start_path: "memory".into(), ..self.find(id)? };
        self.0.lock().unwrap().sandboxes.insert(id.clone(), sandbox.clone());
        Ok(Response::new(WakeSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn set_timeout(
        &self,
        request: Request<SetTimeoutRequest>,
    ) -> Result<Response<SetTimeoutResponse>, Status> {
        let request = request.into_inner();
        let mut sandbox = self.find(&request.sandbox_id)?;
        sandbox.timeout = request.timeout;
        self.0.lock().unwrap().sandboxes.insert(request.sandbox_id, sandbox);
        Ok(Response::new(SetTimeoutResponse {}))
    }

    async fn refresh_token(
        &self,
        _: Request<RefreshTokenRequest>,
    ) -> Result<Response<RefreshTokenResponse>, Status> {
        Ok(Response::new(RefreshTokenResponse::default()))
    }

    type WatchSandboxStream = watch::Events;

    async fn watch_sandbox(
        &self,
        request: Request<WatchSandboxRequest>,
    ) -> Result<Response<watch::Events>, Status> {
        watch::open(&self.0, request.into_inner()).map(Response::new)
    }
}

#[tonic::async_trait]
impl KeyService for Sandboxes {
    async fn create_key(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        let CreateKeyRequest { tenant, admin, description } = request.into_inner();
        let key = Key { key_id: "k1".into(), tenant, admin, description, created_at: None };
        self.0.lock().unwrap().keys.push(key.clone());
        Ok(Response::new(CreateKeyResponse { api_key: super::KEY.into(), key: Some(key) }))
    }

    async fn list_keys(&self, _: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        Ok(Response::new(ListKeysResponse { keys: self.0.lock().unwrap().keys.clone() }))
    }

    async fn delete_key(
        &self,
        request: Request<DeleteKeyRequest>,
    ) -> Result<Response<DeleteKeyResponse>, Status> {
        let id = request.into_inner().key_id;
        let mut state = self.0.lock().unwrap();
        let before = state.keys.len();
        state.keys.retain(|key| key.key_id != id);
        if state.keys.len() == before {
            return Err(refused(Code::NotFound, "KEY_NOT_FOUND", "there is no such key"));
        }
        Ok(Response::new(DeleteKeyResponse {}))
    }
}

#[tonic::async_trait]
impl NodeService for Sandboxes {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        state.looks += 1;
        let node = Node {
            node_id: "local".into(),
            accelerator: "tcg".into(),
            vmm: "fake 1.0".into(),
            max_sandboxes: 10,
            pool_ready: state.looks - 1,
            ..Node::default()
        };
        Ok(Response::new(ListNodesResponse { nodes: vec![node] }))
    }

    async fn clear_node(
        &self,
        request: Request<ClearNodeRequest>,
    ) -> Result<Response<ClearNodeResponse>, Status> {
        let node = request.into_inner().node_id;
        let mut state = self.0.lock().unwrap();
        let here = state.sandboxes.values().filter(|sandbox| sandbox.worker_id == node);
        let ids: Vec<String> = here.map(|sandbox| sandbox.sandbox_id.clone()).collect();
        for id in &ids {
            state.sandboxes.remove(id);
            note_deletion(id);
        }
        Ok(Response::new(ClearNodeResponse { sandboxes: i32::try_from(ids.len()).unwrap() }))
    }
}

/// For tests of whoever has another process's fake to ask.
fn note_deletion(id: &str) {
    if let Ok(path) = std::env::var("OC_FAKE_DELETED") {
        use std::io::Write as _;
        writeln!(std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap(), "{id}").unwrap();
    }
}

//! A scheduler that keeps no records, but for previews: it answers what it was asked with.

use std::sync::{Arc, OnceLock};

use futures_util::{StreamExt as _, stream, stream::BoxStream};
use oc_mesh::{
    caller::Caller,
    error::{Reason, status},
    keys,
    store::SharedStore,
};
use oc_proto::{
    mesh::{PreviewDomain, PreviewEntry, SandboxRecord},
    v1::{
        key_service_server::KeyService, node_service_server::NodeService,
        preview_service_server::PreviewService, sandbox_service_server::SandboxService, *,
    },
};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

use crate::mesh::{UNWAKABLE, put, sandbox_record};

#[derive(Debug, Clone, Default)]
pub struct FakeScheduler(
    pub Arc<Mutex<Vec<(&'static str, Caller)>>>,
    pub crate::checkpoints::Asked,
    pub Arc<OnceLock<SharedStore>>,
);

impl FakeScheduler {
    /// Writes the record of a sandbox of `ours`, with what changes it.
    async fn write(&self, sandbox_id: &str, change: impl FnOnce(&mut SandboxRecord)) {
        let mut record = sandbox_record(sandbox_id, "ours", SandboxState::Running, "host-a");
        change(&mut record);
        put(self.2.get().unwrap(), &keys::sandbox(sandbox_id), &record).await;
    }

    pub fn note<T>(&self, rpc: &'static str, request: &Request<T>) -> Caller {
        let caller = Caller::from_headers(&request.metadata().clone().into_headers()).unwrap();
        self.0.lock().push((rpc, caller.clone()));
        caller
    }
}

pub fn sandbox(id: &str, caller: &Caller) -> Option<Sandbox> {
    Some(Sandbox {
        sandbox_id: id.to_owned(),
        state: SandboxState::Running.into(),
        connect_url: caller.public_url.clone(),
        token: "a.b.c".into(),
        ..Default::default()
    })
}

#[tonic::async_trait]
impl SandboxService for FakeScheduler {
    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Result<Response<CreateSandboxResponse>, Status> {
        let caller = self.note("CreateSandbox", &request);
        match request.get_ref().template_id.as_str() {
            "none" => return Err(status(Reason::TemplateNotFound, "there is no template `none`")),
            "full" => return Err(status(Reason::NoCapacity, "no host has room")),
            "hang" => std::future::pending().await,
            _ => {}
        }
        let mut sandbox = sandbox("sb-new", &caller).unwrap();
        sandbox.metadata = request.into_inner().metadata;
        Ok(Response::new(CreateSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn get_sandbox(
        &self,
        request: Request<GetSandboxRequest>,
    ) -> Result<Response<GetSandboxResponse>, Status> {
        let caller = self.note("GetSandbox", &request);
        Ok(Response::new(GetSandboxResponse { sandbox: sandbox(&request.get_ref().sandbox_id, &caller) }))
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Result<Response<ListSandboxesResponse>, Status> {
        self.note("ListSandboxes", &request);
        Ok(Response::new(ListSandboxesResponse::default()))
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Result<Response<DeleteSandboxResponse>, Status> {
        self.note("DeleteSandbox", &request);
        Ok(Response::new(DeleteSandboxResponse {}))
    }

    async fn hibernate_sandbox(
        &self,
        request: Request<HibernateSandboxRequest>,
    ) -> Result<Response<HibernateSandboxResponse>, Status> {
        self.note("HibernateSandbox", &request);
        let sandbox_id = request.into_inner().sandbox_id;
        Ok(Response::new(HibernateSandboxResponse { sandbox_id, size_bytes: 7, ..Default::default() }))
    }

    async fn wake_sandbox(
        &self,
        request: Request<WakeSandboxRequest>,
    ) -> Result<Response<WakeSandboxResponse>, Status> {
        let caller = self.note("WakeSandbox", &request);
        if request.get_ref().sandbox_id == UNWAKABLE {
            return Err(status(Reason::NoCapacity, "no host has room"));
        }
        Ok(Response::new(WakeSandboxResponse { sandbox: sandbox(&request.get_ref().sandbox_id, &caller) }))
    }

    async fn set_timeout(
        &self,
        request: Request<SetTimeoutRequest>,
    ) -> Result<Response<SetTimeoutResponse>, Status> {
        self.note("SetTimeout", &request);
        Ok(Response::new(SetTimeoutResponse {}))
    }

    async fn refresh_token(
        &self,
        request: Request<RefreshTokenRequest>,
    ) -> Result<Response<RefreshTokenResponse>, Status> {
        self.note("RefreshToken", &request);
        Ok(Response::new(RefreshTokenResponse {
            token: "d.e.f".into(),
            expires_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        }))
    }

    type WatchSandboxStream = BoxStream<'static, Result<WatchSandboxResponse, Status>>;

    /// Says how far it is once, and then nothing for ever; one that begins anew is over at once.
    async fn watch_sandbox(
        &self,
        request: Request<WatchSandboxRequest>,
    ) -> Result<Response<Self::WatchSandboxStream>, Status> {
        self.note("WatchSandbox", &request);
        let revision = request.get_ref().after_revision;
        let begun = stream::iter([Ok(WatchSandboxResponse { event: None, revision })]);
        let rest = if revision == 0 { stream::empty().boxed() } else { stream::pending().boxed() };
        Ok(Response::new(begun.chain(rest).boxed()))
    }
}

#[tonic::async_trait]
impl KeyService for FakeScheduler {
    async fn create_key(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        self.note("CreateKey", &request);
        Ok(Response::new(CreateKeyResponse { api_key: "osb_x".into(), key: Some(Key::default()) }))
    }

    async fn list_keys(
        &self,
        request: Request<ListKeysRequest>,
    ) -> Result<Response<ListKeysResponse>, Status> {
        self.note("ListKeys", &request);
        Ok(Response::new(ListKeysResponse::default()))
    }

    async fn delete_key(
        &self,
        request: Request<DeleteKeyRequest>,
    ) -> Result<Response<DeleteKeyResponse>, Status> {
        self.note("DeleteKey", &request);
        Ok(Response::new(DeleteKeyResponse {}))
    }
}

#[tonic::async_trait]
impl NodeService for FakeScheduler {
    async fn clear_node(
        &self,
        request: Request<ClearNodeRequest>,
    ) -> Result<Response<ClearNodeResponse>, Status> {
        self.note("ClearNode", &request);
        Ok(Response::new(ClearNodeResponse::default()))
    }

    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        self.note("ListNodes", &request);
        Ok(Response::new(ListNodesResponse {
            nodes: vec![Node { node_id: "host-a".into(), ..Default::default() }],
        }))
    }
}

#[tonic::async_trait]
impl PreviewService for FakeScheduler {
    async fn create_preview(
        &self,
        request: Request<CreatePreviewRequest>,
    ) -> Result<Response<CreatePreviewResponse>, Status> {
        let caller = self.note("CreatePreview", &request);
        let CreatePreviewRequest { sandbox_id, port, domain, .. } = request.into_inner();
        if !domain.is_empty() {
            let claim = PreviewDomain { sandbox_id: sandbox_id.clone(), claimed_at: None };
            put(self.2.get().unwrap(), &keys::preview_domain(&domain), &claim).await;
            let entry = PreviewEntry { port, domain, ..Default::default() };
            self.write(&sandbox_id, |record| record.previews.push(entry)).await;
        }
        let hostname = format!("{sandbox_id}-p{port}.{}", caller.preview_domain);
        let preview = Preview { sandbox_id, port, hostname, ..Default::default() };
        Ok(Response::new(CreatePreviewResponse { preview: Some(preview), existed: port == 80 }))
    }

    async fn list_previews(
        &self,
        request: Request<ListPreviewsRequest>,
    ) -> Result<Response<ListPreviewsResponse>, Status> {
        self.note("ListPreviews", &request);
        Ok(Response::new(ListPreviewsResponse::default()))
    }

    async fn delete_preview(
        &self,
        request: Request<DeletePreviewRequest>,
    ) -> Result<Response<DeletePreviewResponse>, Status> {
        self.note("DeletePreview", &request);
        self.write(&request.get_ref().sandbox_id, |record| record.previews.clear()).await;
        Ok(Response::new(DeletePreviewResponse {}))
    }

    async fn rotate_preview_auth(
        &self,
        request: Request<RotatePreviewAuthRequest>,
    ) -> Result<Response<RotatePreviewAuthResponse>, Status> {
        // Whoever asks says which token is to be the new one.
        let caller = self.note("RotatePreviewAuth", &request);
        let hash = hex::encode(Sha256::digest(&caller.request_id));
        self.write(&request.get_ref().sandbox_id, |record| record.preview_token_hash = hash).await;
        Ok(Response::new(RotatePreviewAuthResponse::default()))
    }
}

//! Previews over a list, and one token for each sandbox.

use std::sync::{Arc, Mutex};

use oc_proto::v1::{preview_service_server::PreviewService, *};
use prost_types::Timestamp;
use tonic::{Code, Request, Response, Status};

use super::{State, refused};

/// What is made where none is given.
pub const MADE_TOKEN: &str = "made-0123456789abcdef";

pub struct Previews(pub Arc<Mutex<State>>);

impl State {
    fn knows(&self, sandbox: &str) -> Result<(), Status> {
        match self.sandboxes.contains_key(sandbox) {
            true => Ok(()),
            false => Err(refused(Code::NotFound, "SANDBOX_NOT_FOUND", "there is no such sandbox")),
        }
    }

    /// As they are shown, with what is asked for on all ports of their sandbox.
    fn shown(&self, preview: &Preview) -> Preview {
        let scheme = if self.preview_tokens.contains_key(&preview.sandbox_id) { "bearer" } else { "" };
        Preview { auth_config: Some(PreviewAuthConfig { scheme: scheme.into() }), ..preview.clone() }
    }
}

#[tonic::async_trait]
impl PreviewService for Previews {
    async fn create_preview(
        &self,
        request: Request<CreatePreviewRequest>,
    ) -> Result<Response<CreatePreviewResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        state.knows(&request.sandbox_id)?;
        let is_taken = |preview: &Preview| {
            !request.domain.is_empty()
                && preview.custom_hostname == request.domain
                && (&preview.sandbox_id, preview.port) != (&request.sandbox_id, request.port)
        };
        if state.previews.iter().any(is_taken) {
            return Err(refused(Code::AlreadyExists, "DOMAIN_TAKEN", "the name is another preview's"));
        }
        let token = request.auth_config.map(|auth| match auth.token.as_str() {
            "" | "auto" => MADE_TOKEN.to_owned(),
            own => own.to_owned(),
        });
        if let Some(token) = &token {
            state.preview_tokens.insert(request.sandbox_id.clone(), token.clone());
        }
        let same = |preview: &&mut Preview| {
            (&preview.sandbox_id, preview.port) == (&request.sandbox_id, request.port)
        };
        let existing = state.previews.iter_mut().find(same);
        let existed = existing.is_some();
        let preview = match existing {
            Some(preview) => preview.clone(),
            None => {
                let hostname = format!("{}-p{}.preview.localhost", request.sandbox_id, request.port);
                let preview = Preview {
                    preview_id: format!("pv-{}", request.port),
                    sandbox_id: request.sandbox_id.clone(),
                    port: request.port,
                    url: format!("http://{hostname}:8080"),
                    hostname,
                    custom_hostname: request.domain.clone(),
                    ssl_status: "none".into(),
                    created_at: Some(Timestamp { seconds: 1_700_000_000, nanos: 0 }),
                    ..Preview::default()
                };
                state.previews.push(preview.clone());
                preview
            }
        };
        let preview = Preview { preview_auth_token: token.unwrap_or_default(), ..state.shown(&preview) };
        Ok(Response::new(CreatePreviewResponse { preview: Some(preview), existed }))
    }

    async fn list_previews(
        &self,
        request: Request<ListPreviewsRequest>,
    ) -> Result<Response<ListPreviewsResponse>, Status> {
        let of = request.into_inner().sandbox_id;
        let state = self.0.lock().unwrap();
        state.knows(&of)?;
        let listed = state.previews.iter().filter(|preview| preview.sandbox_id == of);
        Ok(Response::new(ListPreviewsResponse { previews: listed.map(|one| state.shown(one)).collect() }))
    }

    async fn delete_preview(
        &self,
        request: Request<DeletePreviewRequest>,
    ) -> Result<Response<DeletePreviewResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        state.knows(&request.sandbox_id)?;
        let before = state.previews.len();
        let same =
            |preview: &Preview| (&preview.sandbox_id, preview.port) == (&request.sandbox_id, request.port);
        state.previews.retain(|preview| !same(preview));
        if state.previews.len() == before {
            return Err(refused(Code::NotFound, "PREVIEW_NOT_FOUND", "there is no such preview"));
        }
        Ok(Response::new(DeletePreviewResponse {}))
    }

    async fn rotate_preview_auth(
        &self,
        request: Request<RotatePreviewAuthRequest>,
    ) -> Result<Response<RotatePreviewAuthResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        state.knows(&request.sandbox_id)?;
        if request.remove {
            state.preview_tokens.remove(&request.sandbox_id);
            return Ok(Response::new(RotatePreviewAuthResponse::default()));
        }
        state.preview_tokens.insert(request.sandbox_id, MADE_TOKEN.into());
        Ok(Response::new(RotatePreviewAuthResponse {
            preview_auth_token: MADE_TOKEN.into(),
            scheme: "bearer".into(),
        }))
    }
}

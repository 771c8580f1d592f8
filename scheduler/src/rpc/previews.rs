//! `oc.v1.PreviewService`.

use oc_mesh::caller::Caller;
use oc_proto::{
    mesh::{PreviewEntry, SandboxRecord},
    v1::{
        CreatePreviewRequest, CreatePreviewResponse, DeletePreviewRequest, DeletePreviewResponse,
        ListPreviewsRequest, ListPreviewsResponse, Preview, PreviewAuthConfig, RotatePreviewAuthRequest,
        RotatePreviewAuthResponse, preview_service_server::PreviewService,
    },
};
use tonic::{Request, Response, Status};

use super::key_caller;
use crate::{
    previews::{
        self, Previews, Wanted,
        token::{SCHEME, Token},
    },
    refusal::Refusal,
};

/// The service.
#[derive(Clone, Debug)]
pub struct PreviewRpc {
    previews: Previews,
    own_names: Vec<String>,
}

impl PreviewRpc {
    /// Serves these previews, none of which is given one of `own_names` or a name below it.
    pub fn new(previews: Previews, own_names: Vec<String>) -> Self {
        Self { previews, own_names }
    }

    fn domain(&self, name: &str, caller: &Caller) -> Result<String, Refusal> {
        Ok(previews::domain(name, &self.own_names, &caller.public_url, &caller.preview_domain)?)
    }
}

#[tonic::async_trait]
impl PreviewService for PreviewRpc {
    async fn create_preview(
        &self,
        request: Request<CreatePreviewRequest>,
    ) -> Result<Response<CreatePreviewResponse>, Status> {
        let caller = key_caller(&request)?;
        let CreatePreviewRequest { sandbox_id, port, domain, auth_config } = request.into_inner();
        let port = previews::port(port).map_err(Refusal::from)?;
        let domain = match domain.as_str() {
            "" => None,
            name => Some(self.domain(name, &caller)?),
        };
        // The published clients send an empty object where they mean nothing.
        let auth = auth_config.filter(|auth| !auth.scheme.is_empty() || !auth.token.is_empty());
        let token = auth.map(|auth| Token::asked(&auth)).transpose()?;
        let wanted = Wanted { port, domain, token_hash: token.as_ref().map(Token::hash) };
        let (record, existed) = self.previews.create(&caller.tenant, &sandbox_id, &wanted).await?;
        let shown = previews::entry(&record, port).map(|entry| Preview {
            preview_auth_token: token.map(Token::into_text).unwrap_or_default(),
            ..show(&record, entry, &caller)
        });
        Ok(Response::new(CreatePreviewResponse { preview: shown, existed }))
    }

    async fn list_previews(
        &self,
        request: Request<ListPreviewsRequest>,
    ) -> Result<Response<ListPreviewsResponse>, Status> {
        let caller = key_caller(&request)?;
        let record = self.previews.of(&caller.tenant, &request.get_ref().sandbox_id).await?;
        let previews = record.previews.iter().map(|entry| show(&record, entry, &caller)).collect();
        Ok(Response::new(ListPreviewsResponse { previews }))
    }

    async fn delete_preview(
        &self,
        request: Request<DeletePreviewRequest>,
    ) -> Result<Response<DeletePreviewResponse>, Status> {
        let caller = key_caller(&request)?;
        let DeletePreviewRequest { sandbox_id, port } = request.into_inner();
        self.previews.delete(&caller.tenant, &sandbox_id, port).await?;
        Ok(Response::new(DeletePreviewResponse {}))
    }

    async fn rotate_preview_auth(
        &self,
        request: Request<RotatePreviewAuthRequest>,
    ) -> Result<Response<RotatePreviewAuthResponse>, Status> {
        let caller = key_caller(&request)?;
        let RotatePreviewAuthRequest { sandbox_id, remove } = request.into_inner();
        if remove {
            self.previews.set_token(&caller.tenant, &sandbox_id, "").await?;
            return Ok(Response::new(RotatePreviewAuthResponse::default()));
        }
        let token = Token::generate()?;
        self.previews.set_token(&caller.tenant, &sandbox_id, &token.hash()).await?;
        Ok(Response::new(RotatePreviewAuthResponse {
            preview_auth_token: token.into_text(),
            scheme: SCHEME.to_owned(),
        }))
    }
}

/// A preview as its owners see it.
fn show(record: &SandboxRecord, entry: &PreviewEntry, caller: &Caller) -> Preview {
    let hostname = format!("{}-p{}.{}", record.sandbox_id, entry.port, caller.preview_domain);
    let (scheme, authority) = caller.public_url.split_once("://").unwrap_or(("http", ""));
    let authority = authority.split('/').next().unwrap_or_default();
    // An IPv6 address has colons of its own, within brackets.
    let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
    let url = match port {
        Some(port) => format!("{scheme}://{hostname}:{port}"),
        None => format!("{scheme}://{hostname}"),
    };
    Preview {
        preview_id: entry.preview_id.clone(),
        sandbox_id: record.sandbox_id.clone(),
        tenant: record.tenant.clone(),
        port: entry.port,
        hostname,
        custom_hostname: entry.domain.clone(),
        ssl_status: if scheme == "https" { "active" } else { "none" }.to_owned(),
        auth_config: Some(PreviewAuthConfig {
            scheme: if record.preview_token_hash.is_empty() { "" } else { SCHEME }.to_owned(),
        }),
        created_at: entry.created_at,
        url,
        preview_auth_token: String::new(),
    }
}

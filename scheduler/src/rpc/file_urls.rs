//! `oc.v1.FileUrlService`. Nothing is kept of a URL: it says all that a gateway has to know, and is signed.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use oc_mesh::file_url::{Access, FileUrlSigner, Grant};
use oc_proto::v1::{
    CreateDownloadUrlRequest, CreateDownloadUrlResponse, CreateUploadUrlRequest, CreateUploadUrlResponse,
    file_url_service_server::FileUrlService,
};
use tonic::{Request, Response, Status};

use super::sandbox_caller;
use crate::{
    lifecycle::{self, Denied},
    refusal::Refusal,
    sandboxes::Sandboxes,
    validate,
};

/// The service.
#[derive(Clone, Debug)]
pub struct FileUrlRpc {
    sandboxes: Sandboxes,
    signer: Arc<FileUrlSigner>,
}

impl FileUrlRpc {
    /// Makes URLs for files of these sandboxes.
    pub fn new(sandboxes: Sandboxes, signer: FileUrlSigner) -> Self {
        Self { sandboxes, signer: Arc::new(signer) }
    }

    /// A URL, and until when it is good.
    async fn url<T>(
        &self,
        request: &Request<T>,
        sandbox_id: &str,
        access: Access,
        path: &str,
        expires_in: Option<i32>,
    ) -> Result<(String, SystemTime), Refusal> {
        let caller = sandbox_caller(request, sandbox_id)?;
        let path = validate::path(path)?;
        let good_for = validate::expires_in(expires_in)?;
        let record = self.sandboxes.get(&caller.tenant, sandbox_id).await?;
        if lifecycle::is_deleted(&record) {
            return Err(Denied::Deleted.into());
        }
        let until = (self.sandboxes.clock.now() + good_for).duration_since(UNIX_EPOCH).unwrap_or_default();
        let expires = until.as_secs();
        let grant = Grant { access, tenant: &record.tenant, sandbox_id, path: &path, expires };
        let route = match access {
            Access::Read => "download",
            Access::Write => "upload",
        };
        let query = self.signer.query(&grant);
        let url = format!("{}/api/sandboxes/{sandbox_id}/files/{route}?{query}", caller.public_url);
        Ok((url, UNIX_EPOCH + Duration::from_secs(expires)))
    }
}

#[tonic::async_trait]
impl FileUrlService for FileUrlRpc {
    async fn create_download_url(
        &self,
        request: Request<CreateDownloadUrlRequest>,
    ) -> Result<Response<CreateDownloadUrlResponse>, Status> {
        let CreateDownloadUrlRequest { sandbox_id, path, expires_in } = request.get_ref();
        let (url, until) = self.url(&request, sandbox_id, Access::Read, path, *expires_in).await?;
        Ok(Response::new(CreateDownloadUrlResponse { url, expires_at: Some(until.into()) }))
    }

    async fn create_upload_url(
        &self,
        request: Request<CreateUploadUrlRequest>,
    ) -> Result<Response<CreateUploadUrlResponse>, Status> {
        let CreateUploadUrlRequest { sandbox_id, path, expires_in } = request.get_ref();
        let (url, until) = self.url(&request, sandbox_id, Access::Write, path, *expires_in).await?;
        Ok(Response::new(CreateUploadUrlResponse { url, expires_at: Some(until.into()) }))
    }
}

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::Method;
use oc_mesh::file_url::{Access, Grant};
use oc_proto::v1::{
    CreateDownloadUrlRequest, CreateDownloadUrlResponse, CreateUploadUrlRequest, CreateUploadUrlResponse,
    file_url_service_server::FileUrlService,
};
use serde_json::json;
use tonic::{Request, Response, Status};

use crate::{
    client::Answer,
    mesh::{CREATING, DELETED, FOREIGN, HIBERNATED, Mesh, SANDBOX},
    scheduler::FakeScheduler,
};

#[tonic::async_trait]
impl FileUrlService for FakeScheduler {
    async fn create_download_url(
        &self,
        request: Request<CreateDownloadUrlRequest>,
    ) -> Result<Response<CreateDownloadUrlResponse>, Status> {
        let caller = self.note("CreateDownloadUrl", &request);
        let expires_at = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
        let url = format!("{}{}", caller.public_url, request.get_ref().path);
        Ok(Response::new(CreateDownloadUrlResponse { url, expires_at }))
    }

    async fn create_upload_url(
        &self,
        request: Request<CreateUploadUrlRequest>,
    ) -> Result<Response<CreateUploadUrlResponse>, Status> {
        self.note("CreateUploadUrl", &request);
        Ok(Response::new(CreateUploadUrlResponse::default()))
    }
}

impl Mesh {
    /// The query of a URL that is good for an hour, whosever the sandbox is.
    pub fn url_query(&self, access: Access, sandbox_id: &str, path: &str) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        self.query_until(access, sandbox_id, path, now + Duration::from_secs(3600))
    }

    fn query_until(&self, access: Access, sandbox_id: &str, path: &str, until: Duration) -> String {
        let tenant = if sandbox_id == FOREIGN { "theirs" } else { "ours" };
        let grant = Grant { access, tenant, sandbox_id, path, expires: until.as_secs() };
        self.urls.query(&grant)
    }

    async fn get(&self, sandbox_id: &str, query: &str) -> Answer {
        let path = format!("/api/sandboxes/{sandbox_id}/files/download?{query}");
        self.send(Method::GET, &path, &[], "").await
    }

    async fn put(&self, sandbox_id: &str, query: &str) -> Answer {
        let path = format!("/api/sandboxes/{sandbox_id}/files/upload?{query}");
        self.send(Method::PUT, &path, &[], "content").await
    }
}

#[tokio::test]
async fn urls_are_asked_for_as_published_clients_do() {
    let mesh = Mesh::start().await;
    for prefix in ["/api", ""] {
        let path = format!("{prefix}/sandboxes/{SANDBOX}/files/download-url");
        let body = json!({"path": "/a", "expiresIn": 60}).to_string();
        let answer = mesh.call(Method::POST, &path, body).await;
        let url = format!("http://{}/a", mesh.address);
        assert_eq!(answer.json(), json!({"url": url, "expiresAt": "2023-11-14T22:13:20Z"}));
    }
}

#[tokio::test]
async fn a_url_needs_no_credential_and_is_good_for_one_file() {
    let mesh = Mesh::start().await;
    let download = mesh.get(SANDBOX, &mesh.url_query(Access::Read, SANDBOX, "/zeros/1000")).await;
    assert_eq!((download.status.as_u16(), download.body.len()), (200, 1000));
    // What was not signed changes nothing.
    let query = mesh.url_query(Access::Read, SANDBOX, "/zeros/1000");
    assert_eq!(mesh.get(SANDBOX, &format!("{query}&limit=1&offset=3")).await.body.len(), 1000);
    let upload = mesh.put(SANDBOX, &mesh.url_query(Access::Write, SANDBOX, "/up load&x=1")).await;
    assert_eq!((upload.status.as_u16(), upload.body.len()), (204, 0));
    let seen = mesh.agent.0.uploads.borrow().last().unwrap().clone();
    assert_eq!((seen.path.as_str(), seen.bytes, seen.whole), ("/up load&x=1", 7, Some(true)));
    for (_, sandbox, caller) in mesh.agent.0.calls.lock().iter() {
        assert_eq!((sandbox.as_str(), caller.tenant.as_str(), caller.admin), (SANDBOX, "ours", false));
        assert_eq!(caller.sandbox.as_deref(), Some(SANDBOX));
    }
    // Of whichever tenant.
    let theirs = mesh.get(FOREIGN, &mesh.url_query(Access::Read, FOREIGN, "/zeros/1")).await;
    assert_eq!(theirs.status, 200);
    assert_eq!(mesh.agent.0.calls.lock().last().unwrap().2.tenant, "theirs");
}

#[tokio::test]
async fn a_url_wakes_its_sandbox_and_says_why_it_cannot_be_used() {
    let mesh = Mesh::start().await;
    let get = async |id: &str| mesh.get(id, &mesh.url_query(Access::Read, id, "/zeros/1")).await;
    assert_eq!(get(HIBERNATED).await.status, 200);
    assert_eq!(mesh.scheduler.0.lock().last().unwrap().0, "WakeSandbox");
    assert_eq!(get(DELETED).await.error(), (410, "SANDBOX_DELETED".to_owned()));
    assert_eq!(get(CREATING).await.error(), (503, "SANDBOX_NOT_READY".to_owned()));
    assert_eq!(get("sb-00000000000000000099").await.error(), (404, "SANDBOX_NOT_FOUND".to_owned()));
    assert_eq!(get("..").await.error(), (404, "SANDBOX_NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn nothing_else_than_what_was_signed_is_done() {
    let mesh = Mesh::start().await;
    let query = mesh.url_query(Access::Read, SANDBOX, "/zeros/1");
    let wrong = (403, "INVALID_CREDENTIALS".to_owned());
    for tampered in [
        query.replace("/zeros/1", "/zeros/2"),
        query.replace("/zeros/1", "/zeros//1"),
        query.replace("expires=", "expires=9"),
        query.replace("signature=", "signature=A"),
        mesh.url_query(Access::Write, SANDBOX, "/zeros/1"),
        mesh.url_query(Access::Read, HIBERNATED, "/zeros/1"),
    ] {
        assert_eq!(mesh.get(SANDBOX, &tampered).await.error(), wrong, "{tampered}");
    }
    assert_eq!(mesh.put(SANDBOX, &query).await.error(), wrong);
    assert_eq!(mesh.get(FOREIGN, &query).await.error(), wrong);
    let long_ago = mesh.query_until(Access::Read, SANDBOX, "/zeros/1", Duration::from_secs(1));
    assert_eq!(mesh.get(SANDBOX, &long_ago).await.error(), (403, "URL_EXPIRED".to_owned()));
    for part in ["path=", "expires=", "signature="] {
        let without: Vec<_> = query.split('&').filter(|pair| !pair.starts_with(part)).collect();
        assert_eq!(mesh.get(SANDBOX, &without.join("&")).await.error(), (400, "INVALID_ARGUMENT".to_owned()));
    }
    // A key is no substitute, and no other route takes a URL.
    let path = format!("/api/sandboxes/{SANDBOX}/files");
    let answer = mesh.call(Method::GET, &format!("{path}/download?path=/zeros/1"), "").await;
    assert_eq!(answer.error(), (400, "INVALID_ARGUMENT".to_owned()));
    for route in ["", "/list", "/stat", "/archive"] {
        let answer = mesh.send(Method::GET, &format!("{path}{route}?{query}"), &[], "").await;
        assert_eq!(answer.error(), (401, "UNAUTHENTICATED".to_owned()), "{route}");
    }
    assert!(mesh.agent.0.calls.lock().is_empty());
}

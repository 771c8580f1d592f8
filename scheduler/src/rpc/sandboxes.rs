//! `oc.v1.SandboxService`.

use std::{sync::Arc, time::Duration};

use oc_proto::{
    mesh::SandboxRecord,
    v1::{
        CreateSandboxRequest, CreateSandboxResponse, DeleteSandboxRequest, DeleteSandboxResponse,
        GetSandboxRequest, GetSandboxResponse, HibernateSandboxRequest, HibernateSandboxResponse,
        ListSandboxesRequest, ListSandboxesResponse, RefreshTokenRequest, RefreshTokenResponse,
        SetTimeoutRequest, SetTimeoutResponse, WakeSandboxRequest, WakeSandboxResponse, WatchSandboxRequest,
        sandbox_service_server::SandboxService,
    },
};
use tonic::{Request, Response, Status};

use super::{
    key_caller,
    present::Presenter,
    sandbox_caller,
    watch::{Events, Watches},
};
use crate::{
    lifecycle::{self, Denied},
    previews::token::Token,
    refusal::Refusal,
    sandboxes::{Sandboxes, age},
    validate::{self, Invalid},
};

/// Sandboxes on a page of who asks for no number: as many as there may be. REST answers with the bare list, and whoever
/// does not know of pages would miss the others without noticing.
const PAGE: usize = 1000;
/// Sandboxes on a page at most.
const MAX_PAGE: i32 = 1000;
/// Sandboxes shown before others get their turn: each needs a signature, tens of microseconds.
const SHOWN_AT_ONCE: usize = 16;
/// Longest a call waits for a create: the flow ends by itself long before.
pub const MAX_DEADLINE: Duration = Duration::from_secs(180);

/// The service.
#[derive(Clone, Debug)]
pub struct SandboxRpc {
    sandboxes: Sandboxes,
    presenter: Arc<Presenter>,
    watches: Watches,
}

impl SandboxRpc {
    /// Serves these sandboxes.
    pub fn new(sandboxes: Sandboxes, presenter: Arc<Presenter>, watches: Watches) -> Self {
        Self { sandboxes, presenter, watches }
    }
}

#[tonic::async_trait]
impl SandboxService for SandboxRpc {
    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Result<Response<CreateSandboxResponse>, Status> {
        let caller = key_caller(&request)?;
        let mut asked = request.into_inner();
        let token = asked.preview_auth.take().map(|auth| Token::asked(&auth)).transpose()?;
        let mut order = validate::order(asked).map_err(Refusal::from)?;
        order.preview_token_hash = token.as_ref().map(Token::hash).unwrap_or_default();
        let made = self.sandboxes.create(&caller.tenant, order).await?;
        let mut sandbox = self.presenter.show(&made.record, &caller, self.sandboxes.clock.now())?;
        sandbox.preview_auth_token = token.map(Token::into_text).unwrap_or_default();
        Ok(Response::new(CreateSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn get_sandbox(
        &self,
        request: Request<GetSandboxRequest>,
    ) -> Result<Response<GetSandboxResponse>, Status> {
        let caller = sandbox_caller(&request, &request.get_ref().sandbox_id)?;
        let record = self.sandboxes.get(&caller.tenant, &request.get_ref().sandbox_id).await?;
        let sandbox = self.presenter.show(&record, &caller, self.sandboxes.clock.now())?;
        Ok(Response::new(GetSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Result<Response<ListSandboxesResponse>, Status> {
        let caller = key_caller(&request)?;
        let ListSandboxesRequest { page_size, page_token } = request.into_inner();
        let size = page_size_of(page_size)?;
        let after = (!page_token.is_empty()).then(|| Cursor::parse(&page_token)).transpose()?;
        let records = self.sandboxes.list(&caller.tenant).await;
        let begin = after.map_or(0, |after| records.partition_point(|record| age(record) <= after.age()));
        let page = records.get(begin..).unwrap_or_default();
        let (page, is_last) = (page.get(..size).unwrap_or(page), page.len() <= size);
        let now = self.sandboxes.clock.now();
        let mut sandboxes = Vec::with_capacity(page.len());
        for records in page.chunks(SHOWN_AT_ONCE) {
            for record in records {
                sandboxes.push(self.presenter.show(record, &caller, now)?);
            }
            tokio::task::yield_now().await;
        }
        let next_page_token = match page.last() {
            Some(last) if !is_last => Cursor::of(last).to_string(),
            _ => String::new(),
        };
        Ok(Response::new(ListSandboxesResponse { sandboxes, next_page_token }))
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Result<Response<DeleteSandboxResponse>, Status> {
        let caller = key_caller(&request)?;
        self.sandboxes.delete(&caller.tenant, &request.get_ref().sandbox_id).await?;
        Ok(Response::new(DeleteSandboxResponse {}))
    }

    async fn hibernate_sandbox(
        &self,
        request: Request<HibernateSandboxRequest>,
    ) -> Result<Response<HibernateSandboxResponse>, Status> {
        let caller = sandbox_caller(&request, &request.get_ref().sandbox_id)?;
        let record = self.sandboxes.hibernate(&caller.tenant, &request.get_ref().sandbox_id).await?;
        Ok(Response::new(HibernateSandboxResponse {
            state: record.state,
            size_bytes: record.stored_bytes,
            tier: record.hibernation_tier,
            hibernation_key: format!("{}/{}/{}", record.host_id, record.sandbox_id, record.epoch),
            sandbox_id: record.sandbox_id,
        }))
    }

    async fn wake_sandbox(
        &self,
        request: Request<WakeSandboxRequest>,
    ) -> Result<Response<WakeSandboxResponse>, Status> {
        let caller = sandbox_caller(&request, &request.get_ref().sandbox_id)?;
        let WakeSandboxRequest { sandbox_id, timeout } = request.into_inner();
        let timeout = timeout.map(validate::timeout).transpose().map_err(Refusal::from)?;
        let record = self.sandboxes.wake(&caller.tenant, &sandbox_id, timeout).await?;
        let sandbox = self.presenter.show(&record, &caller, self.sandboxes.clock.now())?;
        Ok(Response::new(WakeSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn set_timeout(
        &self,
        request: Request<SetTimeoutRequest>,
    ) -> Result<Response<SetTimeoutResponse>, Status> {
        let caller = sandbox_caller(&request, &request.get_ref().sandbox_id)?;
        let SetTimeoutRequest { sandbox_id, timeout } = request.into_inner();
        let timeout = validate::timeout(timeout).map_err(Refusal::from)?;
        self.sandboxes.set_timeout(&caller.tenant, &sandbox_id, timeout).await?;
        Ok(Response::new(SetTimeoutResponse {}))
    }

    async fn refresh_token(
        &self,
        request: Request<RefreshTokenRequest>,
    ) -> Result<Response<RefreshTokenResponse>, Status> {
        let caller = sandbox_caller(&request, &request.get_ref().sandbox_id)?;
        let record = self.sandboxes.get(&caller.tenant, &request.get_ref().sandbox_id).await?;
        if lifecycle::is_deleted(&record) {
            return Err(Refusal::from(Denied::Deleted).into());
        }
        let (token, expires_at) = self.presenter.token(&record, self.sandboxes.clock.now())?;
        Ok(Response::new(RefreshTokenResponse { token, expires_at: Some(expires_at.into()) }))
    }

    type WatchSandboxStream = Events;

    async fn watch_sandbox(&self, request: Request<WatchSandboxRequest>) -> Result<Response<Events>, Status> {
        Ok(Response::new(self.watches.open(request).await?))
    }
}

fn page_size_of(asked: i32) -> Result<usize, Refusal> {
    match usize::try_from(asked) {
        Ok(0) => Ok(PAGE),
        Ok(size) if asked <= MAX_PAGE => Ok(size),
        _ => Err(Invalid::PageSize(asked).into()),
    }
}

/// The last sandbox of a page. Pages go on after it, even if it has been deleted meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cursor {
    seconds: i64,
    nanos: i32,
    sandbox_id: String,
}

impl Cursor {
    fn of(record: &SandboxRecord) -> Self {
        let (seconds, nanos, sandbox_id) = age(record);
        Self { seconds, nanos, sandbox_id: sandbox_id.into() }
    }

    fn age(&self) -> (i64, i32, &str) {
        (self.seconds, self.nanos, &self.sandbox_id)
    }

    /// Hex, so that nobody takes it for something to build by hand.
    fn parse(token: &str) -> Result<Self, Refusal> {
        let parsed = || {
            let text = String::from_utf8(hex::decode(token).ok()?).ok()?;
            let mut parts = text.splitn(3, ' ');
            Some(Self {
                seconds: parts.next()?.parse().ok()?,
                nanos: parts.next()?.parse().ok()?,
                sandbox_id: parts.next()?.into(),
            })
        };
        parsed().ok_or_else(|| Invalid::PageToken.into())
    }
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(format!("{} {} {}", self.seconds, self.nanos, self.sandbox_id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_survive_the_way_to_the_client_and_back() {
        let cursor = Cursor { seconds: -5, nanos: 999_999_999, sandbox_id: "sb-x".into() };
        assert_eq!(Cursor::parse(&cursor.to_string()).unwrap(), cursor);
        for token in ["zz", "00", &hex::encode("1 2"), &hex::encode("a b c")] {
            assert!(Cursor::parse(token).is_err(), "{token}");
        }
    }

    #[test]
    fn pages_have_bounds() {
        assert_eq!(page_size_of(0).unwrap(), 1000);
        assert_eq!(page_size_of(1000).unwrap(), 1000);
        assert!(page_size_of(-1).is_err());
        assert!(page_size_of(1001).is_err());
    }
}

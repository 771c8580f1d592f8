//! Waking sandboxes for those who call them.

use std::{collections::HashSet, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName};
use oc_mesh::{
    channel::ClientChannel,
    error::{Reason, status},
};
use oc_proto::v1::{WakeSandboxRequest, sandbox_service_client::SandboxServiceClient};
use parking_lot::Mutex;
use tonic::{Request, Status, metadata::MetadataMap};

/// How long a wake may take: memory is read at the disk's pace.
const WAKES_WITHIN: Duration = Duration::from_secs(115);
/// The header by which a client says that it would rather ask again than wait (what the published clients send).
const ASYNC_WAKE: HeaderName = HeaderName::from_static("x-osb-async-wake");

/// Whether a caller waits for a sandbox that wakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// It waits.
    Waits,
    /// It asks again.
    AsksAgain,
}

impl Patience {
    /// As the caller's headers say.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        match headers.get(ASYNC_WAKE).is_some_and(|value| value == "1") {
            true => Self::AsksAgain,
            false => Self::Waits,
        }
    }
}

/// The sandboxes that wake for callers who ask again.
#[derive(Clone, Debug, Default)]
pub struct Waking(Arc<Mutex<HashSet<String>>>);

impl Waking {
    /// Asks `scheduler` to wake a sandbox, on behalf of the caller whom `headers` name.
    ///
    /// # Errors
    /// `SANDBOX_WAKING` at once without patience; what the scheduler refuses.
    pub async fn wake(
        &self,
        scheduler: ClientChannel,
        sandbox_id: &str,
        headers: &HeaderMap,
        patience: Patience,
    ) -> Result<(), Status> {
        let request = WakeSandboxRequest { sandbox_id: sandbox_id.to_owned(), timeout: None };
        let mut request = Request::from_parts(
            MetadataMap::from_headers(headers.clone()),
            tonic::Extensions::default(),
            request,
        );
        request.set_timeout(WAKES_WITHIN);
        let mut scheduler = SandboxServiceClient::new(scheduler);
        let call = async move { scheduler.wake_sandbox(request).await };
        match patience {
            Patience::Waits => call.await.map(drop),
            Patience::AsksAgain => {
                if self.0.lock().insert(sandbox_id.to_owned()) {
                    let (this, sandbox_id) = (self.clone(), sandbox_id.to_owned());
                    tokio::spawn(async move {
                        if let Err(error) = call.await {
                            tracing::warn!(sandbox_id, error = error.message(), "a sandbox does not wake");
                        }
                        this.0.lock().remove(&sandbox_id);
                    });
                }
                Err(status(Reason::SandboxWaking, "the sandbox is waking, try again"))
            }
        }
    }
}

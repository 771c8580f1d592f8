//! The parts behind the gateway: how one is chosen for a call, and how a call that was made out of REST is sent.

pub mod answer;
mod waking;

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::{BufMut as _, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use oc_mesh::{
    caller::{Caller, SANDBOX_ID_HEADER},
    channel::{Channels, ClientChannel},
    error::{Reason, status},
    view::View,
};
use oc_proto::mesh::SchedulerRecord;
use prost::Message as _;
use prost_reflect::{DynamicMessage, MessageDescriptor};
use tokio::runtime::Handle;
use tonic::{
    Code, Status, Streaming,
    body::Body,
    codec::{DecodeBuf, Decoder},
};
use tower::{BoxError, Service as _, ServiceExt as _};

use crate::{
    auth::Identity,
    sandboxes::{Sandboxes, Whereabouts},
    surface::{Backend, Rpc},
    upstream::waking::Waking,
};

pub use self::waking::Patience;

/// Largest message of a stream of answers.
const MAX_PART_BYTES: usize = 4 << 20;

/// The header that carries a call's deadline.
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Chooses a channel for each call.
#[derive(Debug)]
pub struct Upstreams {
    schedulers: View<SchedulerRecord>,
    sandboxes: Sandboxes,
    channels: Channels,
    /// Where channels live. They serve connections of all [`workers`](crate::listener::workers), and have none of those to themselves.
    runtime: Handle,
    turn: AtomicUsize,
    waking: Waking,
}

impl Upstreams {
    /// Schedulers and hosts, as their records name them. Channels to them live where this is called.
    #[must_use]
    pub fn new(schedulers: View<SchedulerRecord>, sandboxes: Sandboxes) -> Self {
        let (channels, turn, waking) = (Channels::new(), AtomicUsize::new(0), Waking::default());
        Self { schedulers, sandboxes, channels, runtime: Handle::current(), turn, waking }
    }

    /// The sandboxes that calls go to.
    #[must_use]
    pub fn sandboxes(&self) -> &Sandboxes {
        &self.sandboxes
    }

    /// A channel to whoever answers this RPC. A hibernated sandbox is woken first, on behalf of the caller whom
    /// `headers` name.
    ///
    /// # Errors
    /// The sandbox cannot be used by this caller or at all (see [`Sandboxes::find`]), or does not wake;
    /// `SANDBOX_WAKING` for one without patience; `HOST_UNAVAILABLE`.
    pub async fn choose(
        &self,
        rpc: &Rpc,
        identity: &Identity,
        sandbox_id: Option<&str>,
        headers: &HeaderMap,
        patience: Patience,
    ) -> Result<ClientChannel, Status> {
        let endpoint = match rpc.backend {
            Backend::Scheduler => self.scheduler()?,
            Backend::Host => {
                let sandbox_id = sandbox_id.filter(|id| !id.is_empty()).ok_or_else(no_sandbox)?;
                self.host(identity, sandbox_id, headers, patience).await?
            }
        };
        self.channel(&endpoint)
    }

    /// The endpoint of a sandbox's host, for `identity`. A hibernated one is woken first, on behalf of the caller whom `headers`
    /// name.
    ///
    /// # Errors
    /// As with [`Upstreams::choose`].
    pub async fn host(
        &self,
        identity: &Identity,
        sandbox_id: &str,
        headers: &HeaderMap,
        patience: Patience,
    ) -> Result<String, Status> {
        match self.sandboxes.find(identity.tenant(), sandbox_id).await? {
            Whereabouts::Host(endpoint) => Ok(endpoint),
            Whereabouts::Hibernated => {
                self.wake(sandbox_id, headers, patience).await?;
                self.sandboxes.host_of_woken(sandbox_id).await
            }
        }
    }

    /// A channel to a sandbox's host, unless it would have to be woken.
    ///
    /// # Errors
    /// `SANDBOX_HIBERNATED`; else as with [`Upstreams::choose`].
    pub async fn awake(&self, identity: &Identity, sandbox_id: &str) -> Result<ClientChannel, Status> {
        match self.sandboxes.find(identity.tenant(), sandbox_id).await? {
            Whereabouts::Host(endpoint) => self.channel(&endpoint),
            Whereabouts::Hibernated => Err(status(Reason::SandboxHibernated, "the sandbox is hibernated")),
        }
    }

    /// Wakes a sandbox on behalf of the caller whom `headers` name, and waits for it with patience.
    ///
    /// # Errors
    /// `SANDBOX_WAKING` without patience; what the scheduler refuses.
    pub async fn wake(
        &self,
        sandbox_id: &str,
        headers: &HeaderMap,
        patience: Patience,
    ) -> Result<(), Status> {
        let scheduler = self.channel(&self.scheduler()?)?;
        self.waking.wake(scheduler, sandbox_id, headers, patience).await
    }

    /// A channel to a member's endpoint.
    ///
    /// # Errors
    /// `HOST_UNAVAILABLE` if it is none.
    pub fn channel(&self, endpoint: &str) -> Result<ClientChannel, Status> {
        let _entered = self.runtime.enter();
        self.channels.get(endpoint).map_err(|error| {
            tracing::error!(%endpoint, %error, "a member's endpoint cannot be used");
            status(Reason::HostUnavailable, "the part that answers this call cannot be reached")
        })
    }

    /// One of the schedulers, in turns.
    fn scheduler(&self) -> Result<String, Status> {
        let members = self.schedulers.all();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        members
            .get(turn.checked_rem(members.len()).unwrap_or(0))
            .map(|(_, scheduler)| scheduler.endpoint.clone())
            .ok_or_else(|| status(Reason::HostUnavailable, "no scheduler is running at the moment"))
    }
}

fn no_sandbox() -> Status {
    status(Reason::InvalidArgument, "`sandboxID` must name a sandbox")
}

/// The headers that one of our parts may trust: who calls, and which sandbox was authorised.
#[must_use]
pub fn trusted_headers(caller: &Caller, sandbox_id: Option<&str>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    caller.apply(&mut headers);
    if let Some(value) = sandbox_id.and_then(|id| HeaderValue::from_str(id).ok()) {
        headers.insert(HeaderName::from_static(SANDBOX_ID_HEADER), value);
    }
    headers
}

/// A whole message as the body of a gRPC call.
#[must_use]
pub fn one_message(message: &DynamicMessage) -> Body {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // Writing to a growing buffer does not fail.
    let _ = message.encode(&mut framed);
    Body::new(Full::new(framed.freeze()))
}

/// Sends a call and returns the beginning of its answer.
///
/// # Errors
/// What the other side answered instead; `HOST_UNAVAILABLE` if it cannot be reached or breaks off, now or later amid
/// its answer.
pub async fn call(
    mut channel: ClientChannel,
    rpc: &Rpc,
    mut headers: HeaderMap,
    deadline: Option<Duration>,
    body: Body,
) -> Result<Body, Status> {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("te", HeaderValue::from_static("trailers"));
    if let Some(deadline) = deadline {
        headers.insert(GRPC_TIMEOUT, timeout_value(deadline));
    }
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = rpc.path.clone().into();
    *request.headers_mut() = headers;
    let ready = channel.ready().await.map_err(broke_off)?;
    let response = ready.call(request).await.map_err(broke_off)?;
    // An error without an answer has its status in the headers.
    if let Some(refused) =
        Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok)
    {
        return Err(refused);
    }
    if response.status() != StatusCode::OK {
        tracing::error!(status = %response.status(), rpc = rpc.path.as_str(), "what answered does not speak gRPC");
        return Err(status(Reason::Internal, "the answer could not be read"));
    }
    Ok(Body::new(response.into_body().map_err(broke_off)))
}

/// The transport failed. Whatever the other side has to say itself, its deadline's expiry too, comes as a status in
/// headers or trailers, so it died or cannot be reached.
fn broke_off(error: impl Into<BoxError>) -> Status {
    let error: BoxError = error.into();
    tracing::warn!(error = error.as_ref(), "a call to another part broke off");
    status(Reason::HostUnavailable, "the part that answers this call broke off, try again")
}

/// The messages of an answer that is a stream.
#[must_use]
pub fn messages(rpc: &Rpc, body: Body) -> Streaming<DynamicMessage> {
    Streaming::new_response(Answers(rpc.method.output()), body, StatusCode::OK, None, Some(MAX_PART_BYTES))
}

/// At most eight digits and a unit (the gRPC-over-HTTP/2 protocol).
fn timeout_value(deadline: Duration) -> HeaderValue {
    const MOST: u128 = 99_999_999;
    let text = match deadline.as_millis() {
        millis if millis <= MOST => format!("{millis}m"),
        millis => format!("{}S", (millis / 1000).min(MOST)),
    };
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("99999999S"))
}

/// Reads messages of one type.
struct Answers(MessageDescriptor);

impl Decoder for Answers {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let mut message = DynamicMessage::new(self.0.clone());
        message.merge(source).map_err(|error| {
            tracing::error!(%error, message = self.0.full_name(), "an answer could not be read");
            status(Reason::Internal, "the answer could not be read")
        })?;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_have_at_most_eight_digits() {
        for (deadline, value) in [
            (Duration::from_millis(1500), "1500m"),
            (Duration::from_secs(99_999), "99999000m"),
            (Duration::from_secs(100_000), "100000S"),
            (Duration::MAX, "99999999S"),
        ] {
            assert_eq!(timeout_value(deadline), value);
        }
    }
}

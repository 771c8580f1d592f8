//! Commands and files: calls that pass through to the guest unread.
//!
//! The caller names the sandbox in the metadata `oc-sandbox-id`; frames go to its guest and back as they are. A
//! call counts as use of the sandbox from its first byte to its last.
//! If the VM is lost meanwhile, the call ends with that reason instead of a broken stream. Streams that do not end by
//! themselves end when the agent goes down: their callers attach again to the one that comes after it.

use std::{
    convert::Infallible,
    fmt,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use oc_mesh::{
    caller::SANDBOX_ID_HEADER,
    endless,
    error::{Reason, status},
    relay::relay,
};
use oc_proto::v1::{
    agent_session_service_server::AgentSessionServiceServer, exec_service_server::ExecServiceServer,
    file_service_server::FileServiceServer, network_service_server::NetworkServiceServer,
    port_service_server::PortServiceServer,
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;

use crate::{
    host::Host,
    rpc::{parse_sandbox, unknown, vm_status},
    vm::{
        decide::Phase,
        handle::{Vm, VmError},
    },
};

/// The link to a guest breaks a moment before its VM is known to be lost. On a busy host that is noted late.
const LOSS_SHOWS_WITHIN: Duration = Duration::from_secs(5);

/// Commands.
pub type ExecPlane = DataPlane<ExecServiceServer<()>>;
/// Files.
pub type FilePlane = DataPlane<FileServiceServer<()>>;
/// Ports, which the guest's host connects to itself where it can.
pub type PortPlane = DataPlane<PortServiceServer<()>>;
/// What a sandbox has of a network, which its host answers for the guest.
pub type NetworkPlane = DataPlane<NetworkServiceServer<()>>;
/// Agent sessions.
pub type AgentSessionPlane = DataPlane<AgentSessionServiceServer<()>>;

/// Passes the calls of the service `S` through to the guests.
pub struct DataPlane<S> {
    host: Host,
    draining: CancellationToken,
    service: PhantomData<fn() -> S>,
}

impl<S> DataPlane<S> {
    /// Passes calls to the sandboxes of `host`; endless ones until it is `draining`.
    pub fn new(host: Host, draining: CancellationToken) -> Self {
        Self { host, draining, service: PhantomData }
    }
}

impl<S> Clone for DataPlane<S> {
    fn clone(&self) -> Self {
        Self::new(self.host.clone(), self.draining.clone())
    }
}

impl<S> fmt::Debug for DataPlane<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataPlane").finish_non_exhaustive()
    }
}

impl<S: NamedService> NamedService for DataPlane<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for DataPlane<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Self { host, draining, .. } = self.clone();
        let is_endless = endless::is_endless(request.uri().path());
        Box::pin(async move {
            let response = pass(&host, request).await.unwrap_or_else(Status::into_http);
            if !is_endless {
                return Ok(response);
            }
            let stopping = status(Reason::HostUnavailable, "the host's agent is stopping, try again");
            Ok(endless::until(response, draining, stopping))
        })
    }
}

async fn pass(host: &Host, request: Request<Body>) -> Result<Response<Body>, Status> {
    let sandbox =
        request.headers().get(SANDBOX_ID_HEADER).and_then(|value| value.to_str().ok()).ok_or_else(|| {
            status(Reason::InvalidArgument, format!("metadata {SANDBOX_ID_HEADER} is missing"))
        })?;
    let sandbox = parse_sandbox(sandbox)?;
    let vm = host.find(&sandbox).ok_or_else(|| unknown(&sandbox))?;
    let (guest, call) = vm.open_call().map_err(|error| match error {
        VmError::Denied(_) => status(Reason::SandboxDeleted, format!("sandbox {sandbox} is deleted")),
        error => vm_status(&error),
    })?;

    let response = relay(guest, request, call).await;
    if Status::from_header_map(response.headers()).is_some_and(|status| status.code() == Code::Unavailable)
        && let Ok(lost) = timeout(LOSS_SHOWS_WITHIN, stopped(vm.clone())).await
    {
        return Err(lost);
    }
    Ok(response.map(|body| Body::new(Held { body, lost: Box::pin(stopped(vm)), ended: false })))
}

/// Waits until the VM no longer runs, and words it for the caller.
async fn stopped(vm: Vm) -> Status {
    let state = vm.stopped().await;
    let sandbox = &vm.owner().sandbox;
    match state.phase {
        Phase::Failed => {
            let failure = state.failure.as_deref().unwrap_or("unknown").to_owned();
            vm_status(&VmError::Lost(failure.into()))
        }
        Phase::Hibernating | Phase::Hibernated | Phase::Waking => {
            status(Reason::Interrupted, format!("sandbox {sandbox} was hibernated meanwhile"))
        }
        _ => status(Reason::SandboxDeleted, format!("sandbox {sandbox} was deleted")),
    }
}

/// The body of an answer, which ends as its VM does.
struct Held {
    body: Body,
    lost: BoxFuture<'static, Status>,
    ended: bool,
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        // What the guest did send goes first.
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        let lost = ready!(this.lost.as_mut().poll(cx));
        this.ended = true;
        let mut trailers = HeaderMap::new();
        Poll::Ready(match lost.add_header(&mut trailers) {
            Ok(()) => Some(Ok(Frame::trailers(trailers))),
            Err(_) => Some(Err(lost)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

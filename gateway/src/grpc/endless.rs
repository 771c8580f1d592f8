//! Streams that do not end by themselves: a gateway that goes down ends them, instead of being held up by them until
//! its drain is over. Their callers resume them through another gateway.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body::{Body as HttpBody, Frame};
use oc_mesh::error::{Reason, status};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::body::Body;

use crate::surface::Rpc;

/// RPCs whose streams last until somebody ends them.
const ENDLESS: &[&str] = &[
    "oc.v1.AgentSessionService.AttachAgent",
    "oc.v1.ExecService.AttachExec",
    "oc.v1.FileService.WatchDirectory",
    "oc.v1.PortService.ForwardPort",
    "oc.v1.SandboxService.WatchSandbox",
];

/// Whether the answers of an RPC do not end by themselves.
#[must_use]
pub fn is_endless(rpc: &Rpc) -> bool {
    ENDLESS.contains(&rpc.method.full_name())
}

/// The same answer, that ends with `HOST_UNAVAILABLE` at the latest when `stop` is cancelled.
#[must_use]
pub fn until(response: Response<Body>, stop: CancellationToken) -> Response<Body> {
    response.map(|body| Body::new(Until { body: Some(body), stop: Box::pin(stop.cancelled_owned()) }))
}

struct Until {
    body: Option<Body>,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl HttpBody for Until {
    type Data = Bytes;
    type Error = <Body as HttpBody>::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        if this.stop.as_mut().poll(context).is_pending() {
            return Pin::new(body).poll_frame(context);
        }
        // Dropping the body cancels what produces it.
        this.body = None;
        let stopping = status(Reason::HostUnavailable, "the gateway is stopping, try again");
        let trailers = stopping.into_http::<Body>().into_parts().0.headers;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, StreamBody};
    use oc_mesh::error::reason_of;
    use tonic::Status;

    use super::*;
    use crate::surface::Surface;

    #[tokio::test]
    async fn a_stream_ends_with_its_gateway() {
        let silent = futures_util::stream::pending::<Result<Frame<Bytes>, Status>>();
        let stop = CancellationToken::new();
        let response = until(Response::new(Body::new(StreamBody::new(silent))), stop.clone());
        stop.cancel();
        let ended = response.into_body().collect().await.unwrap();
        let error = Status::from_header_map(ended.trailers().unwrap()).unwrap();
        assert_eq!(reason_of(&error).as_deref(), Some("HOST_UNAVAILABLE"));
    }

    #[test]
    fn every_endless_rpc_exists() {
        let surface = Surface::load().unwrap();
        let found: Vec<_> = surface.rpcs().filter(|rpc| is_endless(rpc)).collect();
        assert_eq!(found.len(), ENDLESS.len());
        assert!(found.iter().all(|rpc| rpc.method.is_server_streaming()));
    }
}

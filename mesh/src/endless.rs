//! Streams that do not end by themselves: a part that goes down ends them, instead of being held up by them until its
//! grace is over. Their callers resume them through another part, or once this one is back.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body::{Body as HttpBody, Frame};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, body::Body};

/// RPCs whose streams last until somebody ends them, by their gRPC paths.
pub const ENDLESS: &[&str] = &[
    "/oc.v1.AgentSessionService/AttachAgent",
    "/oc.v1.ExecService/AttachExec",
    "/oc.v1.FileService/WatchDirectory",
    "/oc.v1.PortService/ForwardPort",
    "/oc.v1.SandboxService/WatchSandbox",
];

/// Whether the answers of the RPC with this path do not end by themselves.
#[must_use]
pub fn is_endless(path: &str) -> bool {
    ENDLESS.contains(&path)
}

/// The same answer, that ends with `end` at the latest when `stop` is cancelled.
#[must_use]
pub fn until(response: Response<Body>, stop: CancellationToken, end: Status) -> Response<Body> {
    response.map(|body| Body::new(Until { body: Some(body), stop: Box::pin(stop.cancelled_owned()), end }))
}

struct Until {
    body: Option<Body>,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    end: Status,
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
        let trailers = this.end.clone().into_http::<Body>().into_parts().0.headers;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, StreamBody};
    use prost::Message as _;

    use super::*;
    use crate::error::{Reason, reason_of, status};

    #[tokio::test]
    async fn a_stream_ends_with_who_passes_it_on() {
        let silent = futures_util::stream::pending::<Result<Frame<Bytes>, Status>>();
        let (stop, end) = (CancellationToken::new(), status(Reason::HostUnavailable, "stopping"));
        let response = until(Response::new(Body::new(StreamBody::new(silent))), stop.clone(), end);
        stop.cancel();
        let ended = response.into_body().collect().await.unwrap();
        let error = Status::from_header_map(ended.trailers().unwrap()).unwrap();
        assert_eq!(reason_of(&error).as_deref(), Some("HOST_UNAVAILABLE"));
    }

    #[test]
    fn every_endless_rpc_exists() {
        let descriptors = prost_types::FileDescriptorSet::decode(oc_proto::DESCRIPTORS).unwrap();
        let mut found = Vec::new();
        for file in &descriptors.file {
            for service in &file.service {
                for method in service.method.iter().filter(|method| method.server_streaming()) {
                    found.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
        assert!(ENDLESS.iter().all(|path| is_endless(path) && found.iter().any(|found| found == path)));
    }
}

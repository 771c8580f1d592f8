//! Sheds load: what exceeds the limit is refused at once with `OVERLOADED` instead of waiting for ever.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, body::Body};
use tower::{BoxError, Layer, Service};

use super::observed::{Observed, Observer};
use crate::error::{Reason, status};

/// Adds [`Concurrency`]; all services made by one layer share its limit.
#[derive(Clone, Debug)]
pub struct ConcurrencyLayer(Arc<Semaphore>);

impl ConcurrencyLayer {
    /// At most `limit` calls at once, streams counted until their end.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Semaphore::new(limit)))
    }
}

impl<S> Layer<S> for ConcurrencyLayer {
    type Service = Concurrency<S>;

    fn layer(&self, inner: S) -> Concurrency<S> {
        Concurrency { inner, permits: Arc::clone(&self.0) }
    }
}

/// Limits the calls of the service inside.
#[derive(Clone, Debug)]
pub struct Concurrency<S> {
    inner: S,
    permits: Arc<Semaphore>,
}

/// Held until the call is over.
struct Permit(#[allow(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl Observer for Permit {
    fn ended(&mut self, _: Code) {}
}

impl<S, B, R> Service<Request<B>> for Concurrency<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    R: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            let refusal = status(Reason::Overloaded, "too many calls at once, try again");
            return Box::pin(async move { Ok(refusal.into_http()) });
        };
        let response = self.inner.call(request);
        Box::pin(async move {
            let (parts, body) = response.await?.into_parts();
            let body = Observed::new(body, &parts.headers, Permit(permit));
            Ok(Response::from_parts(parts, Body::new(body)))
        })
    }
}

#[cfg(test)]
mod tests {
    use tower::{ServiceExt as _, service_fn};

    use super::*;
    use crate::error::reason_of;

    #[tokio::test]
    async fn the_call_beyond_the_limit_is_refused_and_a_finished_one_makes_room() {
        let inner = service_fn(|_: Request<Body>| async {
            Ok::<_, BoxError>(Response::new(Body::new(http_body_util::Full::new(Bytes::from_static(b"x")))))
        });
        let service = ConcurrencyLayer::new(1).layer(inner);
        let first = service.clone().oneshot(Request::new(Body::empty())).await.unwrap();

        let second = service.clone().oneshot(Request::new(Body::empty())).await.unwrap();
        let refusal = tonic::Status::from_header_map(second.headers()).unwrap();
        assert_eq!(reason_of(&refusal).as_deref(), Some("OVERLOADED"));

        drop(first);
        let third = service.oneshot(Request::new(Body::empty())).await.unwrap();
        assert!(tonic::Status::from_header_map(third.headers()).is_none());
    }
}

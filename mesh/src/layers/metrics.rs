//! Counts calls: `oc_grpc_{server,client}_calls_total{method,code}`, `…_in_flight`, `…_duration_seconds{method}`.
//!
//! The label `method` is a method of our contract or `other`: callers cannot make labels.

use std::{
    collections::HashSet,
    sync::LazyLock,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body::Body as HttpBody;
use metrics::{counter, gauge, histogram};
use prost::Message as _;
use tokio::time::Instant;
use tonic::{Code, body::Body};
use tower::{BoxError, Layer, Service};

use super::observed::{Observed, Observer};

/// Full paths (`/package.Service/Method`) of all methods in the contract.
static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let descriptors = prost_types::FileDescriptorSet::decode(oc_proto::DESCRIPTORS).unwrap_or_default();
    let mut methods = HashSet::new();
    for file in &descriptors.file {
        for service in &file.service {
            for method in &service.method {
                methods.insert(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    methods
});

/// The method as a label.
fn label(path: &str) -> &'static str {
    METHODS.get(path).map_or("other", |method| method.trim_start_matches('/'))
}

/// Adds [`Metrics`].
#[derive(Clone, Copy, Debug)]
pub struct MetricsLayer(Side);

#[derive(Clone, Copy, Debug)]
struct Side {
    calls: &'static str,
    in_flight: &'static str,
    duration: &'static str,
}

impl MetricsLayer {
    /// For calls that we answer.
    pub fn server() -> Self {
        Self(Side {
            calls: "oc_grpc_server_calls_total",
            in_flight: "oc_grpc_server_in_flight",
            duration: "oc_grpc_server_duration_seconds",
        })
    }

    /// For calls that we make.
    pub fn client() -> Self {
        Self(Side {
            calls: "oc_grpc_client_calls_total",
            in_flight: "oc_grpc_client_in_flight",
            duration: "oc_grpc_client_duration_seconds",
        })
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Metrics<S>;

    fn layer(&self, inner: S) -> Metrics<S> {
        Metrics { inner, side: self.0 }
    }
}

/// Counts the calls of the service inside.
#[derive(Clone, Debug)]
pub struct Metrics<S> {
    inner: S,
    side: Side,
}

impl<S, B, R> Service<Request<B>> for Metrics<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
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
        let call = Call::begin(self.side, label(request.uri().path()));
        let response = self.inner.call(request);
        Box::pin(async move {
            match response.await {
                Ok(response) => {
                    let (parts, body) = response.into_parts();
                    let body = Observed::new(body, &parts.headers, call);
                    Ok(Response::from_parts(parts, Body::new(body)))
                }
                Err(error) => {
                    let mut call = call;
                    call.ended(Code::Unavailable);
                    Err(error)
                }
            }
        })
    }
}

/// One call that is being counted.
struct Call {
    side: Side,
    method: &'static str,
    begun: Instant,
    code: Code,
}

impl Call {
    fn begin(side: Side, method: &'static str) -> Self {
        gauge!(side.in_flight).increment(1);
        // Until it is known otherwise: what is dropped halfway was cancelled.
        Self { side, method, begun: Instant::now(), code: Code::Cancelled }
    }
}

impl Observer for Call {
    fn ended(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let elapsed: Duration = self.begun.elapsed();
        gauge!(self.side.in_flight).decrement(1);
        counter!(self.side.calls, "method" => self.method, "code" => format!("{:?}", self.code)).increment(1);
        histogram!(self.side.duration, "method" => self.method).record(elapsed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_methods_of_the_contract_become_labels() {
        assert_eq!(label("/oc.v1.ExecService/Run"), "oc.v1.ExecService/Run");
        assert_eq!(label("/oc.v1.ExecService/Made-up"), "other");
        assert_eq!(label("/"), "other");
    }
}

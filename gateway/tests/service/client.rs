//! A plain HTTP client over either version, that adds nothing to what it is told to send.

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use prost_reflect::DynamicMessage;
use serde_json::Value;
use tonic::{Status, body::Body};

use crate::mesh::Mesh;

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {:?}", self.body))
    }

    /// Status and code of an error.
    pub fn error(&self) -> (u16, String) {
        let json = self.json();
        assert!(json["error"].as_str().is_some_and(|text| !text.is_empty()), "{json}");
        (self.status.as_u16(), json["code"].as_str().unwrap_or_default().to_owned())
    }
}

pub fn client(http2: bool) -> Client<hyper_util::client::legacy::connect::HttpConnector, Body> {
    Client::builder(TokioExecutor::new()).http2_only(http2).pool_max_idle_per_host(0).build_http()
}

impl Mesh {
    pub fn request(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Body) -> Request<Body> {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(body).unwrap()
    }

    /// A request as it is, over HTTP/1.1.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let body = Body::new(Full::new(body.into()));
        collect(client(false).request(self.request(method, path, headers, body)).await.unwrap()).await
    }

    /// A request with the key of `ours`.
    pub async fn call(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Answer {
        self.send(method, path, &[("x-api-key", &self.key), ("content-type", "application/json")], body).await
    }

    /// Runs a command in our sandbox.
    pub async fn run(&self, body: Value) -> Answer {
        self.call(
            Method::POST,
            &format!("/api/sandboxes/{}/exec/run", crate::mesh::SANDBOX),
            body.to_string(),
        )
        .await
    }

    /// A gRPC call with one message; its first status, from headers or trailers.
    pub async fn grpc(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        message: &DynamicMessage,
    ) -> Result<(), Status> {
        let mut request =
            self.request(Method::POST, path, headers, oc_gateway::upstream::one_message(message));
        request.headers_mut().insert(CONTENT_TYPE, "application/grpc".parse().unwrap());
        request.headers_mut().insert("te", "trailers".parse().unwrap());
        let response = client(true).request(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let (parts, body) = response.into_parts();
        let status = match Status::from_header_map(&parts.headers) {
            Some(status) => status,
            None => {
                let collected = body.collect().await.unwrap();
                Status::from_header_map(collected.trailers().expect("neither trailers nor a status")).unwrap()
            }
        };
        if status.code() == tonic::Code::Ok { Ok(()) } else { Err(status) }
    }
}

pub async fn collect(response: Response<Incoming>) -> Answer {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer { status: parts.status, headers: parts.headers, body }
}

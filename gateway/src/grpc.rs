//! gRPC, passed through on the port that REST has.
//!
//! A call is authenticated by its headers. Which host it goes to, and whether a token is for it, is decided by the
//! sandbox that its [`first_message`] names; the rest of the call is relayed unread. [`endless`] streams end when the
//! gateway goes down. [`local`] answers what the gateway answers itself: health and reflection, open to everyone.

pub mod endless;
pub mod first_message;
pub mod local;

use std::sync::Arc;

use http::{
    HeaderMap, HeaderName, Request, Response,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use oc_mesh::{
    error::{Reason, status},
    relay,
};
use tonic::{Status, body::Body};

use crate::{
    app::App,
    auth::Identity,
    exchange::{Exchange, REQUEST_ID},
    failure::presentable,
    surface::{Backend, Rpc},
    upstream::{Patience, trusted_headers},
};

/// Whether a request is a gRPC call.
#[must_use]
pub fn is_call(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
        // `application/grpc-web` is another protocol.
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// Answers a gRPC call. Errors are answers without a body, their status in the headers.
pub async fn serve(app: &Arc<App>, exchange: &Arc<Exchange>, request: Request<Body>) -> Response<Body> {
    if let Some(service) = local::service(request.uri().path()) {
        exchange.set_route(service);
        exchange.set_quiet();
        return app.local.answer(request).await;
    }
    match pass_through(app, exchange, request).await {
        Ok(response) => response,
        Err(error) => presentable(error).into_http(),
    }
}

async fn pass_through(
    app: &Arc<App>,
    exchange: &Arc<Exchange>,
    request: Request<Body>,
) -> Result<Response<Body>, Status> {
    let rpc = app
        .surface
        .find(request.uri().path())
        .ok_or_else(|| status(Reason::MethodNotAllowed, "there is no such method"))?;
    exchange.set_route(rpc.path.as_str().to_owned());
    let identity = app.auth.identify(request.headers(), None).await?;
    exchange.set_tenant(identity.tenant());
    identity.may_call(rpc)?;

    let (mut parts, mut body) = request.into_parts();
    let mut sandbox = None;
    if let Some(field) = rpc.sandbox_field.as_ref().filter(|_| must_know_sandbox(rpc, &identity)) {
        let (named, replayed) = first_message::read(body, field.number(), &app.budget).await?;
        identity.may_name(&named)?;
        exchange.set_sandbox(&named);
        sandbox = Some(named);
        body = replayed;
    }
    let trusted = trusted_headers(&app.caller(&identity, exchange), sandbox.as_deref());
    let patience = Patience::of(&parts.headers);
    let channel = app.upstreams.choose(rpc, &identity, sandbox.as_deref(), &trusted, patience).await?;
    make_trusted(&mut parts.headers);
    parts.headers.extend(trusted);
    let response = relay::relay(channel, Request::from_parts(parts, body), ()).await;
    // What was refused has its status in the headers, and has changed nothing.
    if Status::from_header_map(response.headers()).is_none() {
        app.catch_up(rpc, sandbox.as_deref()).await;
    }
    Ok(if endless::is_endless(rpc) { endless::until(response, app.draining()) } else { response })
}

fn must_know_sandbox(rpc: &Rpc, identity: &Identity) -> bool {
    rpc.backend == Backend::Host || rpc.changes_previews || matches!(identity, Identity::Sandbox { .. })
}

/// Takes out what only we may say, and what nobody behind the gateway needs to know.
fn make_trusted(headers: &mut HeaderMap) {
    let ours: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("oc-")).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
    for name in [AUTHORIZATION, HeaderName::from_static("x-api-key"), REQUEST_ID] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn only_grpc_is_taken_for_grpc() {
        let is = |value: &'static str| {
            is_call(&[(CONTENT_TYPE, HeaderValue::from_static(value))].into_iter().collect())
        };
        assert!(is("application/grpc") && is("application/grpc+proto") && is("application/grpc; charset=x"));
        assert!(!is("application/grpc-web") && !is("application/json") && !is("application/grpcx"));
    }

    #[test]
    fn nothing_that_only_we_may_say_comes_from_outside() {
        let mut headers: HeaderMap = [
            ("oc-tenant", "root"),
            ("oc-admin", "true"),
            ("oc-sandbox-id", "sb-other"),
            ("authorization", "Bearer x"),
            ("x-api-key", "x"),
            ("user-agent", "curl"),
        ]
        .into_iter()
        .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
        .collect();
        headers.append("oc-tenant", HeaderValue::from_static("again"));
        make_trusted(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["user-agent"]);
    }
}

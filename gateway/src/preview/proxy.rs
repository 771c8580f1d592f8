//! A request to a port, and the port's answer.

use std::sync::Arc;

use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version,
    header::{HOST, SET_COOKIE},
    request::Parts,
};
use http_body::Body as _;
use hyper::{body::Incoming, client::conn::TrySendError};
use oc_mesh::{
    error::{Reason, reason_of, status},
    handoff,
};
use tokio::time::Instant;
use tonic::{Status, body::Body};

use super::{
    Peer,
    connection::{self, Host},
    headers,
    host::{self, Malformed},
    line::{Line, Unanswered},
    page, pool,
    streamed::{Answer, Movement, Upload},
    token,
    tunnel::Tunnel,
    websocket::Opening,
};
use crate::{
    app::App,
    auth::Identity,
    exchange::Exchange,
    failure::presentable,
    sandboxes::Shown,
    upstream::{Patience, trusted_headers},
    ws::handshake::{self, Asks},
};

/// What names these requests in logs and metrics: their paths are their sandboxes' own.
const ROUTE: &str = "preview";

/// Answers a request to a preview.
pub async fn serve(
    app: &Arc<App>,
    exchange: &Arc<Exchange>,
    place: Result<host::Place, Malformed>,
    request: Request<Body>,
    peer: &Peer,
) -> Response<Body> {
    exchange.set_route(ROUTE);
    let html = page::wants_html(request.headers());
    let asks = handshake::asks(&request);
    let passed = async {
        let place = place.map_err(|error| status(Reason::InvalidArgument, error.to_string()))?;
        let (mut parts, body) = request.into_parts();
        let to = To::find(app, exchange, place, &mut parts).await?;
        to.pass(parts, body, peer, asks).await
    };
    match Box::pin(passed).await {
        Ok(response) => response,
        Err(error) => page::answer(&presentable(error), html, exchange.request_id()),
    }
}

/// Answers a request to a preview that cannot be passed on, whatever it is for.
pub fn refuse(exchange: &Exchange, error: &Status, headers: &HeaderMap) -> Response<Body> {
    exchange.set_route(ROUTE);
    page::answer(error, page::wants_html(headers), exchange.request_id())
}

/// Marks an error that is a port's own.
#[derive(Debug, Clone, Copy)]
pub struct OfPort;

/// A port that a request may be passed on to.
struct To<'a> {
    app: &'a Arc<App>,
    exchange: &'a Arc<Exchange>,
    shown: Shown,
    port: u16,
}

impl<'a> To<'a> {
    /// The port, once the token was shown that it asks for.
    async fn find(
        app: &'a Arc<App>,
        exchange: &'a Arc<Exchange>,
        place: host::Place,
        parts: &mut Parts,
    ) -> Result<Self, Status> {
        let nowhere = || status(Reason::PreviewNotFound, "no port of a sandbox is reached by this host name");
        let (sandbox_id, port, domain) = match place {
            host::Place::Port { sandbox_id, port } => (sandbox_id, Some(port), None),
            host::Place::Own { sandbox_id, domain } => (sandbox_id, None, Some(domain)),
            host::Place::Nowhere => return Err(nowhere()),
        };
        let shown = app.upstreams.sandboxes().shown(&sandbox_id).await?;
        let port = match domain {
            Some(domain) => shown.port_of(&domain).ok_or_else(nowhere)?,
            None => port.ok_or_else(nowhere)?,
        };
        // Before anything else is said or done, waking among it.
        token::check(&mut parts.headers, shown.token_hash())?;
        exchange.set_shown(shown.clone());
        Ok(Self { app, exchange, shown, port })
    }

    async fn pass(
        self,
        mut parts: Parts,
        body: Body,
        peer: &Peer,
        asks: Option<Asks>,
    ) -> Result<Response<Body>, Status> {
        let limits = self.app.previews.limits;
        let patience = Patience::of(&parts.headers);
        let authority = match parts.uri.authority() {
            Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
            None => parts.headers.get(HOST).cloned(),
        };
        let authority = authority.unwrap_or_else(|| HeaderValue::from_static(""));
        let has_body = !body.is_end_stream();
        let request_id = self.exchange.request_id_header();
        headers::to_port(&mut parts.headers, &authority, peer, request_id);
        let room = asks.map(|_| self.app.websockets.place()).transpose()?;
        let opening = asks.map(|asks| Opening::ask(asks, &mut parts));
        parts.uri = target(&parts.uri);
        parts.version = Version::HTTP_11;
        let client = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
        parts.extensions = http::Extensions::new();

        // Nobody uses a sandbox that is gone, by a connection that is still there either.
        self.app.upstreams.sandboxes().check(&self.shown).await?;
        let place = self.app.previews.pool.place(self.shown.sandbox_id(), self.port).await?;
        let movement = has_body.then(Movement::default);
        let upload = movement.clone().map_or_else(Upload::empty, |movement| Upload::new(body, movement));
        let request = Request::from_parts(parts, upload);
        let (line, mut answer) = self.send(&place, request, patience, movement.as_ref()).await?;
        if answer.headers().contains_key(SET_COOKIE) && self.app.previews.hosts.is_among_others(&authority) {
            headers::keep_cookies_here(answer.headers_mut(), &authority);
        }

        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let (Some(opening), Some(room), Some(client)) = (opening, room, client) else {
                return Err(self.reset("switched protocols without being asked"));
            };
            let response = opening.opened(answer.headers()).map_err(|problem| self.reset(problem))?;
            let exchange = Arc::clone(self.exchange);
            let tunnel = Tunnel { client, line, answer, place, room, silence: limits.silence, exchange };
            let stop = self.app.draining();
            self.app.previews.tasks.spawn(tunnel.run(stop));
            return Ok(response);
        }
        // To the client a success would be the beginning of a WebSocket.
        if matches!(opening, Some(Opening::Connect { .. })) && answer.status().is_success() {
            return Err(self.reset("opened no WebSocket"));
        }
        headers::remove_hop_by_hop(answer.headers_mut());
        let (mut head, incoming) = answer.into_parts();
        head.version = Version::default();
        head.extensions = http::Extensions::new();
        if head.status.is_client_error() || head.status.is_server_error() {
            head.extensions.insert(OfPort);
        }
        let answer = Answer::new(incoming, place.with(line), movement, limits.silence);
        Ok(Response::from_parts(head, Body::new(answer)))
    }

    /// Sends a request by a connection that was kept, or by a new one. One that turns out to have been ended by the port while it
    /// was kept is replaced, if the port has not seen the request or may see it twice.
    async fn send(
        &self,
        place: &pool::Place,
        mut request: Request<Upload>,
        patience: Patience,
        movement: Option<&Movement>,
    ) -> Result<(Line, Response<Incoming>), Status> {
        let limits = self.app.previews.limits;
        loop {
            let kept = place.kept().await;
            let is_kept = kept.is_some();
            let mut line = match kept {
                Some(line) => line,
                None => self.connect(patience).await?,
            };
            let may_repeat = is_kept && movement.is_none() && request.method().is_idempotent();
            let again = may_repeat.then(|| copy(&request));
            let asked = Instant::now();
            let until = || movement.map_or(asked, |movement| asked.max(movement.last())) + limits.answer;
            match line.send(request, until).await {
                Ok(answer) => return Ok((line, answer)),
                Err(Unanswered::Broken(error)) => request = self.may_repeat(*error, is_kept, again)?,
                Err(Unanswered::Late) => return Err(self.late(movement, &line)),
            }
        }
    }

    /// Why there is no answer in time: the port cannot answer what the client does not send.
    fn late(&self, movement: Option<&Movement>, line: &Line) -> Status {
        let within = self.app.previews.limits.answer.as_secs();
        if movement.is_some_and(Movement::is_awaited) && !line.has_unsent() {
            let text = format!("nothing more of the request came within {within} s");
            return status(Reason::RequestTimeout, text);
        }
        status(Reason::DeadlineExceeded, format!("port {}: no answer within {within} s", self.port))
    }

    fn may_repeat(
        &self,
        mut error: TrySendError<Request<Upload>>,
        is_kept: bool,
        again: Option<Request<Upload>>,
    ) -> Result<Request<Upload>, Status> {
        let unsent = error.take_message().filter(|_| is_kept);
        let error = error.into_error();
        if error.is_user() {
            return Err(status(Reason::InvalidArgument, "the request's body broke off, or is malformed"));
        }
        // What does not speak HTTP does not speak it on a new connection either.
        let broke = !error.is_parse();
        match unsent.or_else(|| again.filter(|_| broke)) {
            Some(request) => Ok(request),
            None => {
                tracing::debug!(%error, port = self.port, request_id = self.exchange.request_id(), "no answer");
                Err(self.reset(if broke {
                    "the connection broke before an answer"
                } else {
                    "what answers does not speak HTTP/1.1"
                }))
            }
        }
    }

    fn reset(&self, text: &str) -> Status {
        status(Reason::PortReset, format!("port {}: {text}", self.port))
    }

    /// A new connection. A sandbox that sleeps is woken.
    async fn connect(&self, patience: Patience) -> Result<Line, Status> {
        let sandbox_id = self.shown.sandbox_id();
        let identity =
            Identity::Sandbox { tenant: self.shown.tenant().to_owned(), sandbox_id: sandbox_id.to_owned() };
        let trusted = trusted_headers(&self.app.caller(&identity, self.exchange), Some(sandbox_id));
        let upstreams = &self.app.upstreams;
        let within = self.app.previews.limits.connect;
        let open = async || {
            let endpoint = upstreams.host(&identity, sandbox_id, &trusted, patience).await?;
            let handoffs = endpoint.parse().ok().and_then(|endpoint| handoff::socket_of(&endpoint));
            let host = Host { channel: upstreams.channel(&endpoint)?, handoffs };
            connection::open(host, sandbox_id, self.port, trusted.clone(), within).await
        };
        let stream = match open().await {
            // It fell asleep on the way there.
            Err(error) if reason_of(&error).as_deref() == Some(Reason::SandboxHibernated.as_str()) => {
                upstreams.wake(sandbox_id, &trusted, patience).await?;
                open().await
            }
            opened => opened,
        }
        .map_err(|error| self.told(error))?;
        Line::new(stream).await.map_err(|error| self.reset(&format!("no connection: {error}")))
    }

    /// The error, in words for who does not know the sandbox.
    fn told(&self, error: Status) -> Status {
        match reason_of(&error).as_deref() {
            Some(reason) if reason == Reason::PortNotListening.as_str() => {
                let text =
                    format!("Nobody listens on port {} in this sandbox. Start a server there.", self.port);
                status(Reason::PortNotListening, text)
            }
            _ => error,
        }
    }
}

/// The same request, which has no body.
fn copy(request: &Request<Upload>) -> Request<Upload> {
    let mut copy = Request::new(Upload::empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    copy
}

/// The target as a port gets it: path and query alone.
fn target(uri: &Uri) -> Uri {
    uri.path_and_query().map_or_else(|| Uri::from_static("/"), |path| path.clone().into())
}

//! REST, projected from the contract: one generic transcoder, no handler for any route.
//!
//! In reading order: a request's method and path find a [`route`], made of the RPC's HTTP rule; [`request`] turns
//! path, query and JSON [`json`] into the RPC's message; the call goes to the part that answers it; the answer is
//! shown by [`answer`]. Raw bytes stream in by [`upload`] and out by [`download`]. Callers have a credential, but for those
//! who have a [`file_url`].

pub mod answer;
pub mod download;
pub mod json;
pub mod progress;
pub mod request;
pub mod route;
pub mod template;
pub mod upload;

use std::{sync::Arc, time::Duration};

use http::{Request, Response, StatusCode, request::Parts};
use oc_mesh::{
    channel::ClientChannel,
    error::{Reason, reason_of, status},
    file_url::Access,
};
use prost_reflect::{DynamicMessage, FieldDescriptor};
use tonic::{Status, body::Body as HttpBody};

use crate::{
    app::App,
    auth::{Identity, file_url},
    budget::Held,
    compat::{accepted, slow_answer},
    exchange::Exchange,
    failure::presentable,
    rest::{
        json::Json,
        progress::Progress,
        route::{Body, Match, Route, Routes},
    },
    surface::{Surface, SurfaceError},
    upstream::{self, Patience, trusted_headers},
};

/// How long a call with one answer may take. Creating a sandbox by a cold boot is the slowest.
const DEADLINE: Duration = Duration::from_secs(120);

/// The transcoder.
#[derive(Debug)]
pub struct Rest {
    routes: Routes,
    json: Json,
}

impl Rest {
    /// Reads the routes out of the contract.
    ///
    /// # Errors
    /// The contract holds an HTTP rule that cannot be served.
    pub fn new(surface: &Surface) -> Result<Self, SurfaceError> {
        Ok(Self { routes: Routes::new(surface)?, json: Json::new(surface)? })
    }
}

/// Answers a REST request.
pub async fn serve(
    app: &Arc<App>,
    exchange: &Arc<Exchange>,
    request: Request<HttpBody>,
) -> Response<HttpBody> {
    let (parts, body) = request.into_parts();
    let (route, path) = match app.rest.routes.find(&parts.method, parts.uri.path()) {
        Match::Found(route, path) => (route, path),
        Match::WrongMethod(allowed) => return answer::method_not_allowed(&parts.method, &allowed),
        Match::NotFound => return answer::route_not_found(),
        Match::NotUtf8(field) => {
            let text = format!("`{}` in the path is not UTF-8", field.json_name());
            return answer::error(&status(Reason::InvalidArgument, text));
        }
    };
    exchange.set_route(route.template.clone());
    let call = Call { app, exchange, route, path };
    match call.serve(&parts, body).await {
        Ok(response) => response,
        Err(error) => answer::error(&presentable(error)),
    }
}

/// One call of an RPC by one of its routes.
struct Call<'a> {
    app: &'a Arc<App>,
    exchange: &'a Arc<Exchange>,
    route: Arc<Route>,
    path: Vec<(FieldDescriptor, String)>,
}

impl Call<'_> {
    async fn serve(self, parts: &Parts, body: HttpBody) -> Result<Response<HttpBody>, Status> {
        let query = parts.uri.query();
        let (identity, by_url) = match file_url::access(&parts.method, &self.route) {
            Some(access) => {
                let (identity, message) = self.by_url(access, query).await?;
                (identity, Some(message))
            }
            None => (self.app.auth.identify(&parts.headers, query).await?, None),
        };
        self.exchange.set_tenant(identity.tenant());
        identity.may_call(&self.route.rpc)?;
        // A wrong sandbox is refused before its body is read.
        for (field, text) in &self.path {
            if Some(field) == self.route.rpc.sandbox_field.as_ref() {
                identity.may_name(text)?;
            }
        }
        match self.route.request_body.clone() {
            Body::Raw(field) => {
                let head = match by_url {
                    Some(message) => message,
                    None => request::without_body(&self.app.rest.json, &self.route, &self.path, query)?,
                };
                self.upload(&identity, &field, head, parts, body).await
            }
            _ => {
                let (message, held) = match by_url {
                    Some(message) => (message, Held::default()),
                    None => {
                        let read = request::with_body(self.app, &self.route, &self.path, query, body);
                        timed(Some(DEADLINE), read).await?
                    }
                };
                let sent = Sent::new(&self, &identity, &message, Patience::of(&parts.headers)).await?;
                match self.route.response_body.clone() {
                    Body::Raw(field) => {
                        // Bounds the wait for the first byte; the others come as fast as they are read.
                        timed(Some(DEADLINE), async {
                            let answers = sent.call_with(None, &message).await?;
                            let answers = upstream::messages(&self.route.rpc, answers);
                            download::answer(self.route.rpc.success, &message, &field, answers).await
                        })
                        .await
                    }
                    _ => self.unary(sent, message, held).await,
                }
            }
        }
    }

    /// Whom a URL that is signed for this route acts for, and what it asks for.
    async fn by_url(
        &self,
        access: Access,
        query: Option<&str>,
    ) -> Result<(Identity, DynamicMessage), Status> {
        let named = self.path.iter().find(|(field, _)| Some(field) == self.route.rpc.sandbox_field.as_ref());
        let sandbox = named.map(|(_, text)| text.as_str()).unwrap_or_default();
        let sandboxes = self.app.upstreams.sandboxes();
        self.app.file_urls.verify(sandboxes, access, sandbox, query, &self.route).await
    }

    /// One message there, one back.
    async fn unary(
        self,
        sent: Sent,
        message: DynamicMessage,
        held: Held,
    ) -> Result<Response<HttpBody>, Status> {
        let success = self.route.rpc.success;
        let slow = slow_answer::applies_to(&self.route.rpc);
        let deadline = if slow { slow_answer::budget(&message) } else { Some(DEADLINE) };
        let app = Arc::clone(self.app);
        let route = self.route;
        let call = async move {
            let answer = sent.call_with(deadline, &message).await?;
            // Whoever answers has read the request.
            drop((message, held));
            show(&app, &route, answer).await
        };
        if slow {
            let pending =
                Box::pin(
                    async move { timed(deadline, call).await.map(|(_, shown)| shown).map_err(presentable) },
                );
            return Ok(slow_answer::answer(success, pending).await);
        }
        let (code, shown) = timed(deadline, call).await?;
        Ok(answer::json(code, shown))
    }

    /// Raw bytes there, one message back.
    async fn upload(
        self,
        identity: &Identity,
        field: &FieldDescriptor,
        head: DynamicMessage,
        parts: &Parts,
        body: HttpBody,
    ) -> Result<Response<HttpBody>, Status> {
        let sent = Sent::new(&self, identity, &head, Patience::of(&parts.headers)).await?;
        let broken = upload::Broken::default();
        let progress = Progress::default();
        let body = upload::stream(&head, field, body, Arc::clone(&broken), progress.clone());
        let call = async { show(self.app, &self.route, sent.call(None, body).await?).await };
        let outcome = tokio::select! {
            outcome = call => outcome,
            stalled = progress.stalled() => Err(stalled),
        };
        // The transport only knows that the body broke; the body knows why.
        let (code, shown) = outcome.map_err(|error| broken.get().cloned().unwrap_or(error))?;
        Ok(answer::json(code, shown))
    }
}

/// A call that is authorised and has somewhere to go.
struct Sent {
    app: Arc<App>,
    channel: ClientChannel,
    headers: http::HeaderMap,
    route: Arc<Route>,
    sandbox: Option<String>,
    patience: Patience,
}

impl Sent {
    async fn new(
        call: &Call<'_>,
        identity: &Identity,
        message: &DynamicMessage,
        patience: Patience,
    ) -> Result<Self, Status> {
        let rpc = &call.route.rpc;
        let named = rpc.sandbox_field.as_ref().map(|field| message.get_field(field));
        let sandbox = named.as_deref().and_then(prost_reflect::Value::as_str);
        if let Some(sandbox) = sandbox {
            identity.may_name(sandbox)?;
            call.exchange.set_sandbox(sandbox);
        }
        let headers = trusted_headers(&call.app.caller(identity, call.exchange), sandbox);
        let channel = call.app.upstreams.choose(rpc, identity, sandbox, &headers, patience).await?;
        Ok(Self {
            app: Arc::clone(call.app),
            channel,
            headers,
            route: Arc::clone(&call.route),
            sandbox: sandbox.map(str::to_owned),
            patience,
        })
    }

    async fn call(&self, deadline: Option<Duration>, body: HttpBody) -> Result<HttpBody, Status> {
        let (channel, headers) = (self.channel.clone(), self.headers.clone());
        upstream::call(channel, &self.route.rpc, headers, deadline, body).await
    }

    /// Sends one message; once more if its sandbox hibernated on the way there, and nothing was done with it.
    async fn call_with(
        &self,
        deadline: Option<Duration>,
        message: &DynamicMessage,
    ) -> Result<HttpBody, Status> {
        let answer = self.call(deadline, upstream::one_message(message)).await;
        match (&answer, &self.sandbox) {
            (Err(error), Some(sandbox)) if is_hibernated(error) => {
                self.app.upstreams.wake(sandbox, &self.headers, self.patience).await?;
                self.call(deadline, upstream::one_message(message)).await
            }
            (Ok(_), sandbox) => {
                self.app.catch_up(&self.route.rpc, sandbox.as_deref()).await;
                answer
            }
            _ => answer,
        }
    }
}

fn is_hibernated(error: &Status) -> bool {
    reason_of(error).is_some_and(|reason| reason == Reason::SandboxHibernated.as_str())
}

/// Reads the answer and shows it as JSON, with its status.
async fn show(app: &App, route: &Route, answer: HttpBody) -> Result<(StatusCode, answer::Text), Status> {
    let (message, mut held) = upstream::answer::read(answer, &app.budget).await?;
    let code = accepted::status(&route.rpc, &message);
    if code == StatusCode::NO_CONTENT {
        return Ok((code, answer::Text::default()));
    }
    let output = route.rpc.method.output();
    let shown = match &route.response_body {
        Body::Field(field) => app.rest.json.encode_field(output, message, field),
        Body::Message | Body::None | Body::Raw(_) => app.rest.json.encode(output, message),
    };
    match shown {
        Ok(text) => {
            held.shrink(text.len());
            Ok((code, answer::Text { text, held }))
        }
        Err(error) => {
            tracing::error!(%error, rpc = route.rpc.path.as_str(), "an answer has no JSON form");
            Err(status(Reason::Internal, "the answer cannot be shown as JSON"))
        }
    }
}

async fn timed<T>(
    deadline: Option<Duration>,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match deadline {
        None => call.await,
        Some(deadline) => tokio::time::timeout(deadline, call)
            .await
            .unwrap_or_else(|_| Err(status(Reason::DeadlineExceeded, "the call took too long"))),
    }
}

//! Live streams for clients that speak WebSocket rather than gRPC: each connection is an attachment to a session.
//!
//! In reading order: a request whose [`path`] names a session and which [`handshake`] finds in order is attached on
//! behalf of its caller ([`attach`], over one call to the [`host`]) before it is switched over, so that whoever may not
//! attach is refused with an HTTP status. Then one task pumps between the [`socket`] and the host: [`resumed`] for the
//! framing of the [`published`] clients, which cannot resume, and [`relayed`] for the contract's own messages. In the
//! end there is a [`closing`] code and one line of [`report`].
//!
//! What is decided is decided by functions of values: [`published`], [`cut`], [`stdin`], [`output`], [`liveness`],
//! [`closing`]. docs/websocket.md describes all of it to users.

pub mod attach;
pub mod closing;
pub mod cut;
pub mod handshake;
pub mod host;
pub mod liveness;
pub mod output;
pub mod path;
pub mod published;
pub mod relayed;
pub mod report;
pub mod resumed;
pub mod socket;
pub mod stdin;

use std::{sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::upgrade::OnUpgrade;
use oc_mesh::error::{Reason, status};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tonic::{Status, body::Body};

use self::{
    attach::Target,
    handshake::{Asks, Framing, Refusal},
    path::{Named, NotUtf8},
    relayed::Relayed,
    report::Report,
    resumed::{Name, Resumed},
    socket::Socket,
};
use crate::{
    app::App,
    exchange::Exchange,
    failure::presentable,
    rest::answer,
    upstream::{Patience, trusted_headers},
};

/// The RPC behind every stream.
const ATTACH: &str = "/oc.v1.ExecService/AttachExec";
/// Longest ID of a session that is looked for.
const MAX_SESSION_ID: usize = 128;
/// How long a connection may take to be switched over once that was answered.
const SWITCHES_WITHIN: Duration = Duration::from_secs(30);

/// Limits of all WebSockets.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// WebSockets at the same time; more are refused as `OVERLOADED`.
    pub max: usize,
    /// How long silences may be.
    pub patience: liveness::Patience,
    /// For how long the gateway tries to attach again for a client that cannot, and the session waits for it.
    pub resume: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max: 16_384, patience: liveness::Patience::default(), resume: Duration::from_secs(15) }
    }
}

/// All WebSockets of a gateway.
#[derive(Debug)]
pub struct WebSockets {
    limits: Limits,
    places: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl WebSockets {
    /// None yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, places: Arc::new(Semaphore::new(limits.max)), tasks: TaskTracker::new() }
    }

    /// Waits until all have ended; they end by themselves once the gateway is told to stop. The server's own drain does
    /// not know of connections that were switched over.
    pub async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// A place for one more.
    ///
    /// # Errors
    /// `OVERLOADED`.
    pub fn place(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            metrics::counter!("oc_gateway_shed_total").increment(1);
            status(Reason::Overloaded, "the gateway has as many WebSockets as it can")
        })
    }
}

/// What a request for a WebSocket asks for.
#[derive(Debug)]
pub struct Asked {
    how: Asks,
    session: Result<Named, NotUtf8>,
}

/// The session that a request asks to be attached to; `None` if it does not ask for a WebSocket, or not where streams
/// are: then it is REST's.
pub fn asked<B>(request: &Request<B>) -> Option<Asked> {
    let how = handshake::asks(request)?;
    Some(Asked { how, session: path::find(request.uri().path())? })
}

/// Answers such a request.
pub async fn serve(
    app: &Arc<App>,
    exchange: &Arc<Exchange>,
    asked: Asked,
    request: Request<Body>,
) -> Response<Body> {
    let accepted = match handshake::accept(&request, asked.how) {
        Ok(accepted) => accepted,
        Err(refusal) => {
            let mut response = answer::error(&status(Reason::InvalidArgument, refusal.to_string()));
            if refusal == Refusal::Version {
                handshake::name_the_version(&mut response);
            }
            return response;
        }
    };
    let (framing, subprotocol) = handshake::framing(request.headers());
    // Boxed: requests that are not for a stream should not carry its weight.
    match Box::pin(attach(app, exchange, asked.session, framing, request)).await {
        Ok(()) => handshake::switch(accepted, subprotocol),
        Err(error) => answer::error(&presentable(error)),
    }
}

/// Does all that may be refused, and leaves the rest to a task.
async fn attach(
    app: &Arc<App>,
    exchange: &Arc<Exchange>,
    session: Result<Named, NotUtf8>,
    framing: Framing,
    mut request: Request<Body>,
) -> Result<(), Status> {
    let session = session.map_err(|error| status(Reason::InvalidArgument, error.to_string()))?;
    exchange.set_route(session.route);
    let rpc =
        app.surface.find(ATTACH).ok_or_else(|| status(Reason::Internal, "the contract has no sessions"))?;
    let query = request.uri().query();
    let identity = app.auth.identify(request.headers(), query).await?;
    exchange.set_tenant(identity.tenant());
    identity.may_call(rpc)?;
    identity.may_name(&session.sandbox_id)?;
    exchange.set_sandbox(&session.sandbox_id);
    if session.session_id.len() > MAX_SESSION_ID {
        return Err(status(Reason::SessionNotFound, "there is no such session"));
    }
    let offset = offset(query)?;
    let place = app.websockets.place()?;

    let headers = trusted_headers(&app.caller(&identity, exchange), Some(&session.sandbox_id));
    let target = Target { app: Arc::clone(app), rpc: Arc::clone(rpc), identity, headers, session };
    let target = Arc::new(target);
    let patience = Patience::of(request.headers());
    let limits = app.websockets.limits;
    let stop = app.draining();
    match framing {
        Framing::Published => {
            let name = Name::random();
            let first = host::framed(&target.first_message(name.start(offset, &limits)));
            let attached = target.attach(first, patience).await?;
            let report = Report::begin(&target, framing, exchange.request_id());
            let upgrade = hyper::upgrade::on(&mut request);
            app.websockets.tasks.spawn(async move {
                let _place = place;
                match switched(upgrade, resumed::MAX_MESSAGE).await {
                    Some(socket) => {
                        Resumed::new(socket, target, name, attached, limits, report).run(stop).await;
                    }
                    None => resumed::detach(attached.0).await,
                }
            });
        }
        Framing::Protobuf => {
            // What cannot be used at all is refused before there is a WebSocket.
            target.check().await?;
            let report = Report::begin(&target, framing, exchange.request_id());
            let upgrade = hyper::upgrade::on(&mut request);
            app.websockets.tasks.spawn(async move {
                let _place = place;
                if let Some(socket) = switched(upgrade, relayed::MAX_MESSAGE).await {
                    Relayed::new(socket, target, patience, limits, report).run(stop).await;
                }
            });
        }
    }
    Ok(())
}

async fn switched(upgrade: OnUpgrade, max_message: usize) -> Option<Socket> {
    match tokio::time::timeout(SWITCHES_WITHIN, upgrade).await {
        Ok(Ok(upgraded)) => Some(Socket::new(upgraded, max_message).await),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a connection was not switched over");
            None
        }
        Err(_) => None,
    }
}

/// Where the replay begins: at the parameter `offset`, at the first byte without it.
fn offset(query: Option<&str>) -> Result<u64, Status> {
    let mut pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .rfind(|(name, _)| *name == "offset")
        .map_or(Ok(0), |(_, value)| value.parse())
        .map_err(|_| status(Reason::InvalidArgument, "`offset` must be a whole number of bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_begins_where_the_query_says() {
        assert_eq!(offset(None).unwrap(), 0);
        assert_eq!(offset(Some("token=x&offset=18446744073709551615")).unwrap(), u64::MAX);
        for wrong in ["offset=", "offset=-1", "offset=1e3"] {
            assert!(offset(Some(wrong)).is_err(), "{wrong}");
        }
    }
}

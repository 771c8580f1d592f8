//! The listener: HTTP/1.1 and HTTP/2, with TLS or without, on one port, with limits on everything that a peer can make large
//! or slow.
//!
//! In reading order: each connection gets one of the [`workers`]; [`sniff`] tells the two versions apart, or TLS does, and [`preface`] bounds the beginning of HTTP/2; what is HTTP/1.1 comes through a [`gate`], which knows of each request's
//! [`head`] and [`chunks`] before hyper does, and puts [`short`] answers together; the [`leftover`] of a body that nobody wants is thrown away.
//! An answer of HTTP/2 that its client leaves [`untaken`] is ended.

pub mod chunks;
pub mod gate;
pub mod head;
pub mod leftover;
mod preface;
pub mod short;
mod sniff;
mod untaken;
pub mod workers;

use std::{convert::Infallible, error::Error as _, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use http::Request;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
};
use rustls::ServerConfig;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{either::Either, sync::CancellationToken};

use self::{
    gate::Gate,
    head::Problem,
    preface::Preface,
    sniff::Protocol,
    untaken::Streams,
    workers::{Workers, turn},
};
use crate::{app::App, preview::Peer, timer::ConnectionTimer};

/// How long what a client still sends is thrown away once its request was refused.
pub const LINGER: Duration = Duration::from_secs(2);

/// Limits of one listener.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at the same time, those that became WebSockets not counted. Beyond that, new ones wait in the kernel's
    /// queue.
    pub max_connections: usize,
    /// How long a peer may take for a request's headers. Between two requests of HTTP/1.1 it may say nothing for twice as long.
    pub header_timeout: Duration,
    /// How long a peer may take nothing of what is there for it: of a connection, and of an answer by HTTP/2.
    pub untaken: Duration,
    /// How long requests may go on once the gateway is told to stop.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 8192,
            header_timeout: Duration::from_secs(30),
            untaken: Duration::from_secs(300),
            drain: Duration::from_secs(10),
        }
    }
}

/// Headers of one request of HTTP/2, all together.
const MAX_HEADER_BYTES: u32 = 64 << 10;
/// HTTP/1.1 reads at most this much at once. Uploads profit from more than most requests' heads need.
const HTTP1_BUFFER: usize = head::MAX_BYTES;
/// What one HTTP/2 stream may send before it is read.
const STREAM_WINDOW: u32 = 2 << 20;
/// The same for all streams of a connection together.
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Largest HTTP/2 frame: one piece of a file fits in.
const MAX_FRAME: u32 = 512 << 10;
/// Streams of one HTTP/2 connection at the same time.
const MAX_STREAMS: u32 = 256;
/// Written bytes that a stream's reader may leave unread.
const SEND_BUFFER: usize = 1 << 20;
/// A peer that does not answer a ping for this long is gone.
const PING: Duration = Duration::from_secs(20);

/// Accepts connections for `workers` until `stop`, by TLS if `tls` says how, then lets the requests under way end.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    app: Arc<App>,
    limits: Limits,
    workers: Workers,
    stop: CancellationToken,
) {
    let tls = tls.map(TlsAcceptor::from);
    let connections = Arc::new(Semaphore::new(limits.max_connections));
    let graceful = GracefulShutdown::new();
    let mut tasks = JoinSet::new();
    loop {
        let (stream, peer, permit) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &connections) => accepted,
            // Reaped as they end, so that the set does not grow.
            Some(_) = tasks.join_next() => continue,
        };
        let connection = Connection {
            app: Arc::clone(&app),
            tls: tls.clone(),
            watcher: graceful.watcher(),
            limits: limits.clone(),
        };
        // Where it was accepted it is of no use any more.
        let stream = match stream.into_std() {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be handed on");
                continue;
            }
        };
        let stop = stop.clone();
        let serve = async move {
            let _permit = permit;
            metrics::gauge!("oc_gateway_connections").increment(1);
            match TcpStream::from_std(stream) {
                Ok(stream) => connection.serve(stream, peer, stop).await,
                Err(error) => tracing::warn!(%error, "a connection cannot be watched"),
            }
            metrics::gauge!("oc_gateway_connections").decrement(1);
        };
        tasks.spawn_on(serve, workers.next());
    }
    drop(listener);
    let websockets = Arc::clone(&app);
    let open = tasks.len();
    tracing::info!(connections = open, "draining");
    let ended = async {
        graceful.shutdown().await;
        while tasks.join_next().await.is_some() {}
        websockets.websockets.ended().await;
        websockets.previews.ended().await;
    };
    if tokio::time::timeout(limits.drain, ended).await.is_err() {
        tracing::warn!(connections = tasks.len(), "requests were still under way at the end of the drain");
    }
    tasks.shutdown().await;
    workers.end().await;
}

/// The next connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, Option<OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let permit = Arc::clone(connections).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, permit),
            Err(error) => {
                // Out of file descriptors, most likely: it passes when connections end.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn set_options(stream: &TcpStream, untaken: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // Nothing else would end an answer that is stuck.
    SockRef::from(stream).set_tcp_user_timeout(Some(untaken))
}

/// What is spoken over: TLS has much to keep, which others should not have to make room for.
type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Waits for the beginning of a connection, and of TLS if that is to be spoken, until what comes within is known.
async fn begin(stream: TcpStream, tls: Option<TlsAcceptor>) -> io::Result<(Stream, Protocol)> {
    let Some(acceptor) = tls else {
        let protocol = sniff::protocol(&stream).await?;
        return Ok((Either::Left(stream), protocol));
    };
    if sniff::lacks_tls(&stream).await? {
        return Ok((Either::Left(stream), Protocol::WithoutTls));
    }
    let stream = acceptor.accept(stream).await?;
    let protocol = match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Protocol::Http2,
        _ => Protocol::Http1,
    };
    Ok((Either::Right(Box::new(stream)), protocol))
}

/// What is told of a fault at most: the peer may have words of its own in it.
const MAX_FAULT: usize = 200;

/// What is wrong with a connection of HTTP/2 that has neither broken nor gone silent: what its peer did against the rules, or says that we did.
fn fault(error: &hyper::Error) -> Option<String> {
    let cause = error.source().filter(|cause| !cause.is::<io::Error>() && !error.is_timeout())?;
    Some(cause.to_string().chars().take(MAX_FAULT).collect())
}

struct Connection {
    app: Arc<App>,
    tls: Option<TlsAcceptor>,
    watcher: Watcher,
    limits: Limits,
}

impl Connection {
    async fn serve(self, stream: TcpStream, peer: SocketAddr, stop: CancellationToken) {
        if let Err(error) = set_options(&stream, self.limits.untaken) {
            tracing::debug!(%error, "a connection's options could not be set");
        }
        let peer = self.app.peer(peer.ip(), self.tls.is_some());
        let within = self.limits.header_timeout;
        let begun = tokio::select! {
            () = stop.cancelled() => return,
            begun = tokio::time::timeout(within, begin(stream, self.tls.clone())) => begun,
        };
        match begun {
            Ok(Ok((stream, protocol))) => self.speak(stream, protocol, peer, stop).await,
            Ok(Err(error)) => tracing::debug!(%error, peer = %peer.address, "a connection did not begin"),
            Err(_) => {}
        }
    }

    async fn speak(self, stream: Stream, protocol: Protocol, peer: Peer, stop: CancellationToken) {
        let (app, address) = (self.app, peer.address);
        let outcome = match protocol {
            Protocol::Http1 | Protocol::WithoutTls => {
                let gate = Gate::new(stream, self.limits.header_timeout, app.linger);
                let gate = match protocol {
                    Protocol::WithoutTls => gate.refusing(Problem::WithoutTls),
                    _ => gate,
                };
                let ledger = gate.ledger();
                let service = service_fn(move |request: Request<Incoming>| {
                    turn::request();
                    let (app, ledger, peer) = (Arc::clone(&app), Arc::clone(&ledger), peer.clone());
                    let number = ledger.begin();
                    async move {
                        let response = match ledger.refused(number) {
                            Some(refused) => app.refuse(refused, &peer),
                            None => app.handle(request, peer).await,
                        };
                        ledger.answered(number, &response);
                        Ok::<_, Infallible>(response)
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(ConnectionTimer::default())
                    // The gate has its own for heads that have begun, and can answer them.
                    .header_read_timeout(self.limits.header_timeout * 2)
                    .max_buf_size(HTTP1_BUFFER)
                    .serve_connection(TokioIo::new(gate), service)
                    .with_upgrades();
                let mut connection = pin!(connection);
                // What the watcher does for others; it does not know of connections that may be switched over.
                tokio::select! {
                    biased;
                    outcome = connection.as_mut() => outcome,
                    () = stop.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                }
            }
            Protocol::Http2 => {
                let service = service_fn(move |request: Request<Incoming>| {
                    turn::request();
                    let (app, peer) = (Arc::clone(&app), peer.clone());
                    async move { Ok::<_, Infallible>(app.handle(request, peer).await.map(untaken::give)) }
                });
                let streams = Streams::new(self.limits.untaken, address);
                let preface = Preface::new(stream, self.limits.header_timeout);
                let connection = hyper::server::conn::http2::Builder::new(streams)
                    .timer(TokioTimer::new())
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .max_frame_size(MAX_FRAME)
                    .max_concurrent_streams(MAX_STREAMS)
                    .max_header_list_size(MAX_HEADER_BYTES)
                    .max_send_buf_size(SEND_BUFFER)
                    .keep_alive_interval(PING)
                    .keep_alive_timeout(PING)
                    .enable_connect_protocol()
                    .serve_connection(TokioIo::new(preface), service);
                self.watcher.watch(connection).await
            }
        };
        let Err(error) = outcome else { return };
        match fault(&error).filter(|_| protocol == Protocol::Http2) {
            Some(fault) => tracing::info!(fault, peer = %address, "a connection of HTTP/2 was given up"),
            None => tracing::debug!(%error, peer = %address, "a connection broke"),
        }
    }
}

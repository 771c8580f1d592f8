//! Ports of a sandbox that are ports of this machine, and a server to listen there.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use oc_mesh::error::{Reason, status};
use oc_proto::v1::{ForwardPortRequest, ForwardPortResponse, port_service_server::PortService};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Notify,
    task::JoinSet,
};
use tonic::{Status, Streaming, body::Body};

use crate::agent::FakeAgent;

type Answers = Pin<Box<dyn Stream<Item = Result<ForwardPortResponse, Status>> + Send>>;

#[tonic::async_trait]
impl PortService for FakeAgent {
    type ForwardPortStream = Answers;

    async fn forward_port(
        &self,
        request: tonic::Request<Streaming<ForwardPortRequest>>,
    ) -> Result<tonic::Response<Answers>, Status> {
        self.note("ForwardPort", &request);
        let mut parts = request.into_inner();
        let first = parts.message().await?.unwrap();
        let socket = TcpStream::connect(("127.0.0.1", first.port as u16))
            .await
            .map_err(|error| status(Reason::PortNotListening, error.to_string()))?;
        socket.set_nodelay(true).unwrap();
        let handoffs = self.0.handoffs.lock().clone();
        if let Some(handoffs) = handoffs {
            let offer = handoffs.offer(&first.handoff_key, socket.into_std().unwrap().into()).unwrap();
            let said = stream::iter([Ok(ForwardPortResponse { is_handed_over: true, ..Default::default() })]);
            let held = stream::once(offer.held_for(parts)).filter_map(async |held| held.err().map(Err));
            return Ok(tonic::Response::new(Box::pin(said.chain(held))));
        }
        let (mut read, mut write) = socket.into_split();
        tokio::spawn(async move {
            while let Ok(Some(part)) = parts.message().await {
                if write.write_all(&part.data).await.is_err() {
                    return;
                }
            }
        });
        let rest = async_stream::try_stream! {
            yield ForwardPortResponse::default();
            loop {
                let mut buffer = vec![0; 64 << 10];
                let length = read.read(&mut buffer).await
                    .map_err(|error| status(Reason::PortReset, error.to_string()))?;
                buffer.truncate(length);
                yield ForwardPortResponse { data: buffer.into(), ..Default::default() };
                if length == 0 {
                    break;
                }
            }
        };
        Ok(tonic::Response::new(Box::pin(rest)))
    }
}

/// A server whose paths say what it does.
pub struct Server {
    pub port: u16,
    pub connections: Arc<AtomicUsize>,
    /// Lets `/events` say the next thing.
    pub say: Arc<Notify>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connections, say) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let mut tasks = JoinSet::new();
        let (count, notify) = (Arc::clone(&connections), Arc::clone(&say));
        tasks.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                let say = Arc::clone(&notify);
                open.spawn(async move {
                    let service = service_fn(move |request| answer(request, Arc::clone(&say)));
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades();
                    let _ = connection.await;
                });
            }
        });
        Self { port, connections, say, _tasks: tasks }
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn answer(mut request: Request<Incoming>, say: Arc<Notify>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let (kind, size) = path.trim_start_matches('/').split_once('/').unwrap_or_else(|| (&path[1..], "0"));
    let size: usize = size.parse().unwrap_or(0);
    let mut response = Response::new(Body::empty());
    response.headers_mut().insert("keep-alive", HeaderValue::from_static("timeout=5"));
    match kind {
        "big" => {
            const PIECE: usize = 64 << 10;
            let pieces = (0..size.div_ceil(PIECE)).map(move |index| {
                let piece = vec![index as u8; PIECE.min(size - index * PIECE)];
                Ok::<_, Status>(Frame::data(Bytes::from(piece)))
            });
            *response.body_mut() = Body::new(StreamBody::new(stream::iter(pieces)));
        }
        "events" => {
            let events = stream::unfold((0, say), async |(number, say)| {
                say.notified().await;
                Some((
                    Ok::<_, Status>(Frame::data(Bytes::from(format!("data: {number}\n\n")))),
                    (number + 1, say),
                ))
            });
            *response.body_mut() = Body::new(StreamBody::new(events));
        }
        "never" => std::future::pending().await,
        "once" => {
            response.headers_mut().insert("connection", HeaderValue::from_static("close"));
        }
        "ws" => {
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let key = request.headers()["sec-websocket-key"].as_bytes();
            let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key);
            let headers = response.headers_mut();
            headers.insert("connection", HeaderValue::from_static("upgrade"));
            headers.insert("upgrade", HeaderValue::from_static("websocket"));
            headers.insert("sec-websocket-accept", accept.parse().unwrap());
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::WebSocketStream::from_raw_socket(
                    TokioIo::new(upgrade.await.unwrap()),
                    tokio_tungstenite::tungstenite::protocol::Role::Server,
                    None,
                )
                .await;
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_close() || futures_util::SinkExt::send(&mut socket, message).await.is_err()
                    {
                        break;
                    }
                }
            });
        }
        _ => {
            let (parts, body) = request.into_parts();
            let headers: serde_json::Map<String, serde_json::Value> = parts
                .headers
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap().into()))
                .collect();
            let body = body.collect().await.unwrap().to_bytes();
            let told = serde_json::json!({
                "method": parts.method.as_str(), "target": parts.uri.to_string(), "headers": headers, "bytes": body.len(),
            });
            *response.body_mut() = Body::new(Full::new(Bytes::from(told.to_string())));
        }
    }
    Ok(response)
}

/// A port at which nobody listens, nor will as long as its socket is held.
pub fn closed() -> (u16, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    (socket.local_addr().unwrap().port(), socket)
}

/// A port that answers whatever it is asked with these bytes, and ends.
pub async fn says(bytes: &'static [u8]) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut stream, _): (TcpStream, SocketAddr) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(bytes).await;
        }
    });
    (port, tasks)
}

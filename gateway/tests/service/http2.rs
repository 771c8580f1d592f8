//! A client of HTTP/2 that opens WebSockets (RFC 8441), as browsers do.

use http::{HeaderMap, Method, Request, Version};
use hyper::{client::conn::http2::SendRequest, ext::Protocol, upgrade::Upgraded};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};
use tonic::body::Body;

use crate::{
    client::{Answer, collect},
    websocket::PATIENCE,
};

pub type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// A connection.
pub struct Http2 {
    pub sender: SendRequest<Body>,
    _driver: JoinSet<()>,
}

impl Http2 {
    /// One whose server has said that it knows WebSockets.
    pub async fn over(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
        // What reads is a task of its own already.
        let said = async {
            while !connection.is_extended_connect_protocol_enabled() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, said).await.expect("the server knows no WebSockets");
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            let _ = connection.await;
        });
        Self { sender, _driver: driver }
    }

    pub async fn get(&mut self, url: &str) -> Answer {
        let request = Request::get(url).body(Body::empty()).unwrap();
        collect(self.sender.send_request(request).await.unwrap()).await
    }

    /// Asks for a stream that speaks `protocol`; a WebSocket, or how it was refused.
    pub async fn connect(
        &mut self,
        protocol: &'static str,
        url: &str,
        headers: &[(&str, &str)],
    ) -> Result<(Socket, HeaderMap), Answer> {
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .version(Version::HTTP_2)
            .uri(url)
            .header("sec-websocket-version", "13")
            .extension(Protocol::from_static(protocol));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let asked = self.sender.send_request(request.body(Body::empty()).unwrap());
        let response = tokio::time::timeout(PATIENCE, asked).await.expect("no answer").unwrap();
        if response.status() != 200 {
            return Err(collect(response).await);
        }
        let headers = response.headers().clone();
        let upgraded = hyper::upgrade::on(response).await.unwrap();
        Ok((WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await, headers))
    }
}

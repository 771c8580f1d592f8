//! A WebSocket client that says what it sees.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, Request, StatusCode};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest as _,
        protocol::{CloseFrame, WebSocketConfig},
    },
};

use crate::mesh::{Mesh, SANDBOX};

pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Client {
    pub socket: WebSocketStream<TcpStream>,
    /// What the server answered to the handshake.
    pub subprotocol: Option<String>,
}

/// What a client sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Bytes(Vec<u8>),
    /// Code and reason.
    Closed(u16, String),
    /// The connection ended without a close.
    Gone,
}

impl Mesh {
    pub fn handshake(&self, path: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = format!("ws://{}{path}", self.address).into_client_request().unwrap();
        for (name, value) in headers {
            let name: http::HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, HeaderValue::from_str(value).unwrap());
        }
        request
    }

    /// Connects, or says how it was refused.
    pub async fn websocket(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Client, (StatusCode, String)> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        // Like that of the published Python client.
        let config = WebSocketConfig::default().max_message_size(Some(1 << 20));
        let connecting = client_async_with_config(self.handshake(path, headers), stream, Some(config));
        match tokio::time::timeout(PATIENCE, connecting).await.expect("no answer to the handshake") {
            Ok((socket, response)) => {
                let subprotocol = response.headers().get("sec-websocket-protocol");
                let subprotocol = subprotocol.map(|value| value.to_str().unwrap().to_owned());
                Ok(Client { socket, subprotocol })
            }
            Err(Error::Http(response)) => {
                let body = response.body().clone().unwrap_or_default();
                let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                Err((response.status(), body["code"].as_str().unwrap_or_default().to_owned()))
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Attaches to a session of our sandbox, by our key.
    pub async fn attach(&self, session: &str) -> Client {
        let path = format!("/api/sandboxes/{SANDBOX}/{session}");
        self.websocket(&path, &[("x-api-key", &self.key)]).await.unwrap()
    }
}

impl Client {
    /// The next message, close or end.
    pub async fn next(&mut self) -> Seen {
        let next = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Binary(bytes))) => return Seen::Bytes(bytes.to_vec()),
                    Some(Ok(Message::Close(frame))) => {
                        let (code, reason) = frame
                            .map_or((1005, String::new()), |CloseFrame { code, reason }| {
                                (code.into(), reason.to_string())
                            });
                        // Answers the close.
                        while let Some(Ok(_)) = self.socket.next().await {}
                        return Seen::Closed(code, reason);
                    }
                    Some(Ok(Message::Text(text))) => panic!("text: {text}"),
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Seen::Gone,
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("nothing comes")
    }

    pub async fn bytes(&mut self) -> Vec<u8> {
        match self.next().await {
            Seen::Bytes(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    /// The code and reason of the close, after whatever messages.
    pub async fn closed(&mut self) -> (u16, String) {
        loop {
            match self.next().await {
                Seen::Bytes(_) => {}
                Seen::Closed(code, reason) => return (code, reason),
                Seen::Gone => panic!("the connection ended without a close"),
            }
        }
    }

    /// Messages until so many bytes with this prefix have come; without the prefix, and without signs of life.
    pub async fn collect(&mut self, prefix: u8, length: usize) -> Vec<u8> {
        let mut collected = Vec::new();
        while collected.len() < length {
            let bytes = self.bytes().await;
            if let Some((first, rest)) = bytes.split_first() {
                assert_eq!(*first, prefix, "{bytes:?}");
                collected.extend_from_slice(rest);
            }
        }
        collected
    }

    pub async fn send(&mut self, bytes: impl Into<Bytes>) {
        self.socket.send(Message::Binary(bytes.into())).await.unwrap();
    }

    /// Input of an exec session.
    pub async fn input(&mut self, text: &str) {
        self.send(format!("\0{text}")).await;
    }
}

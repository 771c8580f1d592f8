//! When a mesh may be used: its gateway is ready, its host is a member, and the first clone waits in the pool,
//! which says that template and golden snapshot are there.

use std::{cell::RefCell, io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, Uri,
    client::conn::http1,
    header::HOST,
    rt::{Read, Write},
};
use hyper_util::rt::TokioIo;
use oc_proto::v1::Node;
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::{
    commands::nodes, config::Target, connection::Connection, failure::Failure, output::Printable,
    tls::Connector,
};

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(100);
/// For one look.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a gateway says about its readiness is short.
const REASON_BYTES: usize = 4 << 10;

/// What is waited for, for whoever shows it.
#[derive(Debug, Default)]
pub struct Stage(RefCell<String>);

impl Stage {
    /// The text now.
    pub fn text(&self) -> String {
        self.0.borrow().clone()
    }

    fn set(&self, text: &str) {
        text.clone_into(&mut self.0.borrow_mut());
    }
}

/// What is expected of the mesh.
#[derive(Debug)]
pub struct Expected<'a> {
    /// Where its gateway listens.
    pub address: SocketAddr,
    /// URL and key.
    pub target: &'a Target,
    /// The host that must be a member.
    pub host_id: &'a str,
    /// Whether a pool is to fill.
    pub pool: bool,
    /// How long it may take.
    pub patience: Duration,
}

/// Waits until the mesh may be used.
pub async fn wait(expected: &Expected<'_>, stage: &Stage) -> Result<Node, Failure> {
    let mut host = None;
    let waiting = async {
        stage.set("waiting for the gateway");
        while let Some(missing) = missing(expected.address, expected.target).await {
            if !missing.is_empty() {
                stage.set(&format!("waiting for the gateway: {missing}"));
            }
            sleep(INTERVAL).await;
        }
        stage.set("waiting for the vmm-agent");
        let connection = loop {
            match Connection::open(expected.target).await {
                Ok(connection) => break connection,
                Err(failure) => stage.set(&format!("waiting for the gateway: {failure}")),
            }
            sleep(INTERVAL).await;
        };
        loop {
            // A key takes a moment to reach the gateway, a host to become a member.
            let found = match timeout(PROBE_TIMEOUT, nodes::all(&connection)).await {
                Ok(Ok(nodes)) => {
                    stage.set("waiting for the vmm-agent");
                    nodes
                }
                // For ever if the key was revoked.
                Ok(Err(failure)) => {
                    stage.set(&format!("waiting for the vmm-agent: {failure}"));
                    Vec::new()
                }
                Err(_) => Vec::new(),
            };
            let found = found.into_iter().find(|node| node.node_id == expected.host_id);
            if let Some(node) = found {
                if !expected.pool || node.pool_ready > 0 {
                    return node;
                }
                stage.set(&format!(
                    "waiting for the pool: on its first start a host boots the template once ({})",
                    node.accelerator
                ));
                host = Some(node);
            }
            sleep(INTERVAL).await;
        }
    };
    match timeout(expected.patience, waiting).await {
        Ok(node) => Ok(node),
        // Sandboxes start without a pool too, only slower.
        Err(_) => host.ok_or_else(|| {
            Failure::NotReady(format!("not ready after {} s: {}", expected.patience.as_secs(), stage.text()))
        }),
    }
}

/// What the gateway says it lacks; none once it is ready.
async fn missing(address: SocketAddr, target: &Target) -> Option<String> {
    match timeout(PROBE_TIMEOUT, readyz(address, target)).await {
        Ok(Ok(missing)) => missing,
        // It has not even begun to listen.
        Ok(Err(_)) | Err(_) => Some(String::new()),
    }
}

/// `GET /readyz`: none if it answers 200, else the first line of what it says.
async fn readyz(address: SocketAddr, target: &Target) -> io::Result<Option<String>> {
    let stream = TcpStream::connect(reachable(address)).await?;
    if !target.url.starts_with("https://") {
        return asked(TokioIo::new(stream), address).await;
    }
    let connector = Connector::new("http/1.1", target.ca_file.as_deref()).map_err(io::Error::other)?;
    let host = target.url.parse::<Uri>().ok().and_then(|url| url.host().map(str::to_owned));
    let stream = connector.connect(&host.unwrap_or_default(), stream).await?;
    asked(TokioIo::new(stream), address).await
}

async fn asked<I>(io: I, address: SocketAddr) -> io::Result<Option<String>>
where
    I: Read + Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(io).await.map_err(io::Error::other)?;
    let request = Request::get("/readyz")
        .header(HOST, address.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(io::Error::other)?;
        if answer.status().is_success() {
            return Ok(None);
        }
        let body =
            Limited::new(answer.into_body(), REASON_BYTES).collect().await.map_err(io::Error::other)?;
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        Ok(Some(Printable(text.lines().next().unwrap_or_default()).to_string()))
    };
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        // The connection has ended: if the answer came with its last bytes, it is there.
        _ = connection => exchange.await,
    }
}

/// An address to connect to, for one that may be "all of them" to listen on.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        _ => address.ip(),
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    fn target(address: SocketAddr) -> Target {
        Target { url: format!("http://{address}"), key: String::new(), ca_file: None }
    }

    async fn answered(answer: &'static str) -> Option<String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            assert!(request.starts_with(b"GET /readyz HTTP/1.1\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let target = target(address);
        tokio::join!(missing(address, &target), serve).0
    }

    #[tokio::test]
    async fn a_gateway_says_what_it_lacks() {
        assert_eq!(answered("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nready\n").await, None);
        let missing = answered("HTTP/1.1 503 Service Unavailable\r\n\r\nnot ready: no scheduler\n").await;
        assert_eq!(missing.as_deref(), Some("not ready: no scheduler"));
        assert_eq!(answered("nonsense\r\n\r\n").await.as_deref(), Some(""));
    }

    #[tokio::test]
    async fn one_that_does_not_listen_is_not_ready() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(missing(address, &target(address)).await.as_deref(), Some(""));
    }
}

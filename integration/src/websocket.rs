//! WebSockets of a mesh's gateway, as a client without any of our code opens them.

use anyhow::Context as _;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{client::IntoClientRequest as _, http::HeaderValue},
};

use crate::mesh::Mesh;

/// An open one.
pub type Socket = WebSocketStream<TcpStream>;

/// Attaches to what is at `path`, as the mesh's administrator.
///
/// # Errors
///
/// If it is refused.
pub async fn attach(mesh: &Mesh, path: &str) -> anyhow::Result<Socket> {
    let address = mesh.url.strip_prefix("http://").context("no http URL")?;
    let mut request = format!("ws://{address}{path}").into_client_request()?;
    request.headers_mut().insert("x-api-key", HeaderValue::from_str(&mesh.key)?);
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(client_async(request, stream).await.with_context(|| format!("attaching to {path}"))?.0)
}

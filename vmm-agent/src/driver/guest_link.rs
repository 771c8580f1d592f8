//! The way to a guest: HTTP/2 over the framed link over the port that its VMM has for it, connected when it is first needed.

use std::{
    io,
    os::{fd::AsFd as _, unix::net::UnixStream as StdStream},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use oc_guest_link::{HostLink, Nonce};
use oc_mesh::channel::CONNECTION_WINDOW;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{Mutex, watch},
    task::AbortHandle,
    time::timeout,
};
use tonic::{Status, body::Body};
use tower::Service;

use super::{home::Home, vmm::Vmm};

/// A guest that runs answers a handshake in a millisecond, one that boots when it is up.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);
/// A VMM notices in a millisecond that we hang up.
const HANGS_UP_WITHIN: Duration = Duration::from_secs(2);
/// HTTP/2 window of one stream, bytes: what one call may have under way, before which whatever another says has to wait.
const STREAM_WINDOW: u32 = 256 << 10;
/// Larger frames mean fewer of them; each costs the emulated guest a system call and a header.
const MAX_FRAME: u32 = 512 << 10;
/// Bytes that wait to be sent on a stream.
const SEND_BUFFER: usize = 1 << 20;
/// Bytes that are read at once of what nobody wants to know.
const DRAINED: usize = 64 << 10;
/// Calls that were given up and may still be answered: a guest takes a while to notice. Each answer to one that is not known
/// any more brings the connection nearer to its end (h2's `local_max_error_reset_streams`).
const GIVEN_UP: usize = 1024;
const NOTICES_WITHIN: Duration = Duration::from_secs(10);
/// Headers and trailers of one answer, bytes: nothing of a guest is worth more.
const MAX_HEADERS: u32 = 16 << 10;

/// A guest's HTTP/2 service. Clones share one connection; a new one is made when it broke.
#[derive(Clone, Debug)]
pub struct GuestLink(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    vmm: Arc<dyn Vmm>,
    home: Home,
    connected: Mutex<Option<Connected>>,
}

/// A connection, and the task that drives it.
#[derive(Debug)]
struct Connected {
    sender: SendRequest<Body>,
    task: AbortHandle,
    /// The same socket as the task's.
    socket: UnixStream,
    /// Completes when the task has let go of the socket.
    ended: watch::Receiver<()>,
}

impl Connected {
    /// Ends the connection to a guest that stands still, and returns when its socket is closed.
    async fn close(self) {
        let Self { task, socket, mut ended, .. } = self;
        task.abort();
        // Fails when the other half is dropped, which is what it is for.
        let _ = ended.changed().await;
        drop(socket);
    }

    /// Ends the connection to a guest that runs, and returns when the VMM has done so, too.
    async fn end(self) {
        let Self { task, socket, ended, .. } = self;
        let_go(socket, &task, ended).await;
    }
}

/// Ends `task` and what it does on `socket`, and returns when the other side of that has closed it, too.
///
/// What the guest writes until then is read: QEMU forgets a buffer that it cannot write because we are gone (10.0,
/// `discard_throttle_data` in hw/char/virtio-serial-bus.c). The guest waits for it for ever, and says nothing any more.
async fn let_go(mut socket: UnixStream, task: &AbortHandle, mut ended: watch::Receiver<()>) {
    let shut = socket.shutdown().await;
    task.abort();
    // Fails when the other half is dropped, which is what it is for.
    let _ = ended.changed().await;
    let mut rest = vec![0; DRAINED];
    let drained = async { while matches!(socket.read(&mut rest).await, Ok(1..)) {} };
    if shut.is_ok() && timeout(HANGS_UP_WITHIN, drained).await.is_err() {
        tracing::warn!("a VMM does not notice that nobody listens to its guest");
    }
}

impl GuestLink {
    /// The way to the guest of the VM in `home`, which `vmm` runs. Nothing is connected yet.
    pub fn new(vmm: Arc<dyn Vmm>, home: Home) -> Self {
        Self(Arc::new(Shared { vmm, home, connected: Mutex::new(None) }))
    }

    /// Connects, if it is not yet.
    ///
    /// # Errors
    ///
    /// If the guest does not answer.
    pub async fn connect(&self) -> io::Result<()> {
        self.0.sender().await.map(drop)
    }

    /// The way to the guest for one call, connected if it is not yet.
    ///
    /// # Errors
    ///
    /// `UNAVAILABLE` if the guest does not answer.
    pub async fn way(&self) -> Result<Way, Status> {
        self.0.sender().await.map(Way).map_err(lost)
    }

    /// Hangs up on a guest that stands still, whose VMM has handed on all that it said: it must not find half a conversation
    /// when it goes on. The VMM knows of it before it can be told anything else; it would not notice one half closed, because it
    /// reads nothing for such a guest.
    pub async fn hang_up(&self) {
        if let Some(connected) = self.0.connected.lock().await.take() {
            connected.close().await;
        }
    }
}

/// The way to a guest for one call, as it stood when it was asked for: once it is hung up on it leads nowhere, and connects to
/// nobody by itself.
#[derive(Debug)]
pub struct Way(SendRequest<Body>);

impl Way {
    /// Sends the call there.
    ///
    /// # Errors
    ///
    /// `UNAVAILABLE` if the guest cannot be reached any more.
    pub async fn send(mut self, mut request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        *request.uri_mut() = absolute(request.uri())?;
        *request.version_mut() = http::Version::HTTP_2;
        let response = self.0.send_request(request).await.map_err(lost)?;
        Ok(response.map(Body::new))
    }
}

impl Shared {
    async fn sender(&self) -> io::Result<SendRequest<Body>> {
        // Held while connecting: there is one port, and whoever waits here wants the same connection.
        let mut slot = self.connected.lock().await;
        if let Some(connected) = slot.as_ref()
            && !connected.sender.is_closed()
        {
            return Ok(connected.sender.clone());
        }
        // QEMU takes one connection at a time: the old one must be gone.
        if let Some(connected) = slot.take() {
            connected.end().await;
        }
        let connected = slot.insert(connect(self.vmm.dial(&self.home).await?).await?);
        Ok(connected.sender.clone())
    }
}

async fn connect(stream: UnixStream) -> io::Result<Connected> {
    let socket = UnixStream::from_std(StdStream::from(stream.as_fd().try_clone_to_owned()?))?;
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    let link = HostLink::connect(stream, Nonce(nonce), ANSWERS_WITHIN).await.map_err(io::Error::other)?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_reset_streams(GIVEN_UP)
        .reset_stream_duration(NOTICES_WITHIN)
        .handshake(TokioIo::new(link))
        .await
        .map_err(io::Error::other)?;
    let (held, ended) = watch::channel(());
    // Ends by itself when the last sender is dropped or the VM goes.
    let task = tokio::spawn(async move {
        let _held = held;
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the connection to a guest broke");
        }
    });
    Ok(Connected { sender, task: task.abort_handle(), socket, ended })
}

impl Service<http::Request<Body>> for GuestLink {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let link = self.clone();
        Box::pin(async move { link.way().await?.send(request).await })
    }
}

/// HTTP/2 wants scheme and authority; on this link they say nothing.
fn absolute(uri: &Uri) -> Result<Uri, Status> {
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(Authority::from_static("guest"));
    parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    Uri::from_parts(parts).map_err(|error| Status::internal(error.to_string()))
}

fn lost(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the guest cannot be reached: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_guest_writes_is_taken_until_its_vmm_has_hung_up() {
        let (ours, mut vmm) = UnixStream::pair().unwrap();
        let (held, ended) = watch::channel(());
        let task = tokio::spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        })
        .abort_handle();
        let mut ending = std::pin::pin!(let_go(ours, &task, ended));
        assert!(
            timeout(Duration::from_millis(20), &mut ending).await.is_err(),
            "the VMM has not noticed yet"
        );
        assert_eq!(vmm.read(&mut [0; 1]).await.unwrap(), 0, "it is told");
        vmm.write_all(b"late").await.unwrap();
        drop(vmm);
        timeout(HANGS_UP_WITHIN, ending).await.unwrap();
    }
}

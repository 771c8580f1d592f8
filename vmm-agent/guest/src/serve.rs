//! The guest's services, on one session of the port after the other.

use std::{
    convert::Infallible,
    error::Error,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::{Stream, TryStreamExt as _};
use oc_guest_link::{GuestPort, GuestSession};
use oc_proto::{
    mesh::guest_service_server::GuestServiceServer,
    v1::{
        agent_session_service_server::AgentSessionServiceServer, exec_service_server::ExecServiceServer,
        file_service_server::FileServiceServer, port_service_server::PortServiceServer,
    },
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Server, server::Connected};
use tower::util::MapRequestLayer;

use crate::{
    agents::Agents,
    cancel::broken_off_is_an_error,
    exec::{Exec, sessions::Sessions},
    files::Files,
    freeze::Layer,
    identity::{Guest, Identity},
    ports::Ports,
};

/// What the host may send on a stream before we read on.
const STREAM_WINDOW: u32 = 2 << 20;
/// The same for all streams: no bound, or uploads that nobody writes down would take the room of other calls.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Larger frames mean fewer of them; each costs an emulated guest dearly.
const MAX_FRAME: u32 = 512 << 10;
/// Calls at once.
const MAX_CALLS: u32 = 1024;
/// A message that comes in: 1 MiB of a file or of standard input, and what goes with it.
const MAX_MESSAGE: usize = 2 << 20;

/// The sessions that hosts begin on `port`, one after the other.
pub fn sessions_on<I>(port: I) -> impl Stream<Item = io::Result<GuestSession<I>>> + Send + 'static
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut port = GuestPort::new(port);
    futures_util::stream::poll_fn(move |context| port.poll_accept(context).map(Some))
}

/// Serves on all `sessions`, for ever.
///
/// # Errors
///
/// If what they come from breaks.
pub async fn serve<I>(
    sessions: impl Stream<Item = io::Result<GuestSession<I>>> + Send + 'static,
    layer: Layer,
) -> Result<Infallible, Box<dyn Error>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let identity = Identity::default();
    let (reporter, health) = tonic_health::server::health_reporter();
    let guest = GuestServiceServer::new(Guest::new(identity.clone(), layer));
    let running = Sessions::new(identity);
    let agents =
        AgentSessionServiceServer::new(Agents::new(running.clone())).max_decoding_message_size(MAX_MESSAGE);
    let exec = ExecServiceServer::new(Exec::new(running)).max_decoding_message_size(MAX_MESSAGE);
    let files = FileServiceServer::new(Files::default()).max_decoding_message_size(MAX_MESSAGE);
    let ports = PortServiceServer::new(Ports::default()).max_decoding_message_size(oc_port::MAX_MESSAGE);
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_concurrent_streams(MAX_CALLS)
        // As many as there may be can be given up before a slow guest has looked at them.
        .http2_max_pending_accept_reset_streams(Some(MAX_CALLS as usize))
        .layer(MapRequestLayer::new(broken_off_is_an_error))
        .add_service(health)
        .add_service(guest)
        .add_service(exec)
        .add_service(agents)
        .add_service(files)
        .add_service(ports)
        .serve_with_incoming(sessions.map_ok(Session))
        .await?;
    Err("the port has ended".into())
}

/// A session, as tonic wants a connection.
#[derive(Debug)]
struct Session<I>(GuestSession<I>);

impl<I> Connected for Session<I> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Session<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Session<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

//! A connection to a port in a sandbox, as something to read from and write to: one call of `ForwardPort` to the sandbox's host.
//!
//! What is written goes out as messages, of which at most [`AHEAD`] wait; what comes in is handed on message by message. So each
//! direction is held back by HTTP/2's flow control, and holds no more than a message or two. Dropping it before both sides
//! have ended resets the connection in the sandbox.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use futures_util::{StreamExt as _, stream};
use http::HeaderMap;
use oc_mesh::{
    channel::ClientChannel,
    error::{Reason, status},
};
use oc_proto::v1::{ForwardPortRequest, ForwardPortResponse, port_service_client::PortServiceClient};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSender;
use tonic::{Request, Status, Streaming, metadata::MetadataMap};

/// Messages that wait to be sent.
const AHEAD: usize = 2;
/// Bytes of a message at most; the contract allows 1 MiB.
const PIECE: usize = 256 << 10;

/// An open connection to a port.
#[derive(Debug)]
pub struct PortStream {
    answers: Streaming<ForwardPortResponse>,
    requests: PollSender<ForwardPortRequest>,
    unread: Bytes,
    has_ended: bool,
}

impl PortStream {
    /// Connects to a port of a sandbox on its host, on behalf of the caller whom `headers` name.
    ///
    /// # Errors
    /// `PORT_NOT_LISTENING`; `DEADLINE_EXCEEDED` after `within`; what else the host says.
    pub async fn open(
        channel: ClientChannel,
        sandbox_id: &str,
        port: u16,
        headers: HeaderMap,
        within: Duration,
    ) -> Result<Self, Status> {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let first =
            ForwardPortRequest { sandbox_id: sandbox_id.to_owned(), port: port.into(), data: Bytes::new() };
        let requests = stream::iter([first]).chain(ReceiverStream::new(receiver));
        let request =
            Request::from_parts(MetadataMap::from_headers(headers), tonic::Extensions::default(), requests);
        let opened = async {
            let mut client = PortServiceClient::new(channel);
            let mut answers = client.forward_port(request).await?.into_inner();
            // The first message says that it is open.
            match answers.message().await? {
                Some(first) => Ok((answers, first.data)),
                None => Err(status(Reason::PortReset, format!("port {port}: the connection ended at once"))),
            }
        };
        let late = || status(Reason::DeadlineExceeded, format!("port {port} accepts no connection"));
        let (answers, unread) = timeout(within, opened).await.unwrap_or_else(|_| Err(late()))?;
        Ok(Self { answers, requests: PollSender::new(sender), unread, has_ended: false })
    }
}

impl AsyncRead for PortStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            if self.has_ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.answers.poll_next_unpin(context)) {
                // An empty one says that the port's side has ended.
                Some(Ok(answer)) if !answer.data.is_empty() => self.unread = answer.data,
                Some(Ok(_)) | None => self.has_ended = true,
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let length = self.unread.len().min(buffer.remaining());
        buffer.put_slice(&self.unread[..length]);
        self.unread.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.requests.poll_reserve(context)).map_err(gone)?;
        let length = data.len().min(PIECE);
        let data = Bytes::copy_from_slice(&data[..length]);
        self.requests
            .send_item(ForwardPortRequest { data, ..ForwardPortRequest::default() })
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was handed over is still sent.
        self.requests.close();
        Poll::Ready(Ok(()))
    }
}

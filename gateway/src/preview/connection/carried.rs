//! A connection whose bytes come by the call that it was asked for by.
//!
//! What is written goes out as messages, of which at most [`AHEAD`] wait; what comes in is handed on message by message. So each
//! direction is held back by HTTP/2's flow control, and holds no more than a message or two. Dropping it before both sides
//! have ended resets the connection in the sandbox.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use futures_util::StreamExt as _;
use oc_proto::v1::ForwardPortRequest;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc::Sender,
};
use tokio_util::sync::PollSender;

use super::Answers;

/// Messages that wait to be sent.
pub const AHEAD: usize = 2;
/// Bytes of a message at most; the contract allows 1 MiB.
const PIECE: usize = 256 << 10;

/// A connection that a call is.
#[derive(Debug)]
pub struct Carried {
    answers: Answers,
    requests: PollSender<ForwardPortRequest>,
    unread: Bytes,
    has_ended: bool,
}

impl Carried {
    /// By this call, whose first answer brought `unread`.
    pub fn new(answers: Answers, requests: Sender<ForwardPortRequest>, unread: Bytes) -> Self {
        Self { answers, requests: PollSender::new(requests), unread, has_ended: false }
    }
}

impl AsyncRead for Carried {
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

impl AsyncWrite for Carried {
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

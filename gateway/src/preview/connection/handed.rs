//! A connection that its host has handed over: a socket of our own, and the call that it is ours by.

use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_util::StreamExt as _;
use oc_mesh::handoff;
use oc_proto::v1::ForwardPortRequest;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::mpsc::Sender,
};

use super::Answers;

/// A connection by a socket of our own.
#[derive(Debug)]
pub struct Handed {
    socket: TcpStream,
    /// Whether all was read that the port says, and whether all was said to it that is to be.
    has_ended: (bool, bool),
    /// The call. Dropped in this order: its host must see that it ends, and not that it is given up.
    _requests: Sender<ForwardPortRequest>,
    answers: Answers,
}

impl Handed {
    /// This socket, by this call.
    ///
    /// # Errors
    ///
    /// If it is no socket.
    pub fn new(socket: OwnedFd, answers: Answers, requests: Sender<ForwardPortRequest>) -> io::Result<Self> {
        let socket = TcpStream::from_std(socket.into())?;
        Ok(Self { socket, has_ended: (false, false), _requests: requests, answers })
    }
}

impl AsyncRead for Handed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let is_full = buffer.remaining() == 0;
        if let Poll::Ready(read) = Pin::new(&mut self.socket).poll_read(context, buffer) {
            self.has_ended.0 |= read.is_ok() && !is_full && buffer.filled().len() == before;
            return Poll::Ready(read);
        }
        // A host that takes the connection back breaks it off, too; one that dies cannot.
        Poll::Ready(Err(match ready!(self.answers.poll_next_unpin(context)) {
            Some(Err(error)) => io::Error::other(error),
            Some(Ok(_)) | None => io::ErrorKind::ConnectionReset.into(),
        }))
    }
}

impl AsyncWrite for Handed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.has_ended.1 = true;
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        // The other side must not take what it got for all there was.
        if self.has_ended != (true, true) {
            handoff::reset(&self.socket);
        }
    }
}

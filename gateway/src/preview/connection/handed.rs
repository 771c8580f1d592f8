//! A connection that its host has handed over: a socket of our own, and the call that it is ours by.

use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_util::{FutureExt as _, StreamExt as _, future::Fuse};
use oc_mesh::handoff;
use oc_proto::v1::ForwardPortRequest;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::mpsc::Sender,
};
use tokio_util::task::AbortOnDropHandle;

use super::Answers;
use crate::listener::short;

/// A connection by a socket of our own.
#[derive(Debug)]
pub struct Handed {
    socket: TcpStream,
    /// Whether all was read that the port says, and whether all was said to it that is to be.
    has_ended: (bool, bool),
    /// The end of the call, while both sides hold it.
    call: Fuse<AbortOnDropHandle<io::Error>>,
}

impl Handed {
    /// This socket, by this call.
    ///
    /// # Errors
    ///
    /// If it is no socket.
    pub fn new(socket: OwnedFd, answers: Answers, requests: Sender<ForwardPortRequest>) -> io::Result<Self> {
        let socket = TcpStream::from_std(socket.into())?;
        let call = AbortOnDropHandle::new(tokio::spawn(end(answers, requests))).fuse();
        Ok(Self { socket, has_ended: (false, false), call })
    }
}

/// Holds the call until its host ends it: how. Given up, it ends as one that has been completed: what is said to the host is dropped
/// before what it says. In a task, so that no read has to look at the call, whose connection all calls share.
async fn end(mut answers: Answers, requests: Sender<ForwardPortRequest>) -> io::Error {
    let ended = answers.next().await;
    drop((requests, answers));
    match ended {
        Some(Err(error)) => io::Error::other(error),
        Some(Ok(_)) | None => io::ErrorKind::ConnectionReset.into(),
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
        Poll::Ready(Err(ready!(Pin::new(&mut self.call).poll(context)).unwrap_or_else(io::Error::other)))
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
        short::poll_write(Pin::new(&mut self.socket), context, data)
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

//! A deadline for the first bytes of HTTP/2, for which hyper has none: its pings begin behind them.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::sniff::PREFACE;

/// A connection whose peer has to begin in time.
#[derive(Debug)]
pub struct Preface<I> {
    io: I,
    /// Bytes of it that have not come, and until when they may.
    missing: Option<(usize, Pin<Box<Sleep>>)>,
}

impl<I> Preface<I> {
    /// One that has just begun.
    pub fn new(io: I, within: Duration) -> Self {
        Self { io, missing: Some((PREFACE.len(), Box::pin(sleep(within)))) }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Preface<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.io).poll_read(context, buffer);
        if let Some((missing, until)) = &mut this.missing {
            *missing = missing.saturating_sub(buffer.filled().len() - before);
            if *missing == 0 {
                this.missing = None;
            } else if read.is_pending() && until.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Preface<I> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

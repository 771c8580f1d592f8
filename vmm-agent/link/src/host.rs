//! The host's end: one session for each connect.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, timeout, timeout_at},
};

use crate::{
    codec::{self, MAX_PAYLOAD, Nonce},
    link::{Link, Read},
};

/// How long the guest has for its first answer, before it may be stuck in a frame of a host that died. Doubles with
/// each try: a guest that is busy, or emulated, is not helped by more to read.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// Completes any frame that the guest may be in.
static PADDING: [u8; MAX_PAYLOAD] = [0; MAX_PAYLOAD];

/// Why no session began.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The guest did not answer.
    #[error("the guest did not answer in time")]
    Silent,
    /// The stream broke.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A session with a guest: a byte stream, for HTTP/2.
#[derive(Debug)]
pub struct HostLink<I> {
    link: Link<I>,
    session: u16,
}

impl<I: AsyncRead + AsyncWrite + Unpin> HostLink<I> {
    /// Begins a session on `io`, the host's end of the guest's port. The nonce must be fresh and random.
    pub async fn connect(io: I, nonce: Nonce, within: Duration) -> Result<Self, HandshakeError> {
        let mut link = Link::new(io);
        let mut nonce = nonce;
        let deadline = Instant::now() + within;
        let mut wait = FIRST_WAIT;
        link.queue(&nonce.hello());
        loop {
            let answer = timeout(wait, answered(&mut link, nonce));
            match timeout_at(deadline, answer).await {
                Ok(Ok(answered)) => {
                    answered?;
                    return Ok(Self { link, session: nonce.session() });
                }
                Ok(Err(_)) => {
                    nonce = nonce.next_try();
                    link.queue(&PADDING);
                    link.queue(&nonce.hello());
                    wait *= 2;
                }
                Err(_) => return Err(HandshakeError::Silent),
            }
        }
    }
}

/// Writes what is queued and reads until the guest's answer stands before everything else that was read.
async fn answered<I: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<I>,
    nonce: Nonce,
) -> Result<(), HandshakeError> {
    let expected = nonce.answer();
    let mut is_sent = false;
    poll_fn(|context| {
        loop {
            if !is_sent && link.poll_flush(context)?.is_ready() {
                is_sent = true;
            }
            if codec::take_answer(link.incoming(), &expected) {
                return Poll::Ready(Ok(()));
            }
            if ready!(link.poll_fill(context))? == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()));
            }
        }
    })
    .await
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for HostLink<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match ready!(this.link.poll_session(context, this.session, buffer))? {
            Read::Bytes | Read::End => Poll::Ready(Ok(())),
            // Each HELLO is answered once, and the answer to ours was taken.
            Read::Hello(_) | Read::Malformed => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the guest sent what is no frame of this session",
            ))),
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for HostLink<I> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(buffer)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let session = self.session;
        self.link.poll_send(context, session, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}

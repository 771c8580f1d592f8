//! Reading and writing frames on a byte stream; what host and guest have in common.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::codec::{self, HEADER, HEADER_AND_PAYLOAD, Item, MAX_PAYLOAD, Next};

/// What is read at once: two frames.
const READ: usize = 2 * HEADER_AND_PAYLOAD;

/// A byte stream with the frames that were read and not yet taken, and the frame that is being written.
#[derive(Debug)]
pub(crate) struct Link<I> {
    io: I,
    incoming: BytesMut,
    /// Bytes of the current frame that were not taken yet.
    payload: usize,
    /// Whether the current frame is of another session: its bytes are dropped.
    is_stale: bool,
    outgoing: Vec<u8>,
    /// How much of `outgoing` has been written.
    written: usize,
}

/// What reading a session came to.
pub(crate) enum Read {
    /// Bytes were taken, or there was no room for any.
    Bytes,
    /// The stream ended.
    End,
    /// Another session begins.
    Hello(codec::Nonce),
    /// What arrived is no frame.
    Malformed,
}

impl<I: AsyncRead + AsyncWrite + Unpin> Link<I> {
    pub(crate) fn new(io: I) -> Self {
        Self {
            io,
            incoming: BytesMut::with_capacity(READ),
            payload: 0,
            is_stale: false,
            outgoing: Vec::with_capacity(HEADER_AND_PAYLOAD),
            written: 0,
        }
    }

    pub(crate) fn incoming(&mut self) -> &mut BytesMut {
        &mut self.incoming
    }

    /// Forgets what was read and what was to be written.
    pub(crate) fn reset(&mut self) {
        self.incoming.clear();
        self.payload = 0;
        self.forget_outgoing();
    }

    pub(crate) fn forget_outgoing(&mut self) {
        self.outgoing.clear();
        self.written = 0;
    }

    /// Reads more; `Ok(0)` at the end of the stream.
    pub(crate) fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.incoming.reserve(READ);
        poll_read_buf(Pin::new(&mut self.io), context, &mut self.incoming)
    }

    /// Drops what was read of the current frame; whether its end was reached.
    pub(crate) fn skip_payload(&mut self) -> bool {
        let count = self.payload.min(self.incoming.len());
        self.incoming.advance(count);
        self.payload -= count;
        self.payload == 0
    }

    /// Says that a frame of this length begins, of which nobody wants the bytes.
    pub(crate) fn begin_stale(&mut self, length: usize) {
        self.payload = length;
        self.is_stale = true;
    }

    /// Reads bytes of `session` into `target`.
    pub(crate) fn poll_session(
        &mut self,
        context: &mut Context<'_>,
        session: u16,
        target: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<Read>> {
        let before = target.filled().len();
        loop {
            // The frame that we are in.
            if self.payload > 0 && !self.incoming.is_empty() {
                let mut take = self.payload.min(self.incoming.len());
                if !self.is_stale {
                    take = take.min(target.remaining());
                    target.put_slice(&self.incoming[..take]);
                }
                self.incoming.advance(take);
                self.payload -= take;
            }
            if target.remaining() == 0 {
                return Poll::Ready(Ok(Read::Bytes));
            }
            let is_between = self.payload == 0;
            let next = if is_between { codec::next(&mut self.incoming) } else { Next::Incomplete };
            match next {
                Next::Item(Item::Data { session: of, length }) => {
                    self.payload = length;
                    self.is_stale = of != session;
                }
                // What was read of the session so far is delivered first; then this is met again.
                Next::Item(Item::Hello(nonce)) => return Poll::Ready(Ok(Read::Hello(nonce))),
                Next::Malformed => return Poll::Ready(Ok(Read::Malformed)),
                Next::Incomplete => {
                    if target.filled().len() > before {
                        return Poll::Ready(Ok(Read::Bytes));
                    }
                    if ready!(self.poll_fill(context))? == 0 {
                        return Poll::Ready(Ok(Read::End));
                    }
                }
            }
        }
    }

    /// Writes one frame of at most [`MAX_PAYLOAD`] bytes; how many it took. They may still have to be flushed.
    pub(crate) fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        session: u16,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_drain(context))?;
        self.outgoing.resize(HEADER, 0);
        for slice in slices {
            let room = MAX_PAYLOAD + HEADER - self.outgoing.len();
            self.outgoing.extend_from_slice(&slice[..slice.len().min(room)]);
        }
        let length = self.outgoing.len() - HEADER;
        if length == 0 {
            self.forget_outgoing();
            return Poll::Ready(Ok(0));
        }
        self.outgoing[..HEADER].copy_from_slice(&codec::header(session, length));
        // As much as goes at once; the rest goes with the next frame or flush.
        if let Poll::Ready(Err(error)) = self.poll_drain(context) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(length))
    }

    /// Queues bytes that are no frame.
    pub(crate) fn queue(&mut self, bytes: &[u8]) {
        self.outgoing.extend_from_slice(bytes);
    }

    /// Writes what is queued.
    pub(crate) fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.outgoing.len() {
            let count = ready!(Pin::new(&mut self.io).poll_write(context, &self.outgoing[self.written..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        self.forget_outgoing();
        Poll::Ready(Ok(()))
    }

    pub(crate) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.io).poll_flush(context)
    }
}

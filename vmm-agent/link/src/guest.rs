//! The guest's end: a port that is open for ever, and one session after the other on it.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    codec::{self, Item, Next, Nonce},
    link::{Link, Read},
};

/// The port. Reading `Ok(0)` from it means that the host has hung up; reading on waits for the next one.
#[derive(Debug)]
pub struct GuestPort<I>(Arc<Mutex<Port<I>>>);

/// A session: a byte stream that ends when the host hangs up or begins another.
#[derive(Debug)]
pub struct GuestSession<I> {
    port: Arc<Mutex<Port<I>>>,
    /// Which session of the port this is.
    number: u64,
    session: u16,
}

#[derive(Debug)]
struct Port<I> {
    link: Link<I>,
    /// Counts sessions. Only the newest may use the link.
    number: u64,
    /// Whether the newest session still lives: then it reads, and meets the next HELLO.
    is_live: bool,
    /// A HELLO that was met, and whose answer is on its way.
    hello: Option<Nonce>,
    /// Who waits in [`GuestPort::poll_accept`].
    acceptor: Option<Waker>,
}

fn lock<I>(port: &Mutex<Port<I>>) -> MutexGuard<'_, Port<I>> {
    // Nothing is left half-changed by a panic: the state is a buffer and flags.
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<I: AsyncRead + AsyncWrite + Unpin> GuestPort<I> {
    /// Takes the port.
    pub fn new(io: I) -> Self {
        let port = Port { link: Link::new(io), number: 0, is_live: false, hello: None, acceptor: None };
        Self(Arc::new(Mutex::new(port)))
    }

    /// Waits for the host to begin a session.
    pub async fn accept(&mut self) -> io::Result<GuestSession<I>> {
        std::future::poll_fn(|context| self.poll_accept(context)).await
    }

    /// Waits for the host to begin a session.
    pub fn poll_accept(&mut self, context: &mut Context<'_>) -> Poll<io::Result<GuestSession<I>>> {
        let mut port = lock(&self.0);
        loop {
            if let Some(nonce) = port.hello {
                // The answer goes out before the session begins: its reader would not see to that.
                match ready!(port.link.poll_flush(context)) {
                    Ok(()) => {}
                    // The host is gone already. Reading tells the same, and goes on from there.
                    Err(_) => {
                        port.hello = None;
                        port.link.forget_outgoing();
                        continue;
                    }
                }
                port.hello = None;
                port.number += 1;
                port.is_live = true;
                let (number, session) = (port.number, nonce.session());
                return Poll::Ready(Ok(GuestSession { port: Arc::clone(&self.0), number, session }));
            }
            if port.is_live {
                port.acceptor = Some(context.waker().clone());
                return Poll::Pending;
            }
            // Between frames it reads frames, whosever they are: their bytes may contain anything, a HELLO too.
            let next =
                if port.link.skip_payload() { codec::next(port.link.incoming()) } else { Next::Incomplete };
            match next {
                Next::Item(Item::Hello(nonce)) => port.greet(nonce),
                Next::Item(Item::Data { length, .. }) => port.link.begin_stale(length),
                Next::Malformed => codec::skip_to_hello(port.link.incoming()),
                Next::Incomplete => {
                    if ready!(port.link.poll_fill(context))? == 0 {
                        port.link.reset();
                    }
                }
            }
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Port<I> {
    /// Prepares the answer to a HELLO; the acceptor sends it.
    fn greet(&mut self, nonce: Nonce) {
        // What the session before had still to say is of no use to anybody.
        self.link.forget_outgoing();
        self.link.queue(&nonce.answer());
        self.hello = Some(nonce);
    }
}

impl<I> Port<I> {
    /// Ends the session that lives; from now on the acceptor reads.
    fn end(&mut self) {
        self.is_live = false;
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.wake();
        }
    }
}

impl<I> GuestSession<I> {
    fn is_over(&self, port: &Port<I>) -> bool {
        port.number != self.number || !port.is_live
    }
}

impl<I> Drop for GuestSession<I> {
    fn drop(&mut self) {
        let mut port = lock(&self.port);
        if port.number == self.number {
            port.end();
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for GuestSession<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut port = lock(&self.port);
        if self.is_over(&port) {
            return Poll::Ready(Ok(()));
        }
        match ready!(port.link.poll_session(context, self.session, buffer))? {
            Read::Bytes => {}
            Read::Hello(nonce) => {
                port.greet(nonce);
                port.end();
            }
            Read::End => {
                port.link.reset();
                port.end();
            }
            // The acceptor looks for the next HELLO.
            Read::Malformed => port.end(),
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for GuestSession<I> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(buffer)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut port = lock(&self.port);
        if self.is_over(&port) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        port.link.poll_send(context, self.session, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut port = lock(&self.port);
        if self.is_over(&port) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        port.link.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}

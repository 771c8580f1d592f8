//! Bodies on their way: an upload that tells whether it moves, and an answer that keeps its place until its end.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use oc_mesh::error::{Reason, status};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tonic::{Status, body::Body};

use super::pool::Lease;

/// When an exchange last moved.
#[derive(Debug, Clone)]
pub struct Movement(Arc<Moved>);

#[derive(Debug)]
struct Moved {
    last: Mutex<Instant>,
    is_awaited: AtomicBool,
    is_over: AtomicBool,
}

impl Default for Movement {
    fn default() -> Self {
        let (is_awaited, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        Self(Arc::new(Moved { last: Mutex::new(Instant::now()), is_awaited, is_over }))
    }
}

impl Movement {
    /// It moves.
    pub fn note(&self) {
        *self.0.last.lock() = Instant::now();
    }

    /// When it last moved.
    #[must_use]
    pub fn last(&self) -> Instant {
        *self.0.last.lock()
    }

    /// Whether whoever it comes from has been asked for more, and has not sent it.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.0.is_awaited.load(Ordering::Relaxed) && !self.is_over()
    }

    /// Whether there is no more of it to come.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.is_over.load(Ordering::Acquire)
    }

    /// Waits until it has not moved for so long.
    pub async fn stopped(&self, patience: Duration) {
        loop {
            let until = self.last() + patience;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}

/// A request's body.
#[derive(Debug)]
pub struct Upload {
    inner: Body,
    movement: Option<Movement>,
}

impl Upload {
    /// The body, whose bytes `movement` is told of.
    #[must_use]
    pub fn new(inner: Body, movement: Movement) -> Self {
        Self { inner, movement: Some(movement) }
    }

    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Self { inner: Body::empty(), movement: None }
    }
}

impl Drop for Upload {
    /// Nobody sends any more of it: it is sent, or the connection is gone.
    fn drop(&mut self) {
        if let Some(movement) = &self.movement {
            movement.0.is_over.store(true, Ordering::Release);
        }
    }
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if let Some(movement) = &self.movement {
            movement.0.is_awaited.store(polled.is_pending(), Ordering::Relaxed);
            if polled.is_ready() {
                movement.note();
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// An answer's body. Its connection is given back at its end, once what was sent by it has left, and ended if that does not come.
#[derive(Debug)]
pub struct Answer {
    inner: Incoming,
    lease: Option<Lease>,
    /// What is sent meanwhile: a port may answer before it has all, and still wants the rest.
    upload: Option<Movement>,
    silence: Duration,
    silent: Option<Pin<Box<Sleep>>>,
}

impl Answer {
    /// The body, that ends when it is silent for too long.
    #[must_use]
    pub fn new(inner: Incoming, lease: Lease, upload: Option<Movement>, silence: Duration) -> Self {
        let mut answer = Self { inner, lease: Some(lease), upload, silence, silent: None };
        if answer.inner.is_end_stream() {
            answer.end();
        }
        answer
    }

    fn end(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        match self.upload.take().filter(|upload| !upload.is_over()) {
            None => lease.give_back(),
            Some(upload) => {
                tokio::spawn(lease.finish(upload, self.silence));
            }
        }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let mut polled = Pin::new(&mut this.inner).poll_frame(context);
        if let (Poll::Pending, Some(lease)) = (&polled, &mut this.lease) {
            lease.drive(context);
            polled = Pin::new(&mut this.inner).poll_frame(context);
        }
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.silent = None;
                if self.inner.is_end_stream() {
                    self.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.end();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                // Who waits for the rest must see that it does not come.
                tracing::debug!(%error, "a port broke off amid its answer");
                self.lease = None;
                Poll::Ready(Some(Err(status(Reason::PortReset, "the port broke off amid its answer"))))
            }
            Poll::Pending => {
                let silence = self.silence;
                let silent = self.silent.get_or_insert_with(|| Box::pin(sleep(silence)));
                if silent.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.lease = None;
                Poll::Ready(Some(Err(status(Reason::DeadlineExceeded, "the port was silent for too long"))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

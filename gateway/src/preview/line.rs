//! A connection to a port, as the HTTP/1.1 that is spoken over it.
//!
//! It has no task of its own: it moves while somebody sends by it or reads its answer, in the task of who does. That saves each
//! request two wakes of other tasks: switching between tasks was the largest single part of a request. What a port does to a connection that nobody uses is seen
//! when it is taken up again.

use std::{
    fmt,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    thread::{self, ThreadId},
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http1::{self, SendRequest},
    },
};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::{connection::PortStream, streamed::Upload, watched::Watched};
use crate::timer::Timer;

/// Bytes of an answer that are read at once, its head among them.
const BUFFER: usize = 256 << 10;

type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

/// A connection that requests are sent by, one after the other.
pub struct Line {
    sender: SendRequest<Upload>,
    /// What moves bytes; none once it has ended.
    driver: Option<Driver>,
    has_unsent: Arc<AtomicBool>,
    /// Whose event loop its bytes wake.
    thread: ThreadId,
    late: Timer,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// It did not come in time.
    Late,
    /// hyper's error, with the request if it was not sent.
    Broken(Box<TrySendError<Request<Upload>>>),
}

impl fmt::Debug for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Line").field("has_ended", &self.driver.is_none()).finish_non_exhaustive()
    }
}

impl Line {
    /// Over a connection that is open.
    ///
    /// # Errors
    /// hyper's.
    pub async fn new(stream: PortStream) -> hyper::Result<Self> {
        let (stream, has_unsent) = Watched::new(stream);
        let (sender, connection) =
            http1::Builder::new().max_buf_size(BUFFER).handshake(TokioIo::new(stream)).await?;
        let driver: Driver = Box::pin(connection.with_upgrades());
        let (driver, thread) = (Some(driver), thread::current().id());
        Ok(Self { sender, driver, has_unsent, thread, late: Timer::default() })
    }

    /// Whether it was made by this thread: others have to be woken by that one.
    #[must_use]
    pub fn is_of_this_thread(&self) -> bool {
        self.thread == thread::current().id()
    }

    /// Moves what can be moved now.
    pub fn drive(&mut self, context: &mut Context<'_>) {
        let Some(driver) = &mut self.driver else { return };
        if let Poll::Ready(ended) = driver.as_mut().poll(context) {
            self.driver = None;
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection to a port broke");
            }
        }
    }

    /// Waits until it takes a request.
    ///
    /// # Errors
    /// It has ended.
    pub async fn ready(&mut self) -> hyper::Result<()> {
        poll_fn(|context| {
            self.drive(context);
            self.sender.poll_ready(context)
        })
        .await
    }

    /// Sends a request, and waits for the beginning of the answer, for as long as `until` says. The rest comes while that is read and
    /// this is [driven](Self::drive).
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn send(
        &mut self,
        request: Request<Upload>,
        until: impl Fn() -> Instant,
    ) -> Result<Response<Incoming>, Unanswered> {
        let mut sent = pin!(self.sender.try_send_request(request));
        let (driver, late) = (&mut self.driver, &mut self.late);
        poll_fn(|context| {
            if let Some(moving) = driver
                && moving.as_mut().poll(context).is_ready()
            {
                *driver = None;
            }
            match sent.as_mut().poll(context) {
                Poll::Ready(sent) => Poll::Ready(sent.map_err(|error| Unanswered::Broken(Box::new(error)))),
                Poll::Pending => late.poll(context, until()).map(|()| Err(Unanswered::Late)),
            }
        })
        .await
    }

    /// Moves until it has ended, or has been switched over.
    pub async fn finish(mut self) {
        if let Some(driver) = self.driver.take() {
            let _ = driver.await;
        }
    }

    /// Whether something that is sent by it has not left, as far as it was driven.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        self.has_unsent.load(Ordering::Relaxed)
    }

    /// Whether it is known to have ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.driver.is_none() || self.sender.is_closed()
    }
}

//! Answers by HTTP/2 that their client does not take.
//!
//! Who takes nothing at all is ended by the kernel. By HTTP/2 a client can take everything but what one stream has for it, whose window it
//! keeps closed. hyper waits for that window for as long as the connection lives, and asks the answer's body for nothing meanwhile. So each
//! [`Part`] of an answer tells when it is written, and [`Streams`] drops the task of a stream that has something of which nothing was written for
//! too long, and all that the request holds with it: h2 resets the stream. Where a port is silent nothing is there, and the stream may wait.

use std::{
    future::poll_fn,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::rt::Executor;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::timer::Timer;

/// Bytes of an answer that may be left to h2 when its stream's task ends: nobody looks any more whether they are taken.
const LEFT: usize = 16 << 10;
/// Bytes of all answers on a connection that may be there when something is left.
const LEFT_IN_ALL: usize = 256 << 10;

tokio::task_local! {
    /// What is there for the client of the stream that this task serves.
    static STREAM: Arc<Untaken>;
}

/// What runs the streams of one connection.
#[derive(Debug, Clone)]
pub struct Streams {
    within: Duration,
    peer: IpAddr,
    /// Bytes that are there for the client and were not written, on all streams.
    there: Arc<AtomicUsize>,
}

impl Streams {
    /// Each for as long as its client takes something within this time.
    pub fn new(within: Duration, peer: IpAddr) -> Self {
        Self { within, peer, there: Arc::default() }
    }

    async fn serve(self, stream: impl Future<Output = ()>, untaken: Arc<Untaken>) {
        let mut stream = pin!(stream);
        let mut late = Timer::default();
        poll_fn(|context| {
            if stream.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            let Some(since) = untaken.since() else { return Poll::Pending };
            ready!(late.poll(context, since + self.within));
            tracing::debug!(peer = %self.peer, "an answer is broken off: its client takes nothing of it");
            Poll::Ready(())
        })
        .await;
    }
}

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let untaken = Arc::new(Untaken { in_all: Arc::clone(&self.there), ..Untaken::default() });
        let served = self.clone().serve(stream, Arc::clone(&untaken));
        tokio::spawn(STREAM.scope(untaken, served));
    }
}

/// What is there of an answer, and was not written.
#[derive(Debug, Default)]
struct Untaken {
    own: Mutex<There>,
    /// [`Streams::there`].
    in_all: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct There {
    bytes: usize,
    /// Those among them that are parts of something large.
    large: usize,
    /// When some were written last, or the first of them came.
    since: Instant,
    /// Waits until they may be left to h2.
    waits: Option<Waker>,
}

impl There {
    fn may_be_left(&self, in_all: &AtomicUsize) -> bool {
        let is_little = || self.bytes <= LEFT && in_all.load(Ordering::Relaxed) <= LEFT_IN_ALL;
        // Of what is too much with others' nobody is told when theirs gets less: it waits until its own is written, or for too long.
        self.large == 0 && (self.bytes == 0 || is_little())
    }
}

impl Default for There {
    fn default() -> Self {
        Self { bytes: 0, large: 0, since: Instant::now(), waits: None }
    }
}

impl Untaken {
    /// Since when nothing was written of what is there, if something is.
    fn since(&self) -> Option<Instant> {
        let there = self.own.lock();
        (there.bytes > 0).then_some(there.since)
    }

    fn add(&self, bytes: usize, is_large: bool) {
        self.in_all.fetch_add(bytes, Ordering::Relaxed);
        let mut there = self.own.lock();
        if there.bytes == 0 {
            there.since = Instant::now();
        }
        there.bytes += bytes;
        there.large += if is_large { bytes } else { 0 };
    }

    fn remove(&self, bytes: usize, is_large: bool) {
        if bytes == 0 {
            return;
        }
        self.in_all.fetch_sub(bytes, Ordering::Relaxed);
        let mut there = self.own.lock();
        there.since = Instant::now();
        there.bytes -= bytes;
        there.large -= if is_large { bytes } else { 0 };
        let woken = if there.may_be_left(&self.in_all) { there.waits.take() } else { None };
        drop(there);
        if let Some(woken) = woken {
            woken.wake();
        }
    }

    fn may_be_left(&self) -> bool {
        self.own.lock().may_be_left(&self.in_all)
    }

    /// Waits until what is there may be left to h2.
    fn poll_left(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut there = self.own.lock();
        if there.may_be_left(&self.in_all) {
            return Poll::Ready(());
        }
        there.waits = Some(context.waker().clone());
        Poll::Pending
    }
}

/// A part of an answer, on its way.
#[derive(Debug)]
pub struct Part {
    bytes: Bytes,
    is_large: bool,
    untaken: Arc<Untaken>,
}

impl Part {
    fn new(bytes: Bytes, untaken: &Arc<Untaken>) -> Self {
        let is_large = bytes.len() > LEFT;
        // Few bytes may be a piece of many, that would be kept with them.
        let bytes = if is_large { bytes } else { Bytes::copy_from_slice(&bytes) };
        untaken.add(bytes.len(), is_large);
        Self { bytes, is_large, untaken: Arc::clone(untaken) }
    }
}

impl Buf for Part {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.untaken.remove(count, self.is_large);
    }
}

impl Drop for Part {
    /// What is thrown away is not waited for.
    fn drop(&mut self) {
        self.untaken.remove(self.bytes.len(), self.is_large);
    }
}

/// An answer's body, in parts. It ends once those may be left to h2, and the stream's task with it.
#[derive(Debug)]
pub struct Given<B> {
    body: B,
    /// What comes behind the last part, once that is known: trailers, or nothing.
    end: Option<Option<HeaderMap>>,
    untaken: Arc<Untaken>,
}

/// The body of the answer on the stream that this task serves.
pub fn give<B>(body: B) -> Given<B> {
    Given { body, end: None, untaken: STREAM.try_with(Arc::clone).unwrap_or_default() }
}

impl<B> Body for Given<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Part;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Part>, B::Error>>> {
        let this = self.get_mut();
        while this.end.is_none() {
            if this.body.is_end_stream() {
                this.end = Some(None);
                break;
            }
            match ready!(Pin::new(&mut this.body).poll_frame(context)).transpose() {
                Ok(Some(frame)) => match frame.into_data() {
                    Ok(data) => return Poll::Ready(Some(Ok(Frame::data(Part::new(data, &this.untaken))))),
                    // There is no third kind.
                    Err(frame) => this.end = Some(frame.into_trailers().ok()),
                },
                Ok(None) => this.end = Some(None),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        ready!(this.untaken.poll_left(context));
        let trailers = this.end.as_mut().and_then(Option::take);
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        let has_ended = self.end.as_ref().map_or_else(|| self.body.is_end_stream(), Option::is_none);
        has_ended && self.untaken.may_be_left()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::pending};

    use futures_util::{future::poll_immediate, stream};
    use http_body_util::{BodyExt as _, StreamBody};
    use tokio::time::{sleep, timeout};

    use super::*;

    const WITHIN: Duration = Duration::from_secs(300);
    const SECOND: Duration = Duration::from_secs(1);

    fn part(untaken: &Arc<Untaken>, bytes: usize) -> Part {
        Part::new(Bytes::from(vec![1; bytes]), untaken)
    }

    /// Serves a stream that does not end by itself: how long it is served, if that has an end.
    async fn served(stream: impl Future<Output = ()>, untaken: &Arc<Untaken>) -> Option<Duration> {
        let streams = Streams::new(WITHIN, IpAddr::from([127, 0, 0, 1]));
        let begun = Instant::now();
        let stream = async {
            stream.await;
            pending::<()>().await
        };
        let ended = timeout(WITHIN * 20, streams.serve(stream, Arc::clone(untaken))).await;
        ended.is_ok().then(|| begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_which_nothing_is_taken_for_too_long_is_ended() {
        let untaken = Arc::<Untaken>::default();
        let _held = part(&untaken, 100_000);
        assert_eq!(served(async {}, &untaken).await, Some(WITHIN));
    }

    #[tokio::test(start_paused = true)]
    async fn one_of_which_something_is_taken_now_and_then_is_not() {
        let untaken = Arc::<Untaken>::default();
        let mut held = part(&untaken, 100_000);
        let slow = async {
            for _ in 0..5 {
                sleep(WITHIN - SECOND).await;
                held.advance(1);
            }
        };
        assert_eq!(served(slow, &untaken).await, Some((WITHIN - SECOND) * 5 + WITHIN));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_has_nothing_waits_for_as_long_as_it_takes() {
        let untaken = Arc::<Untaken>::default();
        let taken = async {
            for bytes in [1, 100_000] {
                sleep(WITHIN * 2).await;
                let mut taken = part(&untaken, bytes);
                sleep(SECOND).await;
                taken.advance(bytes);
            }
            // What is thrown away is not waited for either.
            sleep(WITHIN * 2).await;
            drop(part(&untaken, 100_000));
        };
        assert_eq!(served(taken, &untaken).await, None);
    }

    #[tokio::test]
    async fn an_answer_ends_once_what_is_left_of_it_is_little() {
        for trailers in [false, true] {
            let sizes = [LEFT * 4, LEFT / 2, LEFT / 2 + 1];
            let mut frames: Vec<_> = sizes
                .map(|size| Ok::<_, Infallible>(Frame::data(Bytes::from(vec![1; size]))))
                .into_iter()
                .collect();
            if trailers {
                frames.push(Ok(Frame::trailers(HeaderMap::new())));
            }
            let mut body = give(StreamBody::new(stream::iter(frames)));
            let mut parts = Vec::new();
            for size in sizes {
                let part = body.frame().await.unwrap().unwrap().into_data().unwrap();
                assert_eq!(part.remaining(), size);
                parts.push(part);
            }
            assert!(poll_immediate(body.frame()).await.is_none());
            // Of what is large nothing may be left.
            parts[0].advance(LEFT * 4 - 1);
            parts[1].advance(LEFT / 2);
            assert!(poll_immediate(body.frame()).await.is_none() && !body.is_end_stream());
            parts[0].advance(1);
            assert_eq!(body.is_end_stream(), !trailers);
            let end = poll_immediate(body.frame()).await.expect("it does not end");
            assert_eq!(end.is_some_and(|end| end.unwrap().is_trailers()), trailers);
            assert!(body.is_end_stream() && body.frame().await.is_none());
        }
    }

    #[tokio::test]
    async fn what_is_little_by_itself_is_too_much_with_many() {
        let streams = Streams::new(WITHIN, IpAddr::from([127, 0, 0, 1]));
        let answer = || Arc::new(Untaken { in_all: Arc::clone(&streams.there), ..Untaken::default() });
        let left: Vec<_> = (0..LEFT_IN_ALL / LEFT).map(|_| part(&answer(), LEFT)).collect();
        assert!(left.iter().all(|part| part.untaken.may_be_left()));
        let untaken = answer();
        let mut last = part(&untaken, 2);
        assert!(!untaken.may_be_left());
        last.advance(1);
        assert!(poll_immediate(poll_fn(|context| untaken.poll_left(context))).await.is_none());
        last.advance(1);
        assert!(untaken.may_be_left(), "all of it is written");
        let another = part(&untaken, 1);
        drop(left);
        assert!(untaken.may_be_left());
        drop((another, last));
        assert_eq!(streams.there.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_is_small_ends_with_its_only_part() {
        let mut body = give(tonic::body::Body::new(http_body_util::Full::new(Bytes::from("short"))));
        assert!(!body.is_end_stream());
        let part = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(part.chunk() == b"short" && body.is_end_stream());
    }
}

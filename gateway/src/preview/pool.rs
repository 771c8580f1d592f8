//! Places and connections, sandbox by sandbox.
//!
//! A request holds one of its sandbox's places from before it is connected until the end of its answer, so that one sandbox takes
//! no more than its share of the gateway and of its own host, and waits behind nobody else's; not many more wait. A connection whose answer has
//! ended is kept for the next request to the same port, for a moment only: an open one counts as use of the sandbox.

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::poll_immediate;
use oc_mesh::error::{Reason, status};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Limits, line::Line, streamed::Movement};

/// Requests that wait for a place of one sandbox at most: each is one of those that the gateway answers at all.
const WAITING_PER_SANDBOX: usize = 512;
/// Connections that a sandbox's requests leave behind at most. With those in use, fewer than a guest has room for.
const KEPT_PER_SANDBOX: usize = 64;
/// How often connections that are kept are looked at.
const SWEEP: Duration = Duration::from_secs(1);
/// How long a connection that has just been given back may take to be ready again.
const READY: Duration = Duration::from_millis(20);

/// All sandboxes' places and connections. Clones are the same.
#[derive(Debug, Clone)]
pub struct Pool {
    limits: Limits,
    sandboxes: Arc<Mutex<HashMap<String, Arc<Shelf>>>>,
}

/// One sandbox's.
#[derive(Debug)]
struct Shelf {
    places: Arc<Semaphore>,
    waiting: Semaphore,
    kept: Mutex<Vec<Kept>>,
}

#[derive(Debug)]
struct Kept {
    port: u16,
    line: Line,
    since: Instant,
}

/// A request's place among those of its sandbox.
#[derive(Debug)]
pub struct Place {
    shelf: Arc<Shelf>,
    port: u16,
    _permit: OwnedSemaphorePermit,
}

/// A place, with the connection that it uses.
#[derive(Debug)]
pub struct Lease {
    place: Place,
    line: Line,
}

impl Pool {
    /// Nobody's yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, sandboxes: Arc::default() }
    }

    /// A place for a request to a port.
    ///
    /// # Errors
    /// `OVERLOADED` if the sandbox has none in time, or too many wait for one.
    pub async fn place(&self, sandbox_id: &str, port: u16) -> Result<Place, Status> {
        let shelf = {
            let mut sandboxes = self.sandboxes.lock();
            match sandboxes.get(sandbox_id) {
                Some(shelf) => Arc::clone(shelf),
                None => {
                    let places = Arc::new(Semaphore::new(self.limits.per_sandbox));
                    let waiting = Semaphore::new(WAITING_PER_SANDBOX);
                    let shelf = Arc::new(Shelf { places, waiting, kept: Mutex::default() });
                    sandboxes.insert(sandbox_id.to_owned(), Arc::clone(&shelf));
                    shelf
                }
            }
        };
        if let Ok(permit) = Arc::clone(&shelf.places).try_acquire_owned() {
            return Ok(Place { shelf, port, _permit: permit });
        }
        let waited = async {
            let _waits = shelf.waiting.try_acquire().ok()?;
            // The semaphore is never closed: only time runs out.
            timeout(self.limits.place, Arc::clone(&shelf.places).acquire_owned()).await.ok()?.ok()
        };
        match waited.await {
            Some(permit) => Ok(Place { shelf, port, _permit: permit }),
            None => {
                metrics::counter!("oc_gateway_shed_total").increment(1);
                Err(status(
                    Reason::Overloaded,
                    "the sandbox has as many requests to its ports as it may have",
                ))
            }
        }
    }

    /// Ends connections that nobody has used for a while, and forgets sandboxes that have none, until `ended`.
    pub async fn sweep(self, ended: CancellationToken) {
        let mut tick = interval(SWEEP.min(self.limits.kept));
        while ended.run_until_cancelled(tick.tick()).await.is_some() {
            let kept = self.limits.kept;
            self.sandboxes.lock().retain(|_, shelf| {
                let mut connections = shelf.kept.lock();
                connections.retain(|kept_one| kept_one.since.elapsed() < kept && !kept_one.line.has_ended());
                !connections.is_empty() || Arc::strong_count(shelf) > 1
            });
        }
        self.clear();
    }

    /// Ends all connections that are kept.
    pub fn clear(&self) {
        self.sandboxes.lock().clear();
    }
}

impl Place {
    /// A connection that was kept, if there is one that still stands: the one that was used last, of those that this thread hears of by
    /// itself if there are any.
    pub async fn kept(&self) -> Option<Line> {
        loop {
            let mut line = {
                let mut kept = self.shelf.kept.lock();
                let of_port = |kept: &Kept| kept.port == self.port;
                let near = kept.iter().rposition(|kept| of_port(kept) && kept.line.is_of_this_thread());
                let at = near.or_else(|| kept.iter().rposition(of_port))?;
                kept.remove(at).line
            };
            let is_ready = match poll_immediate(line.ready()).await {
                Some(ready) => ready.is_ok(),
                None => matches!(timeout(READY, line.ready()).await, Ok(Ok(()))),
            };
            if is_ready {
                return Some(line);
            }
        }
    }

    /// Takes a connection into use.
    #[must_use]
    pub fn with(self, line: Line) -> Lease {
        Lease { place: self, line }
    }
}

impl Lease {
    /// Moves the connection.
    pub fn drive(&mut self, context: &mut Context<'_>) {
        self.line.drive(context);
    }

    /// Goes on with what is sent by the connection until all has left, or has not moved for so long, and gives it back.
    pub async fn finish(mut self, upload: Movement, patience: Duration) {
        let sending = poll_fn(|context| {
            self.line.drive(context);
            let is_sent = upload.is_over() && !self.line.has_unsent();
            if is_sent || self.line.has_ended() { Poll::Ready(()) } else { Poll::Pending }
        });
        tokio::select! {
            () = sending => {}
            () = upload.stopped(patience) => return,
        }
        self.give_back();
    }

    /// Keeps the connection for the next request, and frees the place.
    pub fn give_back(self) {
        let Self { place, line } = self;
        if line.has_ended() {
            return;
        }
        let mut kept = place.shelf.kept.lock();
        if kept.len() >= KEPT_PER_SANDBOX {
            kept.remove(0);
        }
        kept.push(Kept { port: place.port, line, since: Instant::now() });
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test]
    async fn some_wait_for_a_place_and_the_others_are_refused_at_once() {
        let pool =
            Pool::new(Limits { per_sandbox: 1, place: Duration::from_secs(3600), ..Limits::default() });
        let held = pool.place("sb-1", 80).await.unwrap();
        let mut waiting = Vec::new();
        for _ in 0..WAITING_PER_SANDBOX {
            let mut place = Box::pin(pool.place("sb-1", 80));
            assert!(poll_immediate(&mut place).await.is_none(), "it waits");
            waiting.push(place);
        }
        let refused = poll_immediate(pin!(pool.place("sb-1", 81))).await.expect("it waits, too").unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        // Of another sandbox, and once one of them has gone.
        pool.place("sb-2", 80).await.unwrap();
        waiting.pop();
        assert!(poll_immediate(pin!(pool.place("sb-1", 80))).await.is_none());
        drop(held);
        assert!(poll_immediate(&mut waiting[0]).await.is_some(), "who came first has it");
    }
}

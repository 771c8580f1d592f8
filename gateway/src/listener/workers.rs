//! Threads that connections live on, each from its first byte to its last, and each thread with an event loop of its own.
//!
//! A request is a handful of short steps between reads and writes. Where any thread may take the next step, most of them begin by
//! waking one: on threads of their own they begin when the thread gets to them.

mod slice;
pub(super) mod turn;

use std::{
    io,
    num::NonZero,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle},
    task::spawn_blocking,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long the end of a thread waits for what it has handed to others, such as a read of the store's file.
const ENDS_WITHIN: Duration = Duration::from_secs(1);

/// The threads. What lives on them ends with this.
#[derive(Debug)]
pub struct Workers {
    loops: Vec<Handle>,
    next: AtomicUsize,
    threads: Vec<JoinHandle<()>>,
    end: DropGuard,
}

impl Workers {
    /// Starts one for each processor that this process may use.
    ///
    /// # Errors
    ///
    /// If the system does not permit.
    pub fn start() -> io::Result<Self> {
        let ended = CancellationToken::new();
        let mut workers = Self::on(Vec::new(), ended.clone());
        let count = thread::available_parallelism().map_or(1, NonZero::get);
        for number in 0..count {
            let (tell, told) = mpsc::channel();
            let ended = ended.clone();
            let mut builder = Builder::new_current_thread();
            builder.enable_all().on_thread_unpark(turn::begin);
            let work = move || match builder.build() {
                Ok(runtime) => {
                    let _ = tell.send(Ok(runtime.handle().clone()));
                    slice::shorten();
                    runtime.block_on(ended.cancelled());
                    runtime.shutdown_timeout(ENDS_WITHIN);
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                }
            };
            workers.threads.push(thread::Builder::new().name(format!("edge-{number}")).spawn(work)?);
            workers.loops.push(told.recv().map_err(io::Error::other)??);
        }
        Ok(workers)
    }

    /// The one that runs this.
    #[must_use]
    pub fn here() -> Self {
        Self::on(vec![Handle::current()], CancellationToken::new())
    }

    fn on(loops: Vec<Handle>, ended: CancellationToken) -> Self {
        Self { loops, next: AtomicUsize::new(0), threads: Vec::new(), end: ended.drop_guard() }
    }

    /// Where the next connection goes: to each in turn.
    pub(super) fn next(&self) -> &Handle {
        &self.loops[self.next.fetch_add(1, Ordering::Relaxed) % self.loops.len()]
    }

    /// Ends what still lives there, and waits until it has ended: a request that is broken off is logged, and its port told.
    pub(super) async fn end(self) {
        let Self { threads, end, .. } = self;
        drop(end);
        let joined = spawn_blocking(|| threads.into_iter().for_each(|thread| drop(thread.join())));
        if let Err(error) = joined.await {
            tracing::error!(%error, "threads of connections have not ended");
        }
    }
}

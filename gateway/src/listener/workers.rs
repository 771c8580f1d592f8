//! Threads that connections live on, each from its first byte to its last, and each thread with an event loop of its own.
//!
//! A request is a handful of short steps between reads and writes. Where any thread may take the next step, most of them begin by
//! waking one: on threads of their own they begin when the thread gets to them.

mod slice;

use std::{
    io,
    num::NonZero,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// The threads. Their tasks end with the token that they were started with.
#[derive(Debug)]
pub struct Workers {
    loops: Vec<Handle>,
    next: AtomicUsize,
}

impl Workers {
    /// Starts one for each processor that this process may use, until `ended`.
    ///
    /// # Errors
    ///
    /// If the system does not permit.
    pub fn start(ended: &CancellationToken) -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, NonZero::get);
        let started = (0..count).map(|number| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let (handle, ended) = (runtime.handle().clone(), ended.clone());
            let work = move || {
                slice::shorten();
                runtime.block_on(ended.cancelled());
            };
            thread::Builder::new().name(format!("edge-{number}")).spawn(work)?;
            Ok(handle)
        });
        Ok(Self { loops: started.collect::<io::Result<_>>()?, next: AtomicUsize::new(0) })
    }

    /// The one that runs this.
    #[must_use]
    pub fn here() -> Self {
        Self { loops: vec![Handle::current()], next: AtomicUsize::new(0) }
    }

    /// Where the next connection goes: to each in turn.
    pub(super) fn next(&self) -> &Handle {
        &self.loops[self.next.fetch_add(1, Ordering::Relaxed) % self.loops.len()]
    }
}

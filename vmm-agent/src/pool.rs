//! The warm pool: clones that are restored, warmed up and paused before anybody asks for one.
//!
//! One task keeps the shelves as [`plan`] wants them: it makes what is missing, evicts what is too much or what
//! the host's memory no longer bears, and notices the death of a clone that waits. Taking one is a pop under a
//! lock. Creates come first: while one is in progress nothing new is made, and shortly after one the shelf is
//! left alone unless it runs low, because the new sandbox's first command wants the processors.
//!
//! A clone that is made, evicted or dead is removed by the pool; one that was taken belongs to whoever took it.

pub mod plan;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::plan::{Room, Step, plan};
use crate::{
    capacity,
    microvm::{Kind, MakeError, MicroVm},
    telemetry,
    workshop::Workshop,
};

/// The host's memory and disk are looked at this often.
const TICK: Duration = Duration::from_secs(2);
/// A clone that is not ready by then is given up; the first of a kind waits for its golden snapshot.
const MAKE_DEADLINE: Duration = Duration::from_secs(240);
/// How long a shelf that is at least half full is left alone after a create.
const QUIET: Duration = Duration::from_millis(250);
/// Waits between attempts to make a kind of clone that failed: from the first to the last.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the pool should hold, and what it must leave.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How many clones of which kind.
    pub shelves: Vec<(Kind, usize)>,
    /// Clones that may be made at the same time.
    pub parallel: usize,
    /// Memory that must stay available, MiB.
    pub memory_reserve_mb: u64,
    /// What a waiting clone is expected to take, MiB.
    pub clone_mb: u64,
    /// Disk space that must stay free, MiB.
    pub disk_reserve_mb: u64,
    /// Where the disks lie.
    pub data_dir: PathBuf,
}

/// The pool. Clones of this handle are the same pool.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    workshop: Arc<Workshop>,
    settings: Settings,
    shelves: Mutex<Vec<Shelf>>,
    creates: AtomicUsize,
    last_create: Mutex<Option<Instant>>,
    wake: Notify,
    ready: watch::Sender<usize>,
}

#[derive(Debug)]
struct Shelf {
    kind: Kind,
    target: usize,
    ready: Vec<Waiting>,
    making: usize,
    failures: u32,
    rests_until: Option<Instant>,
}

#[derive(Debug)]
struct Waiting {
    microvm: MicroVm,
    watcher: AbortHandle,
}

/// Holds the refill back while it lives.
#[derive(Debug)]
pub struct PutOff(Pool);

impl Drop for PutOff {
    fn drop(&mut self) {
        *self.0.0.last_create.lock() = Some(Instant::now());
        self.0.0.creates.fetch_sub(1, Ordering::Relaxed);
        self.0.0.wake.notify_one();
    }
}

/// What a task of the pool has come to.
enum Done {
    Made { kind: Kind, made: Result<MicroVm, MakeError> },
    Died { kind: Kind, vm: String },
    Removed,
}

impl Pool {
    /// An empty pool; [`Pool::run`] fills it.
    pub fn new(workshop: Arc<Workshop>, settings: Settings) -> Self {
        let shelves = settings
            .shelves
            .iter()
            .map(|(kind, target)| Shelf {
                kind: kind.clone(),
                target: *target,
                ready: Vec::new(),
                making: 0,
                failures: 0,
                rests_until: None,
            })
            .collect();
        Self(Arc::new(Inner {
            workshop,
            settings,
            shelves: Mutex::new(shelves),
            creates: AtomicUsize::new(0),
            last_create: Mutex::new(None),
            wake: Notify::new(),
            ready: watch::Sender::new(0),
        }))
    }

    /// Takes a clone that waits, if there is one. It is paused, and belongs to the caller.
    pub fn take(&self, kind: &Kind) -> Option<MicroVm> {
        let mut shelves = self.0.shelves.lock();
        let shelf = shelves.iter_mut().find(|shelf| shelf.kind == *kind)?;
        // The newest: its pages are the likeliest to be in the processor's and the host's caches.
        let waiting = shelf.ready.pop()?;
        waiting.watcher.abort();
        self.publish(&shelves);
        drop(shelves);
        self.0.wake.notify_one();
        Some(waiting.microvm)
    }

    /// Holds the refill back until the guard is dropped.
    pub fn put_off_refill(&self) -> PutOff {
        self.0.creates.fetch_add(1, Ordering::Relaxed);
        PutOff(self.clone())
    }

    /// How many clones wait.
    pub fn ready(&self) -> watch::Receiver<usize> {
        self.0.ready.subscribe()
    }

    /// Keeps the pool filled until `cancel`, then removes every clone that waits.
    pub async fn run(self, cancel: CancellationToken) {
        let mut tasks = JoinSet::new();
        while !cancel.is_cancelled() {
            self.tend(&mut tasks, &cancel);
            tokio::select! {
                () = self.0.wake.notified() => {}
                () = sleep(TICK.min(QUIET)), if self.is_quiet() => {}
                () = sleep(TICK) => {}
                Some(done) = tasks.join_next() => self.settle(done, &mut tasks),
                () = cancel.cancelled() => {}
            }
        }
        for waiting in self.0.shelves.lock().iter_mut().flat_map(|shelf| shelf.ready.drain(..)) {
            waiting.watcher.abort();
            remove(waiting.microvm, &mut tasks);
        }
        while let Some(done) = tasks.join_next().await {
            self.settle_last(done, &mut tasks);
        }
        self.publish(&self.0.shelves.lock());
    }

    /// Does what the plan says.
    fn tend(&self, tasks: &mut JoinSet<Done>, cancel: &CancellationToken) {
        let settings = &self.0.settings;
        let room = match capacity::measure(&settings.data_dir) {
            Ok(room) => room,
            Err(error) => {
                warn!(%error, "cannot measure the host; the pool stays as it is");
                return;
            }
        };
        let now = Instant::now();
        let quiet = self.is_quiet();
        let mut shelves = self.0.shelves.lock();
        let view: Vec<_> = shelves
            .iter()
            .map(|shelf| plan::Shelf {
                target: shelf.target,
                ready: shelf.ready.len(),
                making: shelf.making,
                resting: shelf.rests_until.is_some_and(|until| now < until)
                    || (quiet && shelf.ready.len() * 2 >= shelf.target),
            })
            .collect();
        let steps = plan(
            &view,
            Room {
                available_mb: room.memory_mb,
                reserve_mb: settings.memory_reserve_mb,
                clone_mb: settings.clone_mb,
                disk: room.disk_mb >= settings.disk_reserve_mb,
                creates: self.0.creates.load(Ordering::Relaxed),
                parallel: settings.parallel,
            },
        );
        for step in steps {
            match step {
                Step::Make(index) => {
                    shelves[index].making += 1;
                    let (workshop, kind) = (self.0.workshop.clone(), shelves[index].kind.clone());
                    let cancel = cancel.clone();
                    tasks.spawn(async move {
                        let made = make(workshop, kind.clone(), cancel).await;
                        Done::Made { kind, made }
                    });
                }
                Step::Evict(index) => {
                    // The oldest: the newest is taken first.
                    let waiting = shelves[index].ready.remove(0);
                    waiting.watcher.abort();
                    info!(vm = waiting.microvm.id(), "evicted from the pool");
                    remove(waiting.microvm, tasks);
                }
            }
        }
        self.publish(&shelves);
    }

    fn settle(&self, done: Result<Done, tokio::task::JoinError>, tasks: &mut JoinSet<Done>) {
        let mut shelves = self.0.shelves.lock();
        match done {
            Ok(Done::Made { kind, made }) => {
                let Some(shelf) = shelves.iter_mut().find(|shelf| shelf.kind == kind) else { return };
                shelf.making -= 1;
                match made {
                    Ok(microvm) => {
                        shelf.failures = 0;
                        shelf.rests_until = None;
                        let (exit, vm) = (microvm.exit(), microvm.id().to_owned());
                        let watcher = tasks.spawn(async move {
                            exit.await;
                            Done::Died { kind, vm }
                        });
                        debug!(vm = microvm.id(), "waits in the pool");
                        shelf.ready.push(Waiting { microvm, watcher });
                    }
                    Err(error) => {
                        let rest = REST.0.saturating_mul(1 << shelf.failures.min(6)).min(REST.1);
                        shelf.failures += 1;
                        shelf.rests_until = Some(Instant::now() + rest);
                        warn!(%kind, %error, rest_ms = rest.as_millis(), "cannot make a clone for the pool");
                        telemetry::pool_failed();
                    }
                }
            }
            Ok(Done::Died { kind, vm }) => {
                let Some(shelf) = shelves.iter_mut().find(|shelf| shelf.kind == kind) else { return };
                let Some(at) = shelf.ready.iter().position(|waiting| waiting.microvm.id() == vm) else {
                    return;
                };
                let waiting = shelf.ready.remove(at);
                warn!(vm, console = waiting.microvm.console_tail(), "a clone died in the pool");
                telemetry::pool_failed();
                remove(waiting.microvm, tasks);
            }
            Ok(Done::Removed) => {}
            // A watcher whose clone was taken.
            Err(error) if error.is_cancelled() => {}
            Err(error) => warn!(%error, "a task of the pool panicked"),
        }
        self.publish(&shelves);
    }

    /// As [`Pool::settle`], for a pool that ends.
    fn settle_last(&self, done: Result<Done, tokio::task::JoinError>, tasks: &mut JoinSet<Done>) {
        if let Ok(Done::Made { made: Ok(microvm), .. }) = done {
            remove(microvm, tasks);
        }
    }

    fn is_quiet(&self) -> bool {
        self.0.last_create.lock().is_some_and(|last| last.elapsed() < QUIET)
    }

    fn publish(&self, shelves: &[Shelf]) {
        let ready = shelves.iter().map(|shelf| shelf.ready.len()).sum();
        telemetry::pool_ready(ready);
        self.0.ready.send_if_modified(|known| std::mem::replace(known, ready) != ready);
    }
}

/// Makes a clone that waits; on any failure, and when the pool ends, what was made is removed.
async fn make(workshop: Arc<Workshop>, kind: Kind, cancel: CancellationToken) -> Result<MicroVm, MakeError> {
    let mut slot = None;
    let made = tokio::select! {
        made = timeout(MAKE_DEADLINE, workshop.pooled(&kind, &mut slot)) => {
            made.unwrap_or(Err(MakeError::Late))
        }
        () = cancel.cancelled() => Err(MakeError::Cancelled),
    };
    match (made, slot) {
        (Ok(()), Some(microvm)) => Ok(microvm),
        (Ok(()), None) => Err(MakeError::Cancelled),
        (Err(error), slot) => {
            if let Some(mut microvm) = slot {
                microvm.destroy().await;
            }
            Err(error)
        }
    }
}

fn remove(mut microvm: MicroVm, tasks: &mut JoinSet<Done>) {
    tasks.spawn(async move {
        microvm.destroy().await;
        Done::Removed
    });
}

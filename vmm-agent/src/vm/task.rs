//! The task that owns one sandbox's VM, and the handle that everybody else holds.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, info, warn};

use crate::{
    backend::{Captured, Guest, Wanted},
    identity::Epoch,
    journal::{Owner, Stage, StartPath},
    microvm::{MakeError, MicroVm},
    telemetry,
    tombstones::Tombstones,
    vm::{
        activity::{Activity, Call, Closed, MAX_CALLS, NoCall},
        decide::{Denied, Input, Phase, Transition, decide},
        halt, sleep,
        start::{Order, Origin, StartError, Starter},
    },
};

/// Requests that wait for the task; a caller beyond that waits for room.
const QUEUE: usize = 16;
/// What a VM has changed is written at the disk's pace.
const CAPTURE_DEADLINE: Duration = Duration::from_secs(300);
/// How often a VMM is asked how its VM fares.
const LOOKS_EVERY: Duration = Duration::from_secs(5);

/// What is known of a sandbox's VM at one moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where it is in its life.
    pub phase: Phase,
    /// How it was started, once it was.
    pub path: Option<StartPath>,
    /// What its guest has made its own when it was told who it is.
    pub renewed: Arc<[String]>,
    /// Why it is lost.
    pub failure: Option<Arc<str>>,
    /// Why it could not be started, or woken.
    pub start_error: Option<StartError>,
    /// What its memory and devices take since it was last stored, bytes.
    pub stored_bytes: u64,
    /// Why it could not be stored when that was last tried.
    store_error: Option<Arc<str>>,
    /// The way to its guest, while it runs.
    guest: Option<Guest>,
    /// Whether it is halted until the host's disk takes what it writes.
    pub(super) is_stalled: bool,
}

/// Why a request to a VM was not fulfilled.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VmError {
    /// It does not fit what the VM is or does.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The VM could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The VM ran and was lost.
    #[error("the sandbox's microVM is lost: {0}")]
    Lost(Arc<str>),
    /// The agent let go of the VM before it was done.
    #[error("the host's agent is shutting down")]
    Leaving,
    /// The VM is halted until the host's disk takes what it writes.
    #[error("the sandbox is halted until its host's disk has room for what it writes")]
    Stalled,
    /// It is used by as many calls as it may be.
    #[error("the sandbox is used by {MAX_CALLS} calls already")]
    Busy,
    /// The VM cannot be stored; it runs on.
    #[error("the sandbox cannot be hibernated: {0}")]
    NotStored(Arc<str>),
    /// The VM's state cannot be taken down; it runs on.
    #[error("the sandbox's state cannot be taken down: {0}")]
    NotCaptured(Arc<str>),
    /// The VM is stored, or about to be: it has to be woken first.
    #[error("the sandbox is hibernated")]
    Hibernated,
    /// The VM is not ready for calls yet.
    #[error("the sandbox is being started")]
    NotReady,
}

#[derive(Debug)]
enum Request {
    Create {
        epoch: Epoch,
        reply: oneshot::Sender<Result<Transition, Denied>>,
    },
    Delete {
        epoch: Epoch,
        idle_since: Option<SystemTime>,
        reply: oneshot::Sender<Result<Transition, Denied>>,
    },
    Hibernate {
        epoch: Epoch,
        idle_since: Option<SystemTime>,
        reply: oneshot::Sender<Result<Transition, Denied>>,
    },
    Wake {
        epoch: Epoch,
        order: Order,
        reply: oneshot::Sender<Result<Transition, Denied>>,
    },
    Capture {
        epoch: Epoch,
        wanted: Wanted,
        reply: oneshot::Sender<Result<Captured, VmError>>,
    },
}

/// A handle to the VM of one sandbox.
#[derive(Clone, Debug)]
pub struct Vm(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    owner: Owner,
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<Status>,
    activity: Activity,
}

/// What a task needs beside its VM.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Starts VMs.
    pub starter: Arc<Starter>,
    /// Remembers deletions.
    pub tombstones: Arc<Mutex<Tombstones>>,
    /// Says that the agent ends; VMs that run go on without it.
    pub leave: CancellationToken,
    /// Waits for the tasks when the agent ends.
    pub tasks: TaskTracker,
}

impl Vm {
    /// Begins a task for the VM of `owner`. `ended` runs when nothing of the VM is left, before anybody who waits
    /// for that is told; with the VM that it was to replace, if that one goes on instead.
    pub fn spawn(
        surroundings: &Surroundings,
        owner: Owner,
        origin: Origin,
        ended: impl FnOnce(&Self, Option<Self>) + Send + 'static,
    ) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        let status = Status {
            phase: Phase::Starting,
            path: None,
            renewed: Arc::default(),
            failure: None,
            start_error: None,
            stored_bytes: 0,
            store_error: None,
            guest: None,
            is_stalled: false,
        };
        let (publish, watched) = watch::channel(status);
        let activity = Activity::new(SystemTime::now());
        let vm = Self(Arc::new(Shared {
            owner: owner.clone(),
            requests,
            status: watched,
            activity: activity.clone(),
        }));
        let span = tracing::info_span!("sandbox", sandbox_id = %owner.sandbox, epoch = owner.epoch.0);
        let surroundings_too = surroundings.clone();
        let task = Task {
            owner,
            surroundings: surroundings_too,
            queue,
            publish,
            activity,
            predecessor: None,
            reinstates: false,
            order: None,
        };
        let (handle, gone) = (vm.clone(), task.publish.clone());
        surroundings.tasks.spawn(
            async move {
                if let Some(End { reinstated }) = task.run(origin).await {
                    ended(&handle, reinstated);
                    gone.send_modify(|status| status.phase = Phase::Gone);
                }
            }
            .instrument(span),
        );
        vm
    }

    /// The sandbox, and the epoch of the create that made this VM.
    pub fn owner(&self) -> &Owner {
        &self.0.owner
    }

    /// What is known of the VM now.
    pub fn status(&self) -> Status {
        self.0.status.borrow().clone()
    }

    /// When the sandbox was last used; `now` while it is.
    pub fn last_used(&self, now: SystemTime) -> SystemTime {
        self.0.activity.last_used(now)
    }

    /// Whether both handles are of the same task.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Waits until the VM runs. Any number may wait; that a caller goes away changes nothing.
    ///
    /// # Errors
    ///
    /// [`VmError`]: the epoch does not fit, the start failed, or the VM was lost or deleted meanwhile.
    pub async fn join(&self, epoch: Epoch) -> Result<StartPath, VmError> {
        let asked = self.ask(|reply| Request::Create { epoch, reply }).await;
        if let Err(denied) = asked {
            // A repeat that comes while a failed start is undone gets the answer that the first one gets.
            return Err(self.status().start_error.map_or(VmError::Denied(denied), VmError::Start));
        }
        let status = self.settled(|status| !matches!(status.phase, Phase::Starting | Phase::Deleting)).await;
        match (status.phase, status.path, status.start_error) {
            // One that has been stored since was made all the same.
            (Phase::Running | Phase::Hibernating | Phase::Hibernated | Phase::Waking, Some(path), _) => {
                Ok(path)
            }
            (_, _, Some(error)) => Err(VmError::Start(error)),
            (Phase::Failed, ..) => Err(VmError::Lost(status.failure.unwrap_or_else(|| Arc::from("")))),
            (Phase::Gone, ..) => Err(VmError::Denied(Denied::Deleted)),
            _ => Err(VmError::Leaving),
        }
    }

    /// Stores the VM and waits until only what is stored is left of it. Returns what that takes, bytes.
    ///
    /// # Errors
    ///
    /// [`Denied`]: the epoch does not fit, or the sandbox was used after `idle_since`. [`VmError::NotStored`] if it
    /// runs on; lost or deleted meanwhile.
    pub async fn hibernate(&self, epoch: Epoch, idle_since: Option<SystemTime>) -> Result<u64, VmError> {
        while let Err(denied) = self.ask(|reply| Request::Hibernate { epoch, idle_since, reply }).await {
            self.unless_settling(denied).await?;
        }
        let status = self.settled(|status| status.phase != Phase::Hibernating).await;
        match (status.phase, status.store_error) {
            (Phase::Hibernating, _) => Err(VmError::Leaving),
            (Phase::Running, Some(error)) => Err(VmError::NotStored(error)),
            // Or somebody has woken it again by now.
            (Phase::Starting | Phase::Running | Phase::Hibernated | Phase::Waking, _) => {
                Ok(status.stored_bytes)
            }
            (Phase::Failed, _) => Err(VmError::Lost(status.failure.unwrap_or_else(|| Arc::from("")))),
            (Phase::Deleting | Phase::Gone, _) => Err(VmError::Denied(Denied::Deleted)),
        }
    }

    /// Makes a stored VM run again and waits until its guest has answered. One that runs stays as it is.
    ///
    /// # Errors
    ///
    /// [`Denied`]: the epoch does not fit. [`VmError::Start`] if it stays stored; lost or deleted meanwhile.
    pub async fn wake(&self, epoch: Epoch, order: &Order) -> Result<StartPath, VmError> {
        while let Err(denied) = self.ask(|reply| Request::Wake { epoch, order: order.clone(), reply }).await {
            self.unless_settling(denied).await?;
        }
        let status = self.settled(|status| !matches!(status.phase, Phase::Starting | Phase::Waking)).await;
        match (status.phase, status.path, status.start_error) {
            (Phase::Running | Phase::Hibernating, Some(path), _) => Ok(path),
            (Phase::Hibernated, _, Some(error)) => Err(VmError::Start(error)),
            (Phase::Failed, ..) => Err(VmError::Lost(status.failure.unwrap_or_else(|| Arc::from("")))),
            (Phase::Deleting | Phase::Gone, ..) => Err(VmError::Denied(Denied::Deleted)),
            _ => Err(VmError::Leaving),
        }
    }

    /// Takes the VM's state down as a snapshot; it runs on. That goes on if the caller goes away.
    ///
    /// # Errors
    ///
    /// [`Denied`]: the epoch does not fit, or it does not run. [`VmError::NotCaptured`]: there is no snapshot.
    pub async fn capture(&self, epoch: Epoch, wanted: Wanted) -> Result<Captured, VmError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Capture { epoch, wanted, reply };
        self.0.requests.send(request).await.map_err(|_| VmError::Leaving)?;
        answer.await.unwrap_or(Err(VmError::Leaving))
    }

    /// Waits until the VM has settled, if that is all that stands against a request.
    async fn unless_settling(&self, denied: Denied) -> Result<(), VmError> {
        if denied != Denied::NotReady {
            return Err(denied.into());
        }
        let is_settling = |phase| matches!(phase, Phase::Starting | Phase::Hibernating | Phase::Waking);
        let status = self.settled(|status| !is_settling(status.phase)).await;
        // A task that has ended settles no more.
        if is_settling(status.phase) { Err(VmError::Leaving) } else { Ok(()) }
    }

    /// Takes the VM down and waits until nothing is left of it.
    ///
    /// # Errors
    ///
    /// [`Denied`]: the epoch is too old, or the sandbox was used after `idle_since`. [`VmError::Leaving`] if the
    /// agent ends first.
    pub async fn delete(&self, epoch: Epoch, idle_since: Option<SystemTime>) -> Result<(), VmError> {
        self.ask(|reply| Request::Delete { epoch, idle_since, reply }).await?;
        match self.settled(|status| status.phase == Phase::Gone).await.phase {
            Phase::Gone => Ok(()),
            _ => Err(VmError::Leaving),
        }
    }

    /// Begins a call to the guest. Keep the [`Call`] until the last byte of the answer.
    ///
    /// # Errors
    ///
    /// [`VmError`]: not ready, lost, or deleted.
    pub fn open_call(&self) -> Result<(Guest, Call), VmError> {
        let status = self.0.status.borrow();
        match (status.phase, &status.guest) {
            (Phase::Running, Some(_)) if status.is_stalled => Err(VmError::Stalled),
            (Phase::Running, Some(guest)) => {
                let call = self.0.activity.begin().map_err(|refusal| match refusal {
                    NoCall::Closed(Closed::Deleted) => VmError::Denied(Denied::Deleted),
                    NoCall::Closed(Closed::Hibernated) => VmError::Hibernated,
                    NoCall::Busy => VmError::Busy,
                })?;
                Ok((guest.clone(), call))
            }
            (Phase::Hibernating | Phase::Hibernated | Phase::Waking, _) => Err(VmError::Hibernated),
            (Phase::Starting | Phase::Running, _) => Err(VmError::NotReady),
            (Phase::Failed, _) => Err(VmError::Lost(status.failure.clone().unwrap_or_else(|| Arc::from("")))),
            (Phase::Deleting | Phase::Gone, _) => Err(VmError::Denied(Denied::Deleted)),
        }
    }

    /// Waits until the VM no longer runs, and says what it is then.
    pub async fn stopped(&self) -> Status {
        self.settled(|status| status.phase != Phase::Running).await
    }

    async fn ask(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<Transition, Denied>>) -> Request,
    ) -> Result<Transition, Denied> {
        let (reply, mut answer) = oneshot::channel();
        if self.0.requests.send(request(reply)).await.is_err() {
            return Ok(Transition::Join);
        }
        let answered = tokio::select! {
            answered = &mut answer => answered.ok(),
            // A request that was on its way into the queue while the task ended stays there, unanswered.
            () = self.0.requests.closed() => answer.try_recv().ok(),
        };
        // A task that ended before it answered has published how.
        answered.unwrap_or(Ok(Transition::Join))
    }

    /// Waits for a status. A task that has ended never changes it again: then the last one counts.
    async fn settled(&self, until: impl FnMut(&Status) -> bool) -> Status {
        let mut status = self.0.status.clone();
        if let Ok(settled) = status.wait_for(until).await {
            return settled.clone();
        }
        self.status()
    }
}

/// What is left when a task ends.
struct End {
    /// The VM that was to be replaced, and goes on.
    reinstated: Option<Vm>,
}

struct Task {
    owner: Owner,
    surroundings: Surroundings,
    queue: mpsc::Receiver<Request>,
    publish: watch::Sender<Status>,
    activity: Activity,
    /// The VM that this one replaces, until it is gone.
    predecessor: Option<Vm>,
    /// Whether that one goes on if this one does not start.
    reinstates: bool,
    /// What the VM is to be that is woken next.
    order: Option<Order>,
}

impl Task {
    /// Returns when nothing of the VM is left. `None` if the agent ends and the VM goes on without it.
    async fn run(mut self, origin: Origin) -> Option<End> {
        let mut microvm = None;
        let mut transition = self.start(origin, &mut microvm).await?;
        loop {
            let next = match transition {
                Transition::Run => self.attend(microvm.as_mut()).await,
                Transition::Hibernate => self.hibernate(microvm.as_mut()).await,
                Transition::Sleep => self.sleep().await,
                Transition::Wake => self.wake(microvm.as_mut()).await,
                Transition::Fail => self.fail(microvm.as_mut()).await,
                Transition::Delete => self.delete(&mut microvm).await,
                Transition::Undo => self.undo(&mut microvm).await,
                Transition::End | Transition::Join | Transition::Ignore | Transition::Capture => {
                    return Some(End { reinstated: self.predecessor.take() });
                }
            };
            transition = next?;
        }
    }

    /// Starts the VM while requests are answered. Dropping a start in progress is safe: what there is of it lies in
    /// `microvm` and in the task, from before it is first polled. `None` if the agent ends while it takes over a VM that
    /// runs: the next one does.
    async fn start(&mut self, origin: Origin, microvm: &mut Option<MicroVm>) -> Option<Transition> {
        let (order, path) = match origin {
            Origin::Create { order, predecessor } => {
                self.predecessor = predecessor;
                (Some(order), StartPath::Cold)
            }
            Origin::Adopt { microvm: left, path } => {
                *microvm = Some(left);
                (None, path)
            }
            Origin::Stored { microvm: left, path, stored_bytes } => {
                // An earlier agent may have died before it ended the process.
                sleep::release(microvm.insert(left)).await;
                self.activity.close(None, Closed::Hibernated);
                self.publish.send_modify(|status| {
                    status.path = Some(path);
                    status.stored_bytes = stored_bytes;
                });
                return Some(Transition::Sleep);
            }
            Origin::Failed { microvm: left, reason } => {
                *microvm = Some(left);
                return Some(self.lost(reason));
            }
        };
        let is_adoption = order.is_none();
        self.reinstates = order.as_ref().is_some_and(|order| order.source.is_some());
        let surroundings = self.surroundings.clone();
        let (owner, predecessor) = (self.owner.clone(), self.predecessor.clone());
        let leave = surroundings.leave.clone();
        let outcome = {
            let mut start = std::pin::pin!(async {
                let Some(order) = order else { return surroundings.starter.adopt(path, microvm).await };
                if order.source.is_none() {
                    replace(predecessor).await;
                    return surroundings.starter.create(&owner, &order, microvm).await;
                }
                // What it is put back from is left as it is until the journal says that this one runs.
                let started = surroundings.starter.create(&owner, &order, microvm).await?;
                replace(predecessor).await;
                Ok(started)
            });
            loop {
                tokio::select! {
                    outcome = &mut start => break Some(outcome),
                    Some(request) = self.queue.recv() => {
                        if self.answer(request) == Some(Transition::Delete) {
                            break None;
                        }
                    }
                    () = leave.cancelled() => {
                        if is_adoption {
                            return None;
                        }
                        break Some(Err(StartError::Leaving));
                    }
                }
            }
        };
        Some(match outcome {
            None => Transition::Delete,
            Some(Ok(path)) => {
                self.predecessor = None;
                let guest = microvm.as_ref().and_then(MicroVm::guest);
                let renewed = microvm.as_ref().map(MicroVm::renewed).unwrap_or_default();
                self.publish.send_modify(|status| status.renewed = renewed);
                self.runs(path, guest);
                Transition::Run
            }
            Some(Err(StartError::Lost(reason))) => self.lost(reason),
            Some(Err(error)) => {
                self.publish.send_modify(|status| status.start_error = Some(error));
                self.event(Input::StartFailed)
            }
        })
    }

    /// Watches a running VM until it is lost or deleted.
    async fn attend(&mut self, mut microvm: Option<&mut MicroVm>) -> Option<Transition> {
        let _running = telemetry::running();
        let mut looks = interval_at(Instant::now() + LOOKS_EVERY, LOOKS_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                request = self.queue.recv() => {
                    match (request?, microvm.as_deref_mut()) {
                        (Request::Capture { epoch, wanted, reply }, Some(microvm)) => {
                            let _ = reply.send(self.capture(epoch, &wanted, microvm).await);
                        }
                        (request, _) => {
                            let decided = self.answer(request);
                            if matches!(decided, Some(Transition::Delete | Transition::Hibernate)) {
                                return decided;
                            }
                        }
                    }
                }
                () = ended(microvm.as_deref()) => return Some(self.lost("its VMM process ended".into())),
                stopped = async {
                    looks.tick().await;
                    halt::look_at(&self.publish, microvm.as_deref()).await
                } => {
                    if let Some(reason) = stopped {
                        return Some(self.lost(reason));
                    }
                }
                () = self.surroundings.leave.cancelled() => return None,
            }
        }
    }

    /// Takes the state of a running VM down. Other requests wait meanwhile, and so does the agent's end.
    async fn capture(
        &self,
        epoch: Epoch,
        wanted: &Wanted,
        microvm: &mut MicroVm,
    ) -> Result<Captured, VmError> {
        decide(Phase::Running, self.owner.epoch, Input::Capture { epoch })?;
        let captured = timeout(CAPTURE_DEADLINE, microvm.capture(wanted)).await;
        match captured.unwrap_or(Err(MakeError::Late)) {
            Ok(captured) => {
                info!(
                    snapshot_id = captured.snapshot_id,
                    bytes = captured.bytes,
                    memory_changed_bytes = captured.memory_changed_bytes,
                    pause_us = captured.circumstances.pause.as_micros(),
                    freeze_us = captured.circumstances.freeze.as_micros(),
                    is_quiet = captured.circumstances.is_quiet,
                    "captured"
                );
                Ok(captured)
            }
            Err(error) => {
                warn!(%error, snapshot_id = wanted.snapshot_id, "not captured");
                // Wherever it stopped.
                if let Err(error) = microvm.resume().await {
                    warn!(%error, "cannot make sure that it goes on");
                }
                Err(VmError::NotCaptured(error.to_string().into()))
            }
        }
    }

    /// Tells that the VM runs, and lets calls begin.
    fn runs(&self, path: StartPath, guest: Option<Guest>) {
        self.activity.reopen(SystemTime::now());
        self.publish.send_modify(|status| {
            status.phase = Phase::Running;
            status.path = Some(path);
            status.guest = guest;
        });
    }

    /// Stores the VM while requests are answered. A deletion waits until that is done, and so does the agent's end.
    async fn hibernate(&mut self, microvm: Option<&mut MicroVm>) -> Option<Transition> {
        let microvm = microvm?;
        let (owner, path) = (self.owner.clone(), self.publish.borrow().path.unwrap_or(StartPath::Cold));
        let exit = microvm.exit();
        let stored = {
            let mut work = std::pin::pin!(async {
                let stored = sleep::store(&owner, path, microvm).await;
                if stored.is_ok() {
                    sleep::release(microvm).await;
                }
                stored
            });
            self.attend_to(&mut work).await
        };
        Some(match stored {
            (_, true) => Transition::Delete,
            (Ok(stored_bytes), _) => {
                info!(stored_bytes, "hibernated");
                self.publish.send_modify(|status| status.stored_bytes = stored_bytes);
                self.event(Input::Stored)
            }
            (Err(_), _) if futures_util::FutureExt::now_or_never(exit).is_some() => {
                self.lost("its VMM process ended".into())
            }
            (Err(error), _) => {
                warn!(%error, "not hibernated");
                let guest = microvm.guest();
                self.publish.send_modify(|status| status.store_error = Some(error.to_string().into()));
                let next = self.event(Input::NotStored);
                self.runs(path, guest);
                next
            }
        })
    }

    /// Waits until a stored VM is woken or deleted.
    async fn sleep(&mut self) -> Option<Transition> {
        self.publish.send_modify(|status| status.phase = Phase::Hibernated);
        loop {
            tokio::select! {
                request = self.queue.recv() => {
                    let decided = self.answer(request?);
                    if matches!(decided, Some(Transition::Delete | Transition::Wake)) {
                        return decided;
                    }
                }
                () = self.surroundings.leave.cancelled() => return None,
            }
        }
    }

    /// Makes a stored VM run again while requests are answered. A deletion waits until that is done.
    async fn wake(&mut self, microvm: Option<&mut MicroVm>) -> Option<Transition> {
        let (microvm, order) = (microvm?, self.order.take()?);
        let owner = self.owner.clone();
        let woken = {
            let mut work = std::pin::pin!(sleep::wake(&owner, &order, microvm));
            self.attend_to(&mut work).await
        };
        Some(match woken {
            (_, true) => Transition::Delete,
            (Ok(path), _) => {
                let next = self.event(Input::Woken);
                self.runs(path, microvm.guest());
                next
            }
            (Err(error), _) => {
                self.publish.send_modify(|status| status.start_error = Some(error));
                self.event(Input::NotWoken)
            }
        })
    }

    /// Waits for work that must not be given up, while requests are answered. Says whether one of them is to delete.
    async fn attend_to<T>(&mut self, work: &mut (impl Future<Output = T> + Unpin)) -> (T, bool) {
        let mut delete = false;
        loop {
            tokio::select! {
                done = &mut *work => return (done, delete),
                Some(request) = self.queue.recv() => {
                    delete |= self.answer(request) == Some(Transition::Delete);
                }
            }
        }
    }

    /// Notes why the VM is lost.
    fn lost(&self, reason: String) -> Transition {
        self.publish.send_modify(|status| status.failure = Some(reason.into()));
        self.event(Input::Lost)
    }

    /// Ends what is left of a lost VM, and waits for its deletion.
    async fn fail(&mut self, microvm: Option<&mut MicroVm>) -> Option<Transition> {
        let reason = self.publish.borrow().failure.clone().unwrap_or_else(|| Arc::from(""));
        if let Some(microvm) = microvm {
            warn!(%reason, vm = microvm.id(), console = microvm.console_tail(), "microVM lost");
            let stage = Stage::Failed { owner: self.owner.clone(), reason: reason.to_string() };
            microvm.note(stage);
            microvm.end().await;
        }
        telemetry::lost();
        self.publish.send_modify(|status| {
            status.phase = Phase::Failed;
            status.guest = None;
        });
        loop {
            tokio::select! {
                request = self.queue.recv() => {
                    if self.answer(request?) == Some(Transition::Delete) {
                        return Some(Transition::Delete);
                    }
                }
                () = self.surroundings.leave.cancelled() => return None,
            }
        }
    }

    /// Removes everything; the deletion is remembered already.
    async fn delete(&mut self, microvm: &mut Option<MicroVm>) -> Option<Transition> {
        self.publish.send_modify(|status| {
            status.phase = Phase::Deleting;
            status.guest = None;
        });
        if let Some(microvm) = microvm {
            microvm.note(Stage::Deleting(self.owner.clone()));
        }
        self.remove(microvm).await;
        info!("deleted");
        Some(self.event(Input::Removed))
    }

    /// Removes what a failed start has left, as if it had never been.
    async fn undo(&mut self, microvm: &mut Option<MicroVm>) -> Option<Transition> {
        self.publish.send_modify(|status| status.phase = Phase::Deleting);
        let spared = if self.reinstates { self.predecessor.take() } else { None };
        self.remove(microvm).await;
        let next = self.event(Input::Removed);
        // Unless it was deleted meanwhile.
        self.predecessor = spared;
        Some(next)
    }

    /// Removes the VM, and the one that it was to replace, while requests are answered.
    async fn remove(&mut self, microvm: &mut Option<MicroVm>) {
        let predecessor = self.predecessor.take();
        let mut removal = std::pin::pin!(async {
            if let Some(mut microvm) = microvm.take() {
                microvm.destroy().await;
            }
            replace(predecessor).await;
        });
        loop {
            tokio::select! {
                () = &mut removal => return,
                Some(request) = self.queue.recv() => {
                    self.answer(request);
                }
            }
        }
    }

    /// Answers a request and returns the transition that was decided. A caller that is gone is none.
    fn answer(&mut self, request: Request) -> Option<Transition> {
        let phase = self.publish.borrow().phase;
        let (input, reply) = match request {
            Request::Capture { epoch, reply, .. } => {
                // One that runs is captured by who attends to it.
                let denied = decide(phase, self.owner.epoch, Input::Capture { epoch }).err();
                let _ = reply.send(Err(denied.unwrap_or(Denied::NotReady).into()));
                return None;
            }
            Request::Create { epoch, reply } => (Input::Create { epoch }, reply),
            Request::Delete { epoch, idle_since, reply } => {
                // Only an accepted delete may shut calls out, so an old epoch is sorted out first.
                let dry = decide(phase, self.owner.epoch, Input::Delete { epoch, used: false });
                let closes = dry == Ok(Transition::Delete) && phase != Phase::Failed;
                let used = closes && !self.activity.close(idle_since, Closed::Deleted);
                (Input::Delete { epoch, used }, reply)
            }
            Request::Hibernate { epoch, idle_since, reply } => {
                let dry = decide(phase, self.owner.epoch, Input::Hibernate { epoch, used: false });
                let closes = dry == Ok(Transition::Hibernate);
                let used = closes && !self.activity.close(idle_since, Closed::Hibernated);
                (Input::Hibernate { epoch, used }, reply)
            }
            Request::Wake { epoch, order, reply } => {
                if phase == Phase::Hibernated {
                    self.order = Some(order);
                }
                (Input::Wake { epoch }, reply)
            }
        };
        let decided = decide(phase, self.owner.epoch, input);
        if let (Input::Delete { epoch, .. }, Ok(_)) = (input, decided) {
            // Before anything is removed, and also where a failed start is being undone: from now on a create
            // that was delayed on its way finds the tombstone. It holds in memory even if the disk is full.
            if let Err(error) = self.surroundings.tombstones.lock().add(&self.owner.sandbox, epoch) {
                warn!(%error, "cannot write down the deletion");
            }
        }
        // Before the caller is told, who waits for the phase after this one.
        match decided {
            Ok(Transition::Hibernate) => self.publish.send_modify(|status| {
                status.phase = Phase::Hibernating;
                status.guest = None;
                status.store_error = None;
            }),
            Ok(Transition::Wake) => self.publish.send_modify(|status| {
                status.phase = Phase::Waking;
                status.start_error = None;
            }),
            _ => {}
        }
        let _ = reply.send(decided);
        decided.ok()
    }

    /// What an event leads to. Events are never denied.
    fn event(&self, input: Input) -> Transition {
        let phase = self.publish.borrow().phase;
        decide(phase, self.owner.epoch, input).unwrap_or(Transition::Ignore)
    }
}

async fn ended(microvm: Option<&MicroVm>) {
    match microvm {
        Some(microvm) => microvm.exit().await,
        None => std::future::pending().await,
    }
}

/// Ends the VM of an earlier epoch. Its own epoch is given: the tombstone must not refuse the create that replaces it.
async fn replace(predecessor: Option<Vm>) {
    if let Some(old) = predecessor {
        // It fails only if the agent ends.
        let _ = old.delete(old.owner().epoch, None).await;
    }
}

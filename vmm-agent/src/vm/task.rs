//! The task that owns one sandbox's VM. Everybody else holds a [`Vm`]. What it does with one that sleeps is in [`sleeper`].

pub(super) mod sleeper;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, info, warn};

use crate::{
    backend::{Captured, Guest, Wanted},
    fail,
    identity::Epoch,
    journal::{Owner, Stage, StartPath},
    microvm::{MakeError, MicroVm},
    telemetry,
    tombstones::Tombstones,
    vm::{
        activity::{Activity, Closed},
        decide::{Denied, Input, Phase, Transition, decide},
        halt,
        handle::{Request, Shared, Status, Vm, VmError},
        shelves::Shelves,
        sleep,
        start::{Order, Origin, StartError, Starter},
        tier::{Left, Policy, Tier},
    },
};

/// Requests that wait for the task; a caller beyond that waits for room.
const QUEUE: usize = 16;
/// What a VM has changed is written at the disk's pace.
const CAPTURE_DEADLINE: Duration = Duration::from_secs(300);
/// How often a VMM is asked how its VM fares.
const LOOKS_EVERY: Duration = Duration::from_secs(5);

/// What a task needs beside its VM.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Starts VMs.
    pub starter: Arc<Starter>,
    /// Remembers deletions.
    pub tombstones: Arc<Mutex<Tombstones>>,
    /// How long VMs stay in the first tier of hibernation.
    pub policy: Policy,
    /// One permit for each VM of the first tier that is captured at the moment.
    pub captures: Arc<Semaphore>,
    /// Makes snapshots of VMs of the second tier, if they are to go to the object store.
    pub shelves: Option<Shelves>,
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
            tier: Tier::Stored,
            asleep_since: SystemTime::UNIX_EPOCH,
            stored_bytes: 0,
            shelved: None,
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
            tier: Tier::Stored,
            left: Left::Stored,
            forgets: false,
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
    /// The tier that the VM is to be in that is put to sleep next.
    tier: Tier,
    /// What the VM goes on from, while it sleeps.
    left: Left,
    /// Whether what is stored of the VM is worth nothing any more, and still there.
    forgets: bool,
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
                Transition::Sleep => self.sleep(microvm.as_mut()).await,
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
            Origin::Paused { microvm: left, path, paused } => {
                return self.take_over_paused(microvm.insert(left), path, paused).await;
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
                fail::reached(fail::CREATE_REPLACED, microvm.as_ref().map_or("", MicroVm::id));
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
        let forgets = std::mem::take(&mut self.forgets);
        let mut forgetting =
            microvm.as_deref_mut().filter(|_| forgets).map(|vm| vm.instance().forget_stored());
        let mut looks = interval_at(Instant::now() + LOOKS_EVERY, LOOKS_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                request = self.queue.recv() => {
                    match (request?, microvm.as_deref_mut()) {
                        (Request::Capture { epoch, wanted, reply }, Some(microvm)) => {
                            // It waits in front of a capture for what the capture holds.
                            forgotten(&mut forgetting).await;
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
                () = forgotten(&mut forgetting), if forgetting.is_some() => {}
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
            Request::GiveWay { reply } => {
                // One that could is asked by who keeps it.
                let _ = reply.send(false);
                return None;
            }
            Request::Hibernate { epoch, idle_since, tier, reply } => {
                if phase == Phase::Running {
                    self.tier = tier;
                }
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
                // Nobody's from here on.
                status.shelved = None;
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

/// Waits until what was stored of a VM that runs is removed, if that is under way.
async fn forgotten(forgetting: &mut Option<BoxFuture<'static, Result<(), MakeError>>>) {
    if let Some(removal) = forgetting
        && let Err(error) = removal.await
    {
        // It counts for nothing, and is removed before the VM is halted.
        warn!(%error, "what was stored stays for now");
    }
    *forgetting = None;
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

//! The handle to the VM of one sandbox, that everybody but its task holds: asks, waits, and goes away at any time.

use std::{sync::Arc, time::SystemTime};

use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    backend::{Captured, Guest, Wanted},
    identity::Epoch,
    journal::{Owner, StartPath},
    vm::{
        activity::{Activity, Call, Closed, MAX_CALLS, NoCall},
        decide::{Denied, Phase, Transition},
        start::{Order, StartError},
        tier::{Candidate, Tier},
    },
};

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
    /// The tier of hibernation that it is in, or was in last.
    pub tier: Tier,
    /// Since when it sleeps, if it is of the first tier.
    pub asleep_since: SystemTime,
    /// What its memory and devices take since it was last stored, bytes; 0 as long as they are not.
    pub stored_bytes: u64,
    /// The snapshot of it while it sleeps, if there is to be one ([`crate::backend::Instance::shelve`]).
    pub shelved: Option<Arc<str>>,
    /// Why it could not be stored when that was last tried.
    pub(super) store_error: Option<Arc<str>>,
    /// The way to its guest, while it runs.
    pub(super) guest: Option<Guest>,
    /// Whether it is halted until the host's disk takes what it writes.
    pub(super) is_stalled: bool,
}

/// What is told of a VM that hibernates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hibernated {
    /// In which tier.
    pub tier: Tier,
    /// What its memory and devices take on disk, bytes; 0 as long as they are not there.
    pub stored_bytes: u64,
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

/// What the task is asked for.
#[derive(Debug)]
pub(super) enum Request {
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
        tier: Tier,
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
    GiveWay {
        reply: oneshot::Sender<bool>,
    },
}

/// A handle to the VM of one sandbox.
#[derive(Clone, Debug)]
pub struct Vm(pub(super) Arc<Shared>);

/// What all handles to one task share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) owner: Owner,
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) status: watch::Receiver<Status>,
    pub(super) activity: Activity,
}

impl Vm {
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

    /// Puts the VM to sleep, in the first tier only if that is the `tier` to begin with, and waits until it sleeps for good.
    ///
    /// # Errors
    ///
    /// [`Denied`]: the epoch does not fit, or the sandbox was used after `idle_since`. [`VmError::NotStored`] if it
    /// runs on; lost or deleted meanwhile.
    pub async fn hibernate(
        &self,
        epoch: Epoch,
        idle_since: Option<SystemTime>,
        tier: Tier,
    ) -> Result<Hibernated, VmError> {
        let request = |reply| Request::Hibernate { epoch, idle_since, tier, reply };
        while let Err(denied) = self.ask(request).await {
            self.unless_settling(denied).await?;
        }
        let status = self.settled(|status| status.phase != Phase::Hibernating).await;
        match (status.phase, status.store_error) {
            (Phase::Hibernating, _) => Err(VmError::Leaving),
            (Phase::Running, Some(error)) => Err(VmError::NotStored(error)),
            // Or somebody has woken it again by now.
            (Phase::Starting | Phase::Running | Phase::Hibernated | Phase::Waking, _) => {
                Ok(Hibernated { tier: status.tier, stored_bytes: status.stored_bytes })
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

    /// What the VM is among those of the first tier, if it is one of them.
    pub fn candidate(&self) -> Option<Candidate> {
        let status = self.0.status.borrow();
        (status.phase == Phase::Hibernated && status.tier == Tier::Paused)
            .then(|| Candidate { since: status.asleep_since, is_captured: status.stored_bytes > 0 })
    }

    /// Ends the process of a VM of the first tier that is captured, for the sake of others, and waits for that. Whether there
    /// was one to end.
    pub async fn give_way(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.0.requests.send(Request::GiveWay { reply }).await.is_ok() && answer.await.unwrap_or(false)
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

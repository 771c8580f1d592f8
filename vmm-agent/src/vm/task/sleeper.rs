//! What the task does with a VM that is put to sleep, sleeps, and wakes. In the first [tier](super::super::tier) the task
//! captures it and ends its process when its time is over; a request to wake or to delete it is never kept waiting by that.

use std::time::{Duration, SystemTime};

use futures_util::{FutureExt as _, future::OptionFuture};
use tokio::{
    sync::oneshot,
    time::{sleep as wait, timeout},
};
use tracing::{info, warn};

use super::Task;
use crate::{
    journal::StartPath,
    microvm::{MakeError, MicroVm},
    telemetry,
    vm::{
        activity::Closed,
        decide::{Input, Phase, Transition},
        handle::Request,
        shelves::Sleeps,
        sleep::{self, Asleep},
        tier::{Left, Paused, Step, Tier},
    },
};

/// A VMM that is there takes a connection in milliseconds.
const TAKE_OVER_DEADLINE: Duration = Duration::from_secs(20);
/// Waits between attempts to store a VM of the first tier, or to write that down: from the first to the last.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What interrupts the stay in the first tier.
enum Interruption {
    /// A request that was answered.
    Asked(Transition),
    /// What was due is done; of a capture with what it takes, bytes.
    Done(Result<Option<u64>, MakeError>),
    /// The host wants the memory, and to know whether it gets it.
    GiveWay(oneshot::Sender<bool>),
    /// The process has ended.
    Ended,
    /// The agent ends, or nobody can ask for anything any more.
    Leaving,
}

impl Task {
    /// Puts the VM to sleep while requests are answered. A deletion waits until that is done, and so does the agent's end.
    pub(super) async fn hibernate(&mut self, microvm: Option<&mut MicroVm>) -> Option<Transition> {
        let microvm = microvm?;
        let (owner, path, tier) = (self.owner.clone(), self.path(), self.tier);
        let exit = microvm.exit();
        let asleep = {
            let mut work = std::pin::pin!(sleep::hibernate(&owner, path, tier, microvm));
            self.attend_to(&mut work).await
        };
        match asleep.0 {
            Ok(Asleep::Paused(paused)) => self.is_paused(paused),
            Ok(Asleep::Stored(stored_bytes)) => self.is_stored(stored_bytes),
            Err(_) => {}
        }
        Some(match asleep {
            (_, true) => Transition::Delete,
            (Ok(asleep), _) => {
                info!(?asleep, "hibernated");
                self.event(Input::Stored)
            }
            (Err(_), _) if exit.now_or_never().is_some() => self.lost("its VMM process ended".into()),
            (Err(error), _) => {
                warn!(%error, "not hibernated");
                // A part of it may be there.
                self.forgets = true;
                let guest = microvm.guest();
                self.publish.send_modify(|status| status.store_error = Some(error.to_string().into()));
                let next = self.event(Input::NotStored);
                self.runs(path, guest);
                next
            }
        })
    }

    /// Takes over a VM that an earlier agent left in the first tier, as it is.
    pub(super) async fn take_over_paused(
        &mut self,
        microvm: &mut MicroVm,
        path: StartPath,
        mut paused: Paused,
    ) -> Option<Transition> {
        self.activity.close(None, Closed::Hibernated);
        self.is_paused(paused);
        self.publish.send_modify(|status| {
            status.path = Some(path);
            status.phase = Phase::Hibernated;
        });
        let adopted = tokio::select! {
            adopted = timeout(TAKE_OVER_DEADLINE, microvm.instance().adopt()) => adopted,
            () = self.surroundings.leave.cancelled() => return None,
        };
        paused.is_gone = match adopted.unwrap_or(Err(MakeError::Late)) {
            Ok(is_there) => !is_there,
            Err(error) => {
                warn!(%error, vm = microvm.id(), "a VM that was paused cannot be taken over");
                true
            }
        };
        info!(vm = microvm.id(), is_gone = paused.is_gone, "paused by an earlier agent");
        self.is_paused(paused);
        Some(Transition::Sleep)
    }

    /// Waits until a VM that sleeps is woken or deleted.
    pub(super) async fn sleep(&mut self, microvm: Option<&mut MicroVm>) -> Option<Transition> {
        self.publish.send_modify(|status| status.phase = Phase::Hibernated);
        let mut microvm = microvm;
        while let (Left::Paused(_), Some(microvm)) = (self.left, microvm.as_deref_mut()) {
            if let Some(next) = self.stay_paused(microvm).await {
                return next;
            }
        }
        let (shelves, sandbox) = (self.surroundings.shelves.clone(), self.owner.sandbox.clone());
        let (sleeps, publish) = (Sleeps::default(), self.publish.clone());
        let shelving = shelves.as_ref().zip(microvm.filter(|_| self.left == Left::Stored));
        let shelving =
            shelving.map(|(shelves, microvm)| shelves.shelve(&sandbox, microvm, &publish, &sleeps));
        let mut shelving = std::pin::pin!(OptionFuture::from(shelving));
        let mut is_shelved = false;
        loop {
            tokio::select! {
                request = self.queue.recv() => {
                    let decided = self.answer(request?);
                    if matches!(decided, Some(Transition::Delete | Transition::Wake)) {
                        return decided;
                    }
                }
                _ = &mut shelving, if !is_shelved => is_shelved = true,
                () = self.surroundings.leave.cancelled() => return None,
            }
        }
    }

    /// Makes a VM that sleeps run again while requests are answered. A deletion waits until that is done.
    pub(super) async fn wake(&mut self, microvm: Option<&mut MicroVm>) -> Option<Transition> {
        let (microvm, order) = (microvm?, self.order.take()?);
        let (owner, path, mut left) = (self.owner.clone(), self.path(), self.left);
        let woken = {
            let starter = self.surroundings.starter.clone();
            let mut work = std::pin::pin!(sleep::wake(&owner, path, &order, &mut left, &starter, microvm));
            self.attend_to(&mut work).await
        };
        if left != self.left && !matches!(left, Left::Paused(_)) {
            let stored_bytes = if left == Left::Disk { 0 } else { self.publish.borrow().stored_bytes };
            self.is_stored(stored_bytes);
        }
        self.left = left;
        Some(match woken {
            (_, true) => Transition::Delete,
            (Ok(path), _) => {
                telemetry::woken(path);
                self.forgets = true;
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

    /// Keeps a VM of the first tier, captures it, and ends its process, until somebody asks for it. `None` if it is of the
    /// second tier then.
    async fn stay_paused(&mut self, microvm: &mut MicroVm) -> Option<Option<Transition>> {
        let _paused = telemetry::paused();
        let (owner, path, exit) = (self.owner.clone(), self.path(), microvm.exit().shared());
        let mut failed = 0;
        loop {
            let Left::Paused(paused) = self.left else { return None };
            let (step, due) = self.surroundings.policy.next(paused, SystemTime::now());
            let due = if failed == 0 { due } else { due.max(rest_after(failed)) };
            let captures = self.surroundings.captures.clone();
            let work = async {
                wait(due).await;
                if step == Step::End {
                    return Ok(None);
                }
                // It is never closed.
                let _permit = captures.acquire().await;
                sleep::capture(microvm, true).await.map(Some)
            };
            // What was not done then is given up. What is written down from here on is waited for.
            let interruption = self.interrupted(paused, work, exit.clone()).await;
            let done = match interruption {
                Interruption::Asked(asked) => return Some(Some(asked)),
                Interruption::Leaving => return Some(None),
                Interruption::Ended => {
                    warn!(
                        vm = microvm.id(),
                        is_captured = paused.is_captured(),
                        "the VMM of a paused VM ended"
                    );
                    self.is_paused(Paused { is_gone: true, ..paused });
                    failed = 0;
                    continue;
                }
                Interruption::Done(Ok(Some(stored_bytes))) => {
                    let captured = Paused { stored_bytes, ..paused };
                    let noted = sleep::note_paused(&owner, path, captured, microvm).await;
                    if noted.is_ok() {
                        info!(stored_bytes, "captured while it is paused");
                        self.is_paused(captured);
                    }
                    noted
                }
                Interruption::Done(Ok(None)) => self.end_paused(paused, "time", microvm).await,
                Interruption::GiveWay(reply) => {
                    let ended = self.end_paused(paused, "pressure", microvm).await;
                    let _ = reply.send(ended.is_ok());
                    ended
                }
                Interruption::Done(Err(error)) => Err(error),
            };
            match done {
                Ok(()) => failed = 0,
                Err(error) => {
                    failed += 1;
                    let rest_ms = rest_after(failed).as_millis();
                    warn!(%error, rest_ms, "a paused VM cannot be captured, or ended, yet");
                    telemetry::first_tier_failed();
                }
            }
        }
    }

    /// Waits until `work` for a VM of the first tier is done, or something comes in that it has to be given up for.
    async fn interrupted(
        &mut self,
        paused: Paused,
        work: impl Future<Output = Result<Option<u64>, MakeError>>,
        exit: impl Future<Output = ()>,
    ) -> Interruption {
        let (mut work, mut exit) = (std::pin::pin!(work), std::pin::pin!(exit));
        loop {
            tokio::select! {
                request = self.queue.recv() => match request {
                    None => return Interruption::Leaving,
                    Some(Request::GiveWay { reply }) if paused.is_captured() => {
                        return Interruption::GiveWay(reply);
                    }
                    Some(request) => {
                        let decided = self.answer(request);
                        if let Some(asked @ (Transition::Delete | Transition::Wake)) = decided {
                            return Interruption::Asked(asked);
                        }
                    }
                },
                () = &mut exit, if !paused.is_gone => return Interruption::Ended,
                done = &mut work => return Interruption::Done(done),
                () = self.surroundings.leave.cancelled() => return Interruption::Leaving,
            }
        }
    }

    /// Makes a VM of the first tier one of the second.
    async fn end_paused(
        &mut self,
        paused: Paused,
        why: &'static str,
        microvm: &mut MicroVm,
    ) -> Result<(), MakeError> {
        sleep::leave_first_tier(&self.owner, self.path(), paused, microvm).await?;
        let why = if paused.is_gone { "lost" } else { why };
        info!(why, stored_bytes = paused.stored_bytes, "not paused any more");
        telemetry::first_tier_left(why);
        self.is_stored(paused.stored_bytes);
        Ok(())
    }

    /// Tells that the VM is of the first tier.
    fn is_paused(&mut self, paused: Paused) {
        self.left = Left::Paused(paused);
        self.publish.send_modify(|status| {
            status.tier = Tier::Paused;
            status.asleep_since = paused.since;
            status.stored_bytes = paused.stored_bytes;
        });
    }

    /// Tells that the VM is of the second tier.
    fn is_stored(&mut self, stored_bytes: u64) {
        self.left = Left::Stored;
        self.publish.send_modify(|status| {
            status.tier = Tier::Stored;
            status.stored_bytes = stored_bytes;
        });
    }

    /// How the VM was started.
    fn path(&self) -> StartPath {
        self.publish.borrow().path.unwrap_or(StartPath::Cold)
    }
}

/// How long to wait after so many failures in a row.
pub(in crate::vm) fn rest_after(failed: u32) -> Duration {
    REST.0.saturating_mul(1 << failed.saturating_sub(1).min(6)).min(REST.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_followed_by_ever_longer_rests() {
        assert_eq!((rest_after(1), rest_after(2)), (REST.0, REST.0 * 2));
        assert_eq!(rest_after(u32::MAX), REST.1);
    }
}

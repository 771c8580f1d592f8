//! VMs of the first tier of hibernation give way to others: to those that are made or woken, at once, and whenever the
//! host is short of memory or has more processes than it should. Which of them goes is [decided](crate::vm::tier) by
//! their age; each is ended by its own task.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Host, awake};
use crate::vm::{
    handle::Vm,
    tier::{self, Candidate},
};

/// The host's memory is looked at this often.
const TICK: Duration = Duration::from_secs(1);

impl Host {
    /// Ends paused VMs where the host wants what they take, until `cancel`.
    pub async fn relieve(self, cancel: CancellationToken) {
        while !cancel.is_cancelled() {
            tokio::select! {
                () = sleep(TICK) => {}
                () = cancel.cancelled() => return,
            }
            while let Some(vm) = self.surplus() {
                // One that was woken meanwhile is no surplus any more.
                if !vm.give_way().await {
                    break;
                }
            }
        }
    }

    /// Ends the oldest of the paused VMs that may be ended. `false` if there is none.
    pub(super) async fn end_oldest_paused(&self) -> bool {
        let (mut vms, mut candidates) = self.paused();
        while let Some(oldest) = tier::oldest(&candidates) {
            if vms.swap_remove(oldest).give_way().await {
                return true;
            }
            // It was woken or deleted meanwhile.
            candidates.swap_remove(oldest);
        }
        false
    }

    /// Processes of sandboxes' VMs: of those that are awake, and of paused ones.
    pub(super) fn processes(&self) -> usize {
        let vms = self.0.vms.lock();
        awake(&vms) + vms.values().filter(|vm| vm.candidate().is_some()).count()
    }

    fn surplus(&self) -> Option<Vm> {
        let (vms, candidates) = self.paused();
        if candidates.is_empty() {
            return None;
        }
        let awake = awake(&self.0.vms.lock());
        let policy = self.0.surroundings.policy;
        let index = policy.surplus(&self.0.limits, awake, &candidates, self.measure())?;
        vms.into_iter().nth(index)
    }

    /// Paused VMs, and what each is among them.
    fn paused(&self) -> (Vec<Vm>, Vec<Candidate>) {
        let vms = self.0.vms.lock();
        vms.values().filter_map(|vm| Some((vm.clone(), vm.candidate()?))).unzip()
    }
}

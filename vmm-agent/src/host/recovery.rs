//! What becomes of the VMs that an earlier agent left, at start-up.
//!
//! Every home is opened and its journal says what happens ([`crate::journal::Record::recovery`]). A home without
//! a journal, and a process, cgroup or socket without a home, belongs to nobody and is removed. Adoption goes
//! on in the task of each sandbox, so that one guest that does not answer holds up no other.

use std::collections::HashMap;

use tokio::task::JoinSet;
use tracing::info;

use super::Host;
use crate::{
    identity::SandboxId,
    journal::{Owner, Recovery},
    microvm::{MakeError, MicroVm},
    vm::start::Origin,
    workshop::LeftBehind,
};

/// How many homes were treated in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Sandboxes that go on, or are still shown as failed.
    pub kept: usize,
    /// Homes that were removed.
    pub removed: usize,
}

impl Host {
    /// Takes over, finishes or undoes what an earlier agent left. Called once, before the first request.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the host cannot be searched: then it must not serve.
    pub async fn recover(&self) -> Result<Recovered, MakeError> {
        let mut newest: HashMap<SandboxId, (Owner, Origin)> = HashMap::new();
        let mut removals = Vec::new();
        for LeftBehind { microvm, record } in self.0.workshop.left_behind().await? {
            let recovery = record.map_or(Recovery::Remove, |r| r.recovery(self.0.workshop.boot_id()));
            let (owner, origin) = match recovery {
                Recovery::Remove => {
                    removals.push(microvm);
                    continue;
                }
                Recovery::FinishDelete(owner) => {
                    self.bury(&owner.sandbox, owner.epoch);
                    removals.push(microvm);
                    continue;
                }
                Recovery::Adopt(owner, path) => (owner, Origin::Adopt { microvm, path }),
                Recovery::KeepPaused(owner, path, paused) => {
                    (owner, Origin::Paused { microvm, path, paused })
                }
                Recovery::KeepStored(owner, path, stored_bytes) => {
                    (owner, Origin::Stored { microvm, path, stored_bytes })
                }
                Recovery::KeepFailed(owner, reason) => (owner, Origin::Failed { microvm, reason }),
            };
            if self.is_buried(&owner) {
                // Accepted for deletion, and stopped before the journal said so.
                removals.extend(origin.into_microvm());
                continue;
            }
            // Of two epochs the earlier one was being replaced; of one that is stored and one that runs, the clone that has
            // taken the other's state on goes on.
            let rank = |owner: &Owner, origin: &Origin| (owner.epoch, matches!(origin, Origin::Adopt { .. }));
            let rival = newest
                .get(&owner.sandbox)
                .is_some_and(|(other, its)| rank(other, its) > rank(&owner, &origin));
            let loser = if rival {
                Some(origin)
            } else {
                newest.insert(owner.sandbox.clone(), (owner, origin)).map(|(_, origin)| origin)
            };
            removals.extend(loser.and_then(Origin::into_microvm));
        }

        let recovered = Recovered { kept: newest.len(), removed: removals.len() };
        let kept =
            newest.values().filter_map(|(_, origin)| Some(origin.microvm()?.id().to_owned())).collect();
        for (owner, origin) in newest.into_values() {
            let mut vms = self.0.vms.lock();
            let vm = self.begin(owner.clone(), origin);
            vms.insert(owner.sandbox, vm);
        }
        remove_all(removals).await;
        self.0.workshop.sweep(&kept);
        info!(kept = recovered.kept, removed = recovered.removed, "took over what an earlier agent left");
        Ok(recovered)
    }

    fn is_buried(&self, owner: &Owner) -> bool {
        let buried = self.0.surroundings.tombstones.lock().get(&owner.sandbox);
        buried.is_some_and(|epoch| epoch >= owner.epoch)
    }
}

/// Removes every VM of `microvms`, side by side.
pub(crate) async fn remove_all(microvms: Vec<MicroVm>) {
    let mut removals = JoinSet::new();
    for mut microvm in microvms {
        removals.spawn(async move { microvm.destroy().await });
    }
    while removals.join_next().await.is_some() {}
}

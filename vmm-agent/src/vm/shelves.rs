//! How VMs of the second tier of hibernation get to the object store: as snapshots, one after the other, where the disk has room.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    sync::{Semaphore, watch},
    time::sleep,
};
use tracing::{info, warn};

use super::{handle::Status, task::sleeper::rest_after};
use crate::{
    capacity::{self, Limits},
    identity::SandboxId,
    microvm::{MakeError, MicroVm},
    workshop::Workshop,
};

/// Says that a VM sleeps, until it is dropped.
#[derive(Debug)]
pub struct Sleeps(Arc<AtomicBool>);

impl Default for Sleeps {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Drop for Sleeps {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Makes snapshots of the VMs of one host that sleep.
#[derive(Clone, Debug)]
pub struct Shelves {
    workshop: Arc<Workshop>,
    limits: Limits,
    /// Disks are copied: those that run share the host's with that.
    one_at_a_time: Arc<Semaphore>,
}

impl Shelves {
    /// Of the host of `workshop`, within its `limits`.
    pub fn new(workshop: Arc<Workshop>, limits: Limits) -> Self {
        Self { workshop, limits, one_at_a_time: Arc::new(Semaphore::new(1)) }
    }

    /// Makes a snapshot of the VM of `sandbox`, and tells what it is called before it is there. What fails is tried again, at
    /// longer and longer intervals. May be given up at any time.
    pub async fn shelve(
        &self,
        sandbox: &SandboxId,
        microvm: &mut MicroVm,
        publish: &watch::Sender<Status>,
        sleeps: &Sleeps,
    ) {
        for failed in 1.. {
            let shelved = async {
                // It is never closed.
                let _permit = self.one_at_a_time.acquire().await;
                let Some(id) = microvm.instance().shelf_id(sandbox).await? else { return Ok(None) };
                publish.send_modify(|status| status.shelved = Some(id.as_str().into()));
                microvm.instance().shelve(&id, self.spare_bytes()?, sleeps.0.clone()).await?;
                Ok(Some(id))
            };
            match shelved.await {
                Ok(Some(snapshot_id)) => {
                    return info!(snapshot_id, "a hibernated VM is to go to the object store");
                }
                Ok(None) => return,
                Err::<_, MakeError>(error) => {
                    let rest = rest_after(failed);
                    let rest_ms = rest.as_millis();
                    warn!(%error, rest_ms, "a hibernated VM cannot go to the object store yet");
                    sleep(rest).await;
                }
            }
        }
    }

    /// What the disk has beyond its reserve.
    fn spare_bytes(&self) -> Result<u64, MakeError> {
        let room = capacity::measure(self.workshop.data_dir());
        let room = room.map_err(|error| MakeError::Backend(error.to_string()))?;
        Ok(room.disk_mb.saturating_sub(self.limits.disk_reserve_mb) << 20)
    }
}

//! VMs that their VMM halts by itself: for good, or until the host's disk takes what they write.

use std::time::Duration;

use tokio::{sync::watch, time::sleep};
use tracing::{debug, info, warn};

use super::handle::Status;
use crate::{
    backend::Condition,
    microvm::{MakeError, MicroVm},
};

/// How long a VM that was let go on has to find that there is still no room: it repeats the write that failed.
const TRIES_FOR: Duration = Duration::from_millis(300);

/// Lets a VM go on that was halted because the host's disk was full; if there is still no room, it is halted anew.
/// Returns why the VM will never go on.
pub async fn look_at(publish: &watch::Sender<Status>, microvm: Option<&MicroVm>) -> Option<String> {
    let microvm = microvm?;
    let is_stalled = match resumed(microvm).await {
        Ok(Condition::Runs) => false,
        Ok(Condition::DiskFull) => true,
        Ok(Condition::Stopped(state)) => return Some(format!("its VMM has halted it: {state}")),
        // A VMM that is gone is seen by its process.
        Err(error) => {
            debug!(%error, "cannot ask how a VM fares");
            return None;
        }
    };
    publish.send_if_modified(|status| {
        let changed = status.is_stalled != is_stalled;
        if changed && is_stalled {
            warn!("halted: the host's disk is full");
        } else if changed {
            info!("goes on: the host's disk has room again");
        }
        status.is_stalled = is_stalled;
        changed
    });
    None
}

/// How a VM fares, after another try if it was halted.
async fn resumed(microvm: &MicroVm) -> Result<Condition, MakeError> {
    let found = microvm.condition().await?;
    if found != Condition::DiskFull {
        return Ok(found);
    }
    microvm.resume().await?;
    sleep(TRIES_FOR).await;
    microvm.condition().await
}

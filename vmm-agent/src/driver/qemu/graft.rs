//! Another VM's state for a QEMU that has run: first its layer, then its memory, at last its devices.
//!
//! A failure anywhere leaves a QEMU that is only good for being killed.

use std::{io::Write as _, time::Duration};

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    arguments::{LAYER_NODE, LAYER_PATH},
    debug,
    qmp::Qmp,
    vmstate,
};
use crate::driver::vmm::{Graft, Patch, VmmError};

/// The node of the layer that is exchanged for [`LAYER_NODE`].
const NEW_LAYER_NODE: &str = "grafted-layer";
/// The node that devices are loaded from, and the job that does it.
const STATE_NODE: &str = "grafted-state";
const JOB: &str = "graft";
/// Devices are loaded in milliseconds, but the host may be busy.
const LOADS_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks at the job.
const STEP: Duration = Duration::from_micros(300);

/// Makes the QEMU behind `qmp`, which is paused, what `graft` says.
///
/// # Errors
///
/// [`VmmError`].
pub async fn perform(qmp: &Qmp, graft: &Graft<'_>) -> Result<(), VmmError> {
    let image = vmstate::image(graft.state).map_err(|unfit| VmmError::Snapshot(unfit.to_string()))?;
    let state = graft.home.state_to_load(|mut file| file.write_all(&image));
    let state = state.map_err(VmmError::Start)?;

    let layer = json!({ "driver": "file", "filename": graft.home.layer() });
    let layer = json!({ "driver": "raw", "node-name": NEW_LAYER_NODE, "discard": "unmap", "file": layer });
    qmp.execute("blockdev-add", layer).await?;
    let exchange = json!({ "path": LAYER_PATH, "property": "drive", "value": NEW_LAYER_NODE });
    qmp.execute("qom-set", exchange).await?;
    qmp.execute("blockdev-del", json!({ "node-name": LAYER_NODE })).await?;

    debug::write(graft.home, graft.patches).await?;

    // For this once: nothing of it has to reach a disk.
    let cache = json!({ "no-flush": true });
    let file = json!({ "driver": "file", "filename": state, "cache": cache });
    let node = json!({ "driver": "qcow2", "node-name": STATE_NODE, "cache": cache, "file": file });
    qmp.execute("blockdev-add", node).await?;
    let load = json!({ "job-id": JOB, "tag": vmstate::TAG, "vmstate": STATE_NODE, "devices": [STATE_NODE] });
    qmp.execute("snapshot-load", load).await?;
    loaded(qmp).await?;
    debug::write(graft.home, &[look_up()]).await?;
    qmp.execute("job-dismiss", json!({ "id": JOB })).await?;
    qmp.execute("blockdev-del", json!({ "node-name": STATE_NODE })).await?;
    graft.home.forget_state().map_err(VmmError::Start)
}

/// Makes the CPU ask its interrupt controller what is pending: nothing that was loaded says that it should, and an idle guest would
/// wait for ever for an interrupt that is there already.
///
/// It is a message-signalled interrupt to the controller of the first CPU (Intel SDM, volume 3, "Message Signalled
/// Interrupts"), of vector 0. QEMU has the CPU look up whatever the vector is (`apic_set_irq` in hw/intc/apic.c), and vectors below 16
/// are never delivered to a guest.
fn look_up() -> Patch {
    const CONTROLLER: u64 = 0xfee0_0000;
    Patch { address: CONTROLLER, bytes: vec![0; 4] }
}

async fn loaded(qmp: &Qmp) -> Result<(), VmmError> {
    let deadline = Instant::now() + LOADS_WITHIN;
    loop {
        let jobs = qmp.execute("query-jobs", json!({})).await?;
        let job = jobs.as_array().and_then(|jobs| jobs.first()).cloned().unwrap_or_default();
        if job.get("status").and_then(Value::as_str) == Some("concluded") {
            return match job.get("error").and_then(Value::as_str) {
                None => Ok(()),
                Some(reason) => Err(VmmError::Snapshot(reason.to_owned())),
            };
        }
        if Instant::now() >= deadline {
            return Err(VmmError::Late { command: "snapshot-load", within: LOADS_WITHIN });
        }
        sleep(STEP).await;
    }
}

/// The node of the writable layer: the one that QEMU was started with, or the one that was exchanged for it.
///
/// # Errors
///
/// [`VmmError`] of QEMU.
pub async fn layer_node(qmp: &Qmp) -> Result<String, VmmError> {
    let drive = qmp.execute("qom-get", json!({ "path": LAYER_PATH, "property": "drive" })).await?;
    Ok(drive.as_str().unwrap_or(LAYER_NODE).to_owned())
}

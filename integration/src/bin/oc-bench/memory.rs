//! What an idle sandbox takes.

use std::time::Duration;

use anyhow::ensure;
use oc_integration::{mesh::Mesh, processes};
use serde_json::json;
use tokio::time::sleep;

use crate::table::{Table, Target, median};

const SANDBOXES: usize = 8;

pub async fn measure(mesh: &Mesh, table: &mut Table) -> anyhow::Result<()> {
    let mut sandboxes = Vec::new();
    for _ in 0..SANDBOXES {
        let sandbox = mesh.rest().create(json!({})).await?;
        sandbox.run("true").await?;
        sandboxes.push(sandbox);
    }
    sleep(Duration::from_secs(5)).await;
    let pss: Vec<f64> = processes::vmms(mesh.state())
        .iter()
        .filter_map(|vmm| processes::memory_kib(vmm.pid, "smaps_rollup", "Pss").map(mib))
        .collect();
    ensure!(pss.len() >= SANDBOXES, "{} VMMs for {SANDBOXES} sandboxes", pss.len());
    table.row(
        "memory of an idle sandbox that has run a command (Pss)",
        median(&pss),
        "MiB",
        Target::Most(45.0),
    );
    for sandbox in sandboxes {
        sandbox.delete().await?;
    }
    Ok(())
}

/// MiB of KiB.
pub fn mib(kib: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "below 2^53")]
    let kib = kib as f64;
    kib / 1024.0
}

//! From a create to the first command's output, by each of the three ways a sandbox starts.

use std::time::{Duration, Instant};

use anyhow::ensure;
use oc_integration::{
    mesh::{Mesh, eventually},
    rest::Rest,
};
use serde_json::json;
use tokio::time::sleep;

use crate::table::{Table, Target, median, ms_since, quantile};

const WARM: usize = 20;
const CLONES: usize = 15;
const COLD: usize = 5;
/// After a create and before the next: what the one before has set off is over.
const REST: Duration = Duration::from_millis(1500);

pub async fn measure(table: &mut Table) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "4"])?;
    let mut create = Vec::new();
    let mut whole = Vec::new();
    for _ in 0..WARM {
        eventually("a full pool", async || {
            let ready = mesh.rest().get("/api/nodes").await?.json()[0]["poolReady"].as_i64();
            ensure!(ready == Some(4), "{ready:?}");
            Ok(())
        })
        .await?;
        sleep(REST).await;
        let (created, answered) = once(&mesh.rest(), "warm").await?;
        create.push(created);
        whole.push(answered);
    }
    table.row("create, warm: REST call answered, p50", median(&create), "ms", Target::None);
    table.row("create → first output, warm, p50", median(&whole), "ms", Target::Most(60.0));
    table.row("create → first output, warm, p95", quantile(&whole, 0.95), "ms", Target::None);
    mesh.stop()?;

    let mesh = Mesh::start(&["--pool-size", "0"])?;
    once(&mesh.rest(), "clone").await?;
    let mut whole = Vec::new();
    for _ in 0..CLONES {
        sleep(REST).await;
        whole.push(once(&mesh.rest(), "clone").await?.1);
    }
    let target = Target::MostTimes(2.0, table.floor.first_answer_ms);
    table.row("create → first output, clone on demand, p50", median(&whole), "ms", target);
    mesh.stop()?;

    let mesh = Mesh::start(&["--pool-size", "0", "--no-snapshots"])?;
    let mut whole = Vec::new();
    for _ in 0..COLD {
        sleep(REST).await;
        whole.push(once(&mesh.rest(), "cold").await?.1);
    }
    let target = Target::MostTimes(1.3, table.floor.cold_boot_ms);
    table.row("create → first output, cold boot, p50", median(&whole), "ms", target);
    mesh.stop()
}

/// Milliseconds until the create is answered, and until the first command's output is there.
async fn once(rest: &Rest, path: &str) -> anyhow::Result<(f64, f64)> {
    // The connection is open, as an SDK's is.
    rest.get("/api/sandboxes").await?;
    let begun = Instant::now();
    let sandbox = rest.create(json!({})).await?;
    let created = ms_since(begun);
    ensure!(sandbox.run("echo hello").await? == "hello\n");
    let answered = ms_since(begun);
    ensure!(sandbox.facts["startPath"] == path, "{} where {path} is measured", sandbox.facts["startPath"]);
    sandbox.delete().await?;
    Ok((created, answered))
}

//! Many sandboxes: at once, at the same moment, one after the other.

use std::time::{Duration, Instant};

use anyhow::ensure;
use oc_integration::{
    mesh::{Mesh, eventually},
    rest::Sandbox,
};
use serde_json::json;
use tokio::task::JoinSet;

use crate::table::{Table, Target, median, ms_since, quantile};

const AT_ONCE: usize = 50;
const SAME_MOMENT: usize = 20;

pub async fn measure(table: &mut Table, creates: usize) -> anyhow::Result<()> {
    let mesh = Mesh::start(&[])?;
    eventually("a pool for all", async || {
        let ready = mesh.rest().get("/api/nodes").await?.json()[0]["poolReady"].as_u64().unwrap_or_default();
        ensure!(ready >= SAME_MOMENT as u64, "{ready} clones wait");
        Ok(())
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let begun = Instant::now();
    let burst = create_at_once(&mesh, SAME_MOMENT).await?;
    table.row(
        "20 created at the same moment: all have answered a command",
        ms_since(begun),
        "ms",
        Target::Most(1000.0),
    );
    let more = create_at_once(&mesh, AT_ONCE - SAME_MOMENT).await?;
    let all: Vec<Sandbox> = burst.into_iter().chain(more).collect();
    let mut answered = 0;
    for sandbox in &all {
        answered += usize::from(sandbox.run("echo hello").await? == "hello\n");
    }
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    table.row("sandboxes at once, all answering", answered as f64, "", Target::Least(AT_ONCE as f64));
    for sandbox in all {
        sandbox.delete().await?;
    }
    let (mut took, mut failed) = (Vec::new(), 0);
    for number in 0..creates {
        let begun = Instant::now();
        let done = async {
            let sandbox = mesh.rest().create(json!({})).await?;
            ensure!(sandbox.run(&format!("echo {number}")).await? == format!("{number}\n"));
            took.push(ms_since(begun));
            sandbox.delete().await
        };
        if let Err(error) = done.await {
            eprintln!("create {number}: {error:#}");
            failed += 1;
        }
    }
    table.row(&format!("of {creates} creates in a row, failed"), f64::from(failed), "", Target::Most(0.0));
    table.row("create → first output, in a row without a rest, p50", median(&took), "ms", Target::None);
    table.row(
        "create → first output, in a row without a rest, p99",
        quantile(&took, 0.99),
        "ms",
        Target::None,
    );
    mesh.stop()
}

/// Creates that many at the same moment, and runs a command in each.
async fn create_at_once(mesh: &Mesh, count: usize) -> anyhow::Result<Vec<Sandbox>> {
    let mut creates = JoinSet::new();
    for _ in 0..count {
        let rest = mesh.rest();
        creates.spawn(async move {
            let sandbox = rest.create(json!({})).await?;
            ensure!(sandbox.run("echo hello").await? == "hello\n");
            Ok(sandbox)
        });
    }
    creates.join_all().await.into_iter().collect()
}

//! The way to a guest and back.

use std::time::Instant;

use oc_integration::mesh::Mesh;
use serde_json::json;

use crate::table::{Table, Target, median, ms_since, quantile};

const CALLS: usize = 300;

pub async fn measure(mesh: &Mesh, table: &mut Table) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let mut runs = Vec::new();
    let mut stats = Vec::new();
    for _ in 0..CALLS {
        let begun = Instant::now();
        // A program, as `exec run true` is; through a shell it is two.
        sandbox.run_with(json!({ "cmd": "true", "args": ["x"] })).await?;
        runs.push(ms_since(begun));
        let begun = Instant::now();
        sandbox.files(reqwest::Method::GET, "/files/stat", "/").await?.expect(200)?;
        stats.push(ms_since(begun));
    }
    table.row("`exec run true` through the gateway, p50", median(&runs), "ms", Target::Most(10.0));
    table.row("`exec run true` through the gateway, p99", quantile(&runs, 0.99), "ms", Target::None);
    table.row("file stat through the gateway, p50", median(&stats), "ms", Target::None);
    sandbox.delete().await
}

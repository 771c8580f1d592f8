//! Large files through REST, and what the processes that they pass through take.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use oc_integration::{mesh::Mesh, processes};
use reqwest::Method;
use serde_json::json;

use crate::{
    memory::mib,
    table::{Table, Target, median},
};

const MIB: usize = 100;
const ROUNDS: usize = 5;

pub async fn measure(mesh: &Mesh, table: &mut Table) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let piece = Bytes::from(vec![7; 1 << 20]);
    let (mut ups, mut downs) = (Vec::new(), Vec::new());
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    let rate = |begun: Instant| MIB as f64 / begun.elapsed().as_secs_f64();
    for _ in 0..ROUNDS {
        let pieces = stream::iter(std::iter::repeat_n(piece.clone(), MIB)).map(Ok::<_, std::io::Error>);
        let begun = Instant::now();
        sandbox.put("large", reqwest::Body::wrap_stream(pieces)).await?.expect(204)?;
        ups.push(rate(begun));
        let begun = Instant::now();
        let mut body = sandbox.file(Method::GET, "/files", "large").send().await?.bytes_stream();
        let mut bytes = 0;
        while let Some(part) = body.next().await {
            bytes += part?.len();
        }
        ensure!(bytes == MIB << 20, "{bytes} bytes came back");
        downs.push(rate(begun));
    }
    let floor = table.floor.guest_to_host_mib_s;
    table.row("upload of 100 MiB through REST", median(&ups), "MiB/s", Target::LeastTimes(0.5, floor));
    table.row("download of 100 MiB through REST", median(&downs), "MiB/s", Target::LeastTimes(0.5, floor));
    for service in ["gateway", "vmm-agent", "scheduler"] {
        let peak = processes::memory_kib(mesh.pid(service)?, "status", "VmHWM").context("no VmHWM")?;
        table.row(&format!("memory of the {service} throughout, peak"), mib(peak), "MiB", Target::Most(64.0));
    }
    let guest = sandbox.run_as_root("awk '/VmHWM/ {print $2}' /proc/1/status").await?;
    table.row(
        "memory of the guest's first process, peak",
        mib(guest.trim().parse()?),
        "MiB",
        Target::Most(64.0),
    );
    sandbox.delete().await
}

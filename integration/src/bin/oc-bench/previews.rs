//! Requests to ports through the gateway, beside nginx in front of the same server; and to a port in a guest.
//!
//! The gateway is one of its own process, with hosts' agents that are ours alone: they answer `ForwardPort` by connecting to the
//! server that nginx proxies to. One hands its connections over, as a host on the gateway's machine does; one carries their bytes,
//! as a host elsewhere does: then the gateway has that hop on top of what nginx does. nginx says as much as the gateway to the server, to the client
//! and to its log. [`bed`] is what they run on, [`load`] who asks.

pub mod bed;
pub mod load;

use std::time::Duration;

use anyhow::Context as _;
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
};
use serde_json::json;

use self::{
    bed::{Bed, Proxy},
    load::{Load, download, hold, requests},
};
use crate::table::{RATIO, Table, Target, median};

/// Rounds of each, one after the other by turns: the machine is as busy for the one as for the other.
const ROUNDS: usize = 11;
const ROUND: Duration = Duration::from_secs(3);
const CONNECTIONS: usize = 32;
const BULK_MIB: usize = 256;
const OPEN: usize = 10_000;

pub async fn measure(mesh: &Mesh, table: &mut Table) -> anyhow::Result<()> {
    let bed = Bed::start(BULK_MIB).await?;
    let (mut ours, mut far, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..=ROUNDS {
        theirs.push(requests(&bed.nginx, CONNECTIONS, ROUND).await.context("nginx")?);
        ours.push(requests(&bed.near, CONNECTIONS, ROUND).await.context("the gateway")?);
        far.push(requests(&bed.far, CONNECTIONS, ROUND).await.context("the gateway and a host")?);
    }
    let rate = |load: &Load| load.per_second;
    let tail = |load: &Load| load.p99_ms;
    let processor = |load: &Load| load.processor_us;
    // The first of each warms up.
    let of =
        |loads: &[Load], figure: fn(&Load) -> f64| median(&loads[1..].iter().map(figure).collect::<Vec<_>>());
    // What is beside each other in time is compared: how fast the machine is changes within a minute.
    let beside = |loads: &[Load], figure: fn(&Load) -> f64| {
        let pairs = loads[1..].iter().zip(&theirs[1..]);
        median(&pairs.map(|(load, floor)| figure(load) / figure(floor)).collect::<Vec<_>>())
    };
    table.row("floor: nginx before the same server, small answers", of(&theirs, rate), "/s", Target::None);
    table.row("preview: small answers, kept-alive", of(&ours, rate), "/s", Target::None);
    table.row("by nginx beside it", beside(&ours, rate), RATIO, Target::Least(0.9));
    table.row("floor: nginx, small answers, p99", of(&theirs, tail), "ms", Target::None);
    table.row("preview: small answers, p99", of(&ours, tail), "ms", Target::None);
    table.row("by nginx beside it", beside(&ours, tail), RATIO, Target::Most(1.2));
    table.row("floor: nginx, processor time of a small answer", of(&theirs, processor), "µs", Target::None);
    table.row("preview: processor time of a small answer", of(&ours, processor), "µs", Target::None);
    table.row("by nginx beside it", beside(&ours, processor), RATIO, Target::None);
    table.row("preview of a host elsewhere: small answers", of(&far, rate), "/s", Target::None);
    table.row("by nginx beside it", beside(&far, rate), RATIO, Target::None);
    table.row("preview of a host elsewhere: small answers, p99", of(&far, tail), "ms", Target::None);

    let mut bulk = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (rates, proxy) in bulk.iter_mut().zip([&bed.nginx, &bed.near, &bed.far]) {
            rates.push(download(proxy, BULK_MIB << 20).await?);
        }
    }
    let [theirs, ours, far] = bulk.map(|rates| median(&rates));
    table.row("floor: nginx, a large answer", theirs, "MiB/s", Target::None);
    table.row("preview: a large answer", ours, "MiB/s", Target::None);
    table.row("preview of a host elsewhere: a large answer", far, "MiB/s", Target::None);

    let resident = || processes::memory_kib(bed.gateway_pid, "status", "VmRSS").context("no gateway");
    let before = resident()?;
    let held = hold(&bed.near, OPEN).await.context("open connections")?;
    let grown = resident()?.saturating_sub(before);
    #[expect(clippy::cast_precision_loss, reason = "KiB of one process")]
    let each = grown as f64 / OPEN as f64;
    table.row("preview: memory of each of 10000 open connections", each, "KiB", Target::Most(40.0));
    drop(held);
    bed.stop().await?;

    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    let server = "require('http').createServer((q, a) => q.url == '/big' ? a.end(Buffer.alloc(64 << 20)) : a.end('hello')).listen(3000)";
    sandbox.run(&format!("(node -e \"{server}\" > /dev/null 2>&1 &)")).await?;
    let address = mesh.url.strip_prefix("http://").context("no http URL")?.parse()?;
    let guest = Proxy { address, host: format!("{}-p3000.preview.localhost", sandbox.id), pids: vec![] };
    eventually("a server in the guest", async || download(&guest, 64 << 20).await).await?;
    let load = requests(&guest, 8, ROUND).await.context("a guest")?;
    table.row("preview: Node in a guest, small answers", load.per_second, "/s", Target::None);
    table.row("preview: Node in a guest, small answers, p99", load.p99_ms, "ms", Target::None);
    let floor = table.floor.guest_to_host_mib_s;
    table.row(
        "preview: a large answer out of a guest",
        download(&guest, 64 << 20).await?,
        "MiB/s",
        Target::LeastTimes(0.5, floor),
    );
    sandbox.delete().await
}

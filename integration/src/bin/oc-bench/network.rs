//! What the network takes of a create, how many there can be, and what passes through one.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use oc_integration::{
    mesh::{Mesh, eventually},
    world::{PORT, World},
};
use oc_vmm_agent::network::{self, Network, Settings, plan::Names};
use serde_json::json;
use tokio::time::sleep;

use crate::table::{Table, Target, median, ms_since};

const CREATES: usize = 15;
/// After a create and before the next: what the one before has set off is over.
const REST: Duration = Duration::from_millis(1000);
const NAMESPACES: usize = 500;
const SENT_MIB: usize = 64;
const ROUNDS: usize = 3;

pub async fn measure(table: &mut Table) -> anyhow::Result<()> {
    for (pool, what, most) in [("2", "warm", 5.0), ("0", "clone", 30.0)] {
        let with = create(&["--pool-size", pool], what).await?;
        let without = create(&["--pool-size", pool, "--network", "off"], what).await?;
        table.row(&format!("create, {what}: REST call answered, with a network"), with, "ms", Target::None);
        table.row(&format!("create, {what}: the same without"), without, "ms", Target::None);
        let adds = format!("create, {what}: what the network adds");
        table.row(&adds, with - without, "ms", Target::Most(most));
    }
    many(table).await?;
    throughput(table).await
}

/// Milliseconds until a create is answered, the median of some.
async fn create(options: &[&str], path: &str) -> anyhow::Result<f64> {
    let mesh = Mesh::start(options)?;
    let rest = mesh.rest();
    // What is made once is made.
    rest.create(json!({})).await?.delete().await?;
    let mut took = Vec::new();
    for _ in 0..CREATES {
        if path == "warm" {
            eventually("a full pool", async || {
                let ready = rest.get("/api/nodes").await?.json()[0]["poolReady"].as_i64();
                ensure!(ready == Some(2), "{ready:?}");
                Ok(())
            })
            .await?;
        }
        sleep(REST).await;
        let begun = Instant::now();
        let sandbox = rest.create(json!({})).await?;
        took.push(ms_since(begun));
        ensure!(
            sandbox.facts["startPath"] == path,
            "{} where {path} is measured",
            sandbox.facts["startPath"]
        );
        sandbox.delete().await?;
    }
    mesh.stop()?;
    Ok(median(&took))
}

/// As many networks as a host may have VMs, without the VMs.
async fn many(table: &mut Table) -> anyhow::Result<()> {
    let names = Names::new(&format!("{:08x}", std::process::id()));
    let settings =
        Settings { allow: Vec::new(), resolv_conf: "/etc/resolv.conf".into(), connections: 4096, mbit: 1000 };
    let network = Network::open(names.clone(), settings, BTreeSet::new()).await?;
    let begun = Instant::now();
    let mut held = Vec::new();
    while held.len() < NAMESPACES {
        held.push(network.take(|_| Ok(())).await?);
    }
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    let each = ms_since(begun) / NAMESPACES as f64;
    table.row("networks of VMs at once", 500.0, "", Target::Least(500.0));
    table.row("making each of them", each, "ms", Target::None);
    drop(held);
    network.close().await;
    Ok(network::remove_all(&names).await?)
}

async fn throughput(table: &mut Table) -> anyhow::Result<()> {
    let world = World::make()?;
    let unlimited = [("OC_NETWORK_MBIT", "400000")];
    let mesh = Mesh::start_in(None, &["--pool-size", "1"], &unlimited)?;
    let sandbox = mesh.rest().create(json!({})).await?;
    let script = format!(
        "import socket, time\n\
         one = socket.create_connection(('{}', {PORT}))\n\
         lines = one.makefile('r'); lines.readline()\n\
         one.sendall(b'sink\\n'); piece = b'x' * (1 << 20)\n\
         begun = time.monotonic()\n\
         for _ in range({SENT_MIB}): one.sendall(piece)\n\
         one.shutdown(socket.SHUT_WR); assert int(lines.readline()) == {SENT_MIB} << 20\n\
         print({SENT_MIB} / (time.monotonic() - begun))\n",
        world.public
    );
    sandbox.put("send.py", script).await?.expect(204)?;
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        rates.push(sandbox.run("python3 send.py").await?.trim().parse::<f64>().context("a rate")?);
    }
    table.row("guest to the world by TCP through its TAP", median(&rates), "MiB/s", Target::None);
    mesh.stop()
}

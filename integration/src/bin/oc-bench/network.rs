//! What the network takes of a create, how many there can be, and what passes through one.

use std::{
    collections::BTreeSet,
    fs,
    net::TcpStream as StdStream,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use oc_integration::{
    mesh::{Mesh, eventually},
    world::{PORT, World},
};
use oc_vmm_agent::network::{
    self, Limits, Network, Settings,
    namespace::{self, Namespace},
    plan::{GUEST, Names},
};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::sleep};

use crate::{
    previews::{
        bed::Proxy,
        load::{Client, download},
    },
    table::{Table, Target, median, ms_since},
};

const CREATES: usize = 15;
/// After a create and before the next: what the one before has set off is over.
const REST: Duration = Duration::from_millis(1000);
const NAMESPACES: usize = 500;
const SENT_MIB: usize = 64;
const ROUNDS: usize = 5;
/// A port of the guest.
const SERVED: u16 = 3000;
/// As much as an agent can be told, and more than anybody reaches.
const UNLIMITED: (&str, &str) = ("OC_NETWORK_MBIT", "100000");
/// Has the agent say how long each step of a start took.
const STEPS: (&str, &str) = ("OC_LOG", "info,oc_vmm_agent::telemetry=debug");

pub async fn measure(table: &mut Table) -> anyhow::Result<()> {
    for (pool, what, most) in [("2", "warm", 5.0), ("0", "clone", 30.0)] {
        let with = create(&["--pool-size", pool], what, json!({})).await?;
        let without = create(&["--pool-size", pool, "--network", "off"], what, json!({})).await?;
        let of = |how: &str| format!("create, {what}: REST call answered, {how}");
        table.row(&of("with a network"), with.answered, "ms", Target::None);
        table.row(&of("without"), without.answered, "ms", Target::None);
        let adds = format!("create, {what}: what the network adds");
        table.row(&adds, with.answered - without.answered, "ms", Target::Most(most));
        let step = format!("create, {what}: its VMM's network is plugged in");
        table.row(&step, with.plugged, "ms", Target::Most(30.0));
    }
    let closed = create(&["--pool-size", "2"], "warm", json!({ "egress": "none" })).await?;
    let what = "create, warm: REST call answered, with a network that leads nowhere";
    table.row(what, closed.answered, "ms", Target::None);
    many(table).await?;
    to_the_world(table).await?;
    through_a_preview(table).await
}

/// Medians, milliseconds.
struct Created {
    /// Until a create is answered.
    answered: f64,
    /// Of that, if it is part of it, until the VMM has its network; if it is not, before.
    plugged: f64,
}

async fn create(options: &[&str], path: &str, body: Value) -> anyhow::Result<Created> {
    let mesh = Mesh::start_in(None, options, &[STEPS])?;
    let rest = mesh.rest();
    // What is made once is made.
    rest.create(body.clone()).await?.delete().await?;
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
        let sandbox = rest.create(body.clone()).await?;
        took.push(ms_since(begun));
        ensure!(
            sandbox.facts["startPath"] == path,
            "{} where {path} is measured",
            sandbox.facts["startPath"]
        );
        sandbox.delete().await?;
    }
    let log = fs::read_to_string(mesh.state().join("log/vmm-agent.log"))?;
    let steps = log.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        // A number of 128 bits is a string there.
        (line["step"] == "network").then(|| line["took_us"].as_str()?.parse::<f64>().ok())?
    });
    let steps: Vec<f64> = steps.map(|us| us / 1000.0).collect();
    ensure!(steps.len() >= CREATES, "the agent tells of {} steps", steps.len());
    mesh.stop()?;
    // The last: what went before is the golden snapshot's, and what was made once.
    Ok(Created { answered: median(&took), plugged: median(&steps[steps.len() - CREATES..]) })
}

/// As many networks as a host may have VMs, without the VMs.
async fn many(table: &mut Table) -> anyhow::Result<()> {
    let names = Names::new(&format!("{:08x}", std::process::id()));
    let settings = Settings {
        allow: Vec::new(),
        resolv_conf: "/etc/resolv.conf".into(),
        limits: Limits { connections: 4096, mbit: 1000 },
    };
    let network = Network::open(names.clone(), settings, BTreeSet::new()).await?;
    let begun = Instant::now();
    let mut held = Vec::new();
    while held.len() < NAMESPACES {
        held.push(network.take(|_| Ok(())).await?);
    }
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let each = |begun| ms_since(begun) / NAMESPACES as f64;
    let made = each(begun);
    let there = namespace::all()?;
    let there = held.iter().filter(|interface| there.contains(&names.vm(interface.number))).count();
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    table.row("networks of VMs at once", there as f64, "", Target::Least(NAMESPACES as f64));
    table.row("making each of them", made, "ms", Target::None);
    let begun = Instant::now();
    for interface in held {
        network.release(interface.number).await?;
    }
    table.row("removing each of them", each(begun), "ms", Target::None);
    network.close().await;
    Ok(network::remove_all(&names).await?)
}

/// What a guest sends through its TAP, its namespace, its agent's and the host.
async fn to_the_world(table: &mut Table) -> anyhow::Result<()> {
    let world = World::make()?;
    let mesh = Mesh::start_in(None, &["--pool-size", "0"], &[UNLIMITED])?;
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

/// One server in a guest, asked by a plain socket at the other end of its TAP, and through the gateway.
async fn through_a_preview(table: &mut Table) -> anyhow::Result<()> {
    let mesh = Mesh::start_in(None, &["--pool-size", "0"], &[UNLIMITED])?;
    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    let server = format!(
        "const big = Buffer.alloc({SENT_MIB} << 20); require('http').createServer((q, a) => a.end(big)).listen({SERVED})"
    );
    sandbox.run(&format!("(node -e \"{server}\" > /dev/null 2>&1 &)")).await?;
    let address = mesh.url.strip_prefix("http://").context("no http URL")?.parse()?;
    let preview =
        Proxy { address, host: format!("{}-p{SERVED}.preview.localhost", sandbox.id), pids: vec![] };
    eventually("a server in the guest", async || download(&preview, SENT_MIB << 20).await).await?;
    let networks: Vec<_> = mesh.networks()?.into_iter().collect();
    let [number] = networks[..] else { bail!("not one VM: {networks:?}") };
    let namespace = Namespace::open(&mesh.network_names().vm(number))?;
    let (mut plain, mut through) = (Vec::new(), Vec::new());
    for _ in 0..=ROUNDS {
        let stream = namespace.enter(|| StdStream::connect((GUEST, SERVED))).await?;
        stream.set_nonblocking(true)?;
        let mut client = Client::over(TcpStream::from_std(stream)?, "guest");
        plain.push(client.download(SENT_MIB << 20).await?);
        through.push(download(&preview, SENT_MIB << 20).await?);
    }
    // The first of each warms up.
    let (plain, through) = (median(&plain[1..]), median(&through[1..]));
    table.row("a large answer out of a guest, to a plain socket at its TAP", plain, "MiB/s", Target::None);
    let target = Target::LeastTimesOf(0.8, plain, "the plain socket");
    table.row("a large answer out of a guest, through a preview", through, "MiB/s", target);
    sandbox.delete().await?;
    mesh.stop()
}

//! What a sandbox reaches, and what it does not whatever it tries. Each test has a mesh and a world of its own.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::{
    mesh::{Mesh, eventually, succeeded},
    rest::Sandbox,
    world::{self, PORT, World},
};
use oc_mesh::{
    keys, record,
    store::{self, Txn},
};
use oc_proto::mesh::HostRecord;
use oc_vmm_agent::network::plan::Pair;
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    checkpoints, followed,
    hibernation::hibernate,
    names::{self, Resolver},
    packages,
};

/// Where guests ask for names (vmm-agent/src/network/plan.rs).
const DNS: &str = "198.18.0.53";

/// How long it is waited for what must not come through, seconds; and for what must.
const IMPATIENT: u32 = 5;
const PATIENT: u32 = 50;

/// Who the world sees when a sandbox connects to `address`, which it must not come through to.
async fn reach(sandbox: &Sandbox, address: &str) -> anyhow::Result<String> {
    reach_port(sandbox, address, PORT, IMPATIENT).await
}

/// As [`reach`], where it must.
async fn reaches(sandbox: &Sandbox, address: &str) -> anyhow::Result<String> {
    reach_port(sandbox, address, PORT, PATIENT).await
}

async fn reach_port(sandbox: &Sandbox, address: &str, port: u16, seconds: u32) -> anyhow::Result<String> {
    // Whoever takes the connection and says nothing is open, too.
    let reading = seconds - 1;
    let script = format!(
        "timeout {seconds} bash -c 'exec 3<>/dev/tcp/{address}/{port} || exit 1; read -t {reading} -r from <&3; echo ${{from:-open}}' \
         2>/dev/null || echo shut"
    );
    Ok(sandbox.run(&script).await?.trim().to_owned())
}

pub async fn a_sandbox_reaches_the_world_and_goes_on_to(_: Arc<Mesh>) -> anyhow::Result<()> {
    let world = World::make()?;
    let directory = tempfile::tempdir()?;
    let conf = directory.path().join("resolv.conf");
    let (_, first) = Resolver::start(world.public.parse()?)?;
    let (_, second) = Resolver::start(Ipv4Addr::new(25, 1, 2, 3))?;
    fs::write(&conf, format!("nameserver {first}\n"))?;
    let (four, six) = (format!("{}/32", world.excepted), format!("{}/128", world.excepted6));
    let options =
        ["--pool-size", "1", "--paused-for", "0", "--network-allow", &four, "--network-allow", &six];
    let conf = conf.to_str().context("a path")?;
    let mesh = Mesh::start_in(None, &options, &[("OC_RESOLV_CONF", conf)])?;
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0 })).await?;
    assert_eq!(sandbox.facts["egress"], "open", "{}", sandbox.facts);

    reaches_all(&world, &sandbox).await?;
    // Names, by whom the host asks at the moment.
    let finds_world = async || {
        let found = sandbox.run("getent ahostsv4 world.test").await?;
        ensure!(found.contains(&world.public), "{found}");
        Ok(())
    };
    eventually("names are found", finds_world).await?;
    fs::write(conf, format!("nameserver {second}\n"))?;
    eventually("names are asked for elsewhere", async || {
        let found = sandbox.run("getent ahostsv4 other.test").await?;
        ensure!(found.contains("25.1.2.3"), "{found}");
        Ok(())
    })
    .await?;
    fs::write(conf, format!("nameserver {first}\n"))?;
    // Much of it, whole.
    let script =
        format!("exec 3<>/dev/tcp/{}/{PORT}; read -r from <&3; echo 1000000 >&3; wc -c <&3", world.public);
    assert_eq!(sandbox.run(&format!("bash -c '{script}'")).await?.trim(), "1000000");

    let network = rest.get(&sandbox.path("/network")).await?.expect(200)?.json();
    let (sent, received) = (network["sentBytes"].as_u64(), network["receivedBytes"].as_u64());
    assert!(sent > Some(1000) && received > Some(1_000_000), "{network}");
    assert_eq!((&network["isConnected"], &network["egress"]), (&json!(true), &json!("open")), "{network}");
    let mut show = mesh.oc();
    show.args(["network", "show", &sandbox.id]);
    let shown = succeeded(show)?;
    assert!(shown.contains("198.18.0.2") && shown.contains(DNS), "{shown}");

    // What is put to sleep, woken and forked goes on with the same address, in another namespace.
    let address = "ip -o -4 address show dev eth0 | awk '{print $4}'";
    assert_eq!(sandbox.run(address).await?, "198.18.0.2/30\n");
    hibernate(&rest, &sandbox).await?;
    eventually("only the clone that waits has one", async || {
        let used = mesh.networks()?;
        ensure!(used.len() == 1, "{used:?}");
        Ok(())
    })
    .await?;
    reaches_all(&world, &sandbox).await?;
    let path = sandbox.get().await?.json()["startPath"].clone();
    assert_eq!(path, "memory");
    let mut forked = checkpoints::fork(&rest, &sandbox.path("/fork"), json!({ "mode": "live" })).await?;
    let child = forked.remove(0);
    reaches_all(&world, &child).await?;
    reaches_all(&world, &sandbox).await?;

    // An agent that dies leaves them as they are, and the next one has them.
    let agent = mesh.running_pid("vmm-agent").await?;
    kill(Pid::from_raw(agent), Signal::SIGKILL)?;
    eventually("the next agent", async || {
        ensure!(mesh.pid("vmm-agent")? != agent, "the same");
        reaches_all(&world, &sandbox).await
    })
    .await?;
    eventually("names are found again", finds_world).await?;
    packages::arrive(&world, &child).await?;
    child.delete().await?;
    sandbox.delete().await?;
    eventually("namespaces are given back", async || {
        let used = mesh.networks()?;
        ensure!(used.len() <= 1, "{used:?}");
        Ok(())
    })
    .await?;
    mesh.stop()
}

async fn reaches_all(world: &World, sandbox: &Sandbox) -> anyhow::Result<()> {
    assert_eq!(reaches(sandbox, &world.public).await?, world.public_of_host, "the world sees the host");
    assert_ne!(reaches(sandbox, &world.excepted).await?, "shut");
    assert_ne!(reaches(sandbox, &world.excepted6).await?, "shut");
    assert_eq!(reach(sandbox, &world.private).await?, "shut");
    Ok(())
}

pub async fn a_sandbox_that_may_reach_nothing_does_not(_: Arc<Mesh>) -> anyhow::Result<()> {
    let world = World::make()?;
    let (four, six) = (format!("{}/32", world.excepted), format!("{}/128", world.excepted6));
    let options =
        ["--pool-size", "1", "--paused-for", "0", "--network-allow", &four, "--network-allow", &six];
    let mesh = Mesh::start(&options)?;
    let rest = mesh.rest();
    let refused = rest.post("/api/sandboxes", json!({ "egress": "some" })).await?;
    assert_eq!(refused.status, 400);
    // From the pool, and as a clone of its own.
    let mut closed = Vec::new();
    for _ in 0..2 {
        closed.push(rest.create(json!({ "timeout": 0, "egress": "none" })).await?);
    }
    let open = rest.create(json!({ "timeout": 0 })).await?;
    assert_eq!(reaches(&open, &world.public).await?, world.public_of_host);
    assert_ne!(reaches(&open, &world.excepted6).await?, "shut");
    let checkpoint = checkpoints::checkpoint(&rest, &closed[0], json!({ "name": "it" })).await?;
    for body in [json!({ "mode": "live" }), json!({})] {
        closed.extend(checkpoints::fork(&rest, &checkpoints::of(&checkpoint, "/fork"), body).await?);
    }
    hibernate(&rest, &closed[0]).await?;
    for sandbox in &closed {
        assert_eq!(sandbox.get().await?.json()["egress"], "none");
        for address in [&world.public, &world.excepted, &world.excepted6] {
            assert_eq!(reach(sandbox, address).await?, "shut", "{address}");
        }
        assert_eq!(reach_port(sandbox, DNS, 53, IMPATIENT).await?, "shut");
        assert_eq!(
            sandbox.run("ping -c 1 -w 50 198.18.0.1 > /dev/null && echo up").await?,
            "up\n",
            "it has a link"
        );
    }
    mesh.stop()
}

/// Run as the guest's root: packets that are not its own, or are in disguise.
const FORGER: &str = include_str!("network/forger.py");

/// Run in the guest: says what answers to pings, and to connections whose packets may go so far; and sends datagrams.
const PROBE: &str = include_str!("network/probe.py");

/// Run in the guest: as many conversations as it can begin.
const CROWD: &str = r"
import socket, sys, time
all = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(300)]
while True:
    for number, one in enumerate(all): one.sendto(b'crowd %d' % number, (sys.argv[1], int(sys.argv[2])))
    time.sleep(1)
";

/// Run in the guest: sends as much as it gets in the test, and says how much has arrived, and in how many seconds.
const UPLOAD: &str = r"
import socket, sys, time
one = socket.create_connection((sys.argv[1], int(sys.argv[2])))
lines = one.makefile(); lines.readline()
one.sendall(b'sink\n')
begun = time.monotonic()
one.sendall(bytes(3000000)); one.shutdown(socket.SHUT_WR)
print(lines.readline().strip(), time.monotonic() - begun)
";

/// What the forger sends by, too: GRE, SCTP, and one that is for experiments (RFC 3692).
const STRANGE: [u64; 3] = [47, 132, 253];

/// A port of this host that leads on to the private address of a world, until it is dropped.
struct Published {
    port: u16,
    table: String,
}

impl Published {
    fn by(world: &World) -> anyhow::Result<Self> {
        let published = Self { port: 9, table: world.name.clone() };
        let Self { port, table } = &published;
        let rule =
            format!("ip daddr {} tcp dport {port} dnat to {}:{PORT}", world.public_of_host, world.private);
        let rules = format!(
            "table ip {table} {{ chain lead {{ type nat hook prerouting priority dstnat; {rule}; }}; }}"
        );
        let mut nft = Command::new("nft");
        nft.arg(rules);
        succeeded(nft)?;
        Ok(published)
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        let _ = Command::new("nft").args(["delete", "table", "ip", &self.table]).status();
    }
}

pub async fn a_hostile_sandbox_reaches_nothing_that_it_should_not(_: Arc<Mesh>) -> anyhow::Result<()> {
    let world = World::make()?;
    let (four, six) = (format!("{}/32", world.excepted), format!("{}/128", world.excepted6));
    let options = ["--pool-size", "2", "--network-allow", &four, "--network-allow", &six];
    let directory = tempfile::tempdir()?;
    let conf = directory.path().join("resolv.conf");
    let (resolver, at) = Resolver::start(world.public.parse()?)?;
    fs::write(&conf, format!("nameserver {at}\n"))?;
    let conf = conf.to_str().context("a path")?;
    let limits = [("OC_NETWORK_CONNECTIONS", "128"), ("OC_NETWORK_MBIT", "8"), ("OC_RESOLV_CONF", conf)];
    let mesh = Mesh::start_in(None, &options, &limits)?;
    let rest = mesh.rest();
    let (hostile, other) =
        tokio::try_join!(rest.create(json!({ "timeout": 0 })), rest.create(json!({ "timeout": 0 })))?;
    serves(&other, 8000).await?;
    let services = TcpListener::bind("[::]:0")?;
    let service = services.local_addr()?.port();
    let gateway: u16 = mesh.url.rsplit(':').next().context("a port")?.parse()?;
    assert_eq!(reaches(&hostile, &world.public).await?, world.public_of_host, "it does reach the world");
    assert_ne!(reaches(&hostile, &world.excepted6).await?, "shut", "by IPv6, too");

    // No service of this host by any of its addresses, of which one is of the internet and one beside what is excepted.
    let addresses = addresses_of_host(&world)?;
    assert!(addresses.contains(&world.public_of_host), "{addresses:?}");
    let mut targets: Vec<(String, u16)> = Vec::new();
    for address in &addresses {
        targets.extend([(address.clone(), service), (address.clone(), gateway)]);
    }
    // Nor what the host only leads on to: somebody private, by a port of its own as containers have them.
    let published = Published::by(&world)?;
    targets.push((world.public_of_host.clone(), published.port));
    // No other sandbox, by the addresses that lead to it where it is; nothing of what is between.
    let of_vms = mesh.networks()?.into_iter().map(Pair::of_vm);
    for pair in of_vms {
        let ends =
            [pair.near.to_string(), pair.far.to_string(), pair.near6.to_string(), pair.far6.to_string()];
        targets.extend(ends.into_iter().map(|address| (address, 8000)));
    }
    targets.push(("198.18.0.2".into(), 8000));
    for (address, port) in [("198.18.0.1", 53), (DNS, 22), ("198.18.0.1", 22), ("198.18.128.2", service)] {
        targets.push((address.into(), port));
    }
    // Nothing private, even where somebody answers; no metadata, nothing reserved.
    targets.extend([(world.private.clone(), PORT), (world.private6.clone(), PORT)]);
    for address in [
        "169.254.169.254",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "192.0.2.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "0.0.0.0",
        "fd00:ec2::254",
        "fe80::1%eth0",
        "ff02::1%eth0",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
    ] {
        targets.push((address.into(), 80));
    }
    let found = scan(&hostile, &targets).await?;
    assert!(found.is_empty(), "it reaches {found:?}");

    is_unheard(&world, &hostile, &addresses).await?;

    // Nobody is taken for somebody else, and nothing for something else.
    world.note_protocols()?;
    hostile.put("forger.py", FORGER).await?.expect(204)?;
    let forge = format!("python3 /home/sandbox/forger.py {} {} {PORT}", world.excepted, world.excepted6);
    hostile.run_as_root(&forge).await?;
    eventually("what is honest arrives", async || {
        let seen: Vec<_> = world.datagrams().into_iter().map(|(_, text)| text).collect();
        let has = |text: &[u8]| seen.iter().any(|one| one == text);
        ensure!(has(b"honest") && has(b"honest6.") && has(b"done"), "{seen:?}");
        Ok(())
    })
    .await?;
    let forged: Vec<_> =
        world.datagrams().into_iter().filter(|(_, text)| text.starts_with(b"forged")).collect();
    assert!(forged.is_empty(), "{forged:?}");
    let protocols = world.protocols()?;
    assert!(protocols.contains(&17), "datagrams have arrived: {protocols:?}");
    assert!(STRANGE.iter().all(|strange| !protocols.contains(strange)), "{protocols:?}");
    assert_eq!(reaches(&hostile, &world.public).await?, world.public_of_host, "its way is as it was");
    assert_eq!(reaches(&other, &world.public).await?, world.public_of_host, "and so is the other's");

    // No more than its share: a megabyte each second.
    let script =
        format!("exec 3<>/dev/tcp/{}/{PORT}; read -r from <&3; echo 3000000 >&3; wc -c <&3", world.public);
    let begun = Instant::now();
    assert_eq!(hostile.run(&format!("bash -c '{script}'")).await?.trim(), "3000000");
    let took = begun.elapsed().as_secs_f64();
    assert!(took > 1.5, "3 MB at 8 Mbit/s took {took} s");
    hostile.put("upload.py", UPLOAD).await?.expect(204)?;
    let before = policed(&mesh)?;
    let upload = hostile.run(&format!("python3 upload.py {} {PORT}", world.public)).await?;
    let (taken, took) = upload.trim().split_once(' ').context("two numbers")?;
    assert_eq!(taken, "3000000");
    assert!(took.parse::<f64>()? > 1.5, "3 MB at 8 Mbit/s took {took} s to send");
    assert!(policed(&mesh)? > before, "that was as fast as it is anyhow");

    // What is fetched from its ports is not its share.
    let before = policed(&mesh)?;
    other.run("head -c 3000000 /dev/zero > large").await?;
    let host = format!("{}-p8000.preview.localhost", other.id);
    let fetched =
        rest.send(rest.anonymous(Method::GET, "/large").header("host", &host)).await?.expect(200)?;
    assert_eq!((fetched.body.len(), policed(&mesh)?), (3_000_000, before));

    names::are_shared(&resolver, &hostile, &other).await?;
    followed::end_for_all(&mesh, &hostile, &world).await?;

    // And no more conversations than it may have, of which two are open for as long as it is.
    for address in [&world.excepted, &world.excepted6] {
        let hold = format!(
            "exec 3<>/dev/tcp/{address}/{PORT} && echo sink >&3 && touch held-{address} && while sleep 1; do echo >&3; done"
        );
        let hold =
            format!("(bash -c '{hold}' > /dev/null 2>&1 &); until [ -e held-{address} ]; do sleep 0.1; done");
        hostile.run(&hold).await?;
    }
    hostile.put("crowd.py", CROWD).await?.expect(204)?;
    hostile.run(&format!("python3 crowd.py {} {PORT} > /dev/null 2>&1 &", world.excepted)).await?;
    let crowd = || {
        let sent = world.datagrams().into_iter().map(|(_, text)| text);
        sent.filter(|text| text.starts_with(b"crowd")).collect::<BTreeSet<_>>().len()
    };
    // What it has had before counts until it is forgotten; then the crowd takes its place.
    eventually("one more is too many", async || {
        ensure!(crowd() > 30, "{}", crowd());
        let reached = reach(&hostile, &world.public).await?;
        ensure!(reached == "shut", "{reached}");
        Ok(())
    })
    .await?;
    assert!(crowd() <= 128, "{} conversations", crowd());
    assert_eq!(reaches(&other, &world.public).await?, world.public_of_host, "the other has its own share");
    let both = [world.excepted.parse()?, world.excepted6.parse()?];
    followed::end_with_their_sandbox(&mesh, hostile, both).await?;

    // No part of the mesh, where it listens on what the operator has excepted.
    assert_ne!(reaches(&other, &world.excepted).await?, "shut");
    let store = store::open(&format!("file://{}", mesh.state().join("store.db").display())).await?;
    let host = HostRecord { endpoint: format!("http://{}:{PORT}", world.excepted), ..HostRecord::default() };
    let joins = record::put(keys::host("elsewhere"), &host);
    store.txn(Txn { compare: Vec::new(), then: vec![joins] }).await?;
    eventually("the agent keeps its guests from it", async || {
        let reached = reach(&other, &world.excepted).await?;
        ensure!(reached == "shut", "{reached}");
        Ok(())
    })
    .await?;
    assert_ne!(reaches(&other, &world.excepted6).await?, "shut", "nothing else");
    mesh.stop()
}

/// Neither pings nor datagrams reach this machine by any of its `addresses`. And no packet of TCP leaves its guest that would end before
/// it is past the host: whoever follows connections on its way sees it, or nobody does.
async fn is_unheard(world: &World, sandbox: &Sandbox, addresses: &[String]) -> anyhow::Result<()> {
    let socket = UdpSocket::bind("[::]:0")?;
    let service = socket.local_addr()?.port();
    let worlds = [&world.public, &world.excepted6];
    let wanted = json!({ "hosts": addresses, "service": service, "worlds": worlds, "port": PORT });
    sandbox.put("probe.py", PROBE).await?.expect(204)?;
    let found: Value = serde_json::from_str(&sandbox.run(&format!("python3 probe.py '{wanted}'")).await?)?;
    assert_eq!(found["echoes"], json!(worlds), "who answers to a ping");
    for address in worlds {
        let outcomes = &found["connections"][address];
        assert_eq!(*outcomes, json!(["silence", "silence", "silence", "open"]), "{address}");
    }
    eventually("datagrams arrive where they may", async || {
        let arrived = world.datagrams().into_iter().filter(|(_, text)| text == b"probe").count();
        ensure!(arrived == worlds.len(), "{arrived}");
        Ok(())
    })
    .await?;
    for own in ["127.0.0.1", "::1"] {
        UdpSocket::bind((own, 0))?.send_to(b"own", (own, service))?;
    }
    socket.set_read_timeout(Some(Duration::from_secs(PATIENT.into())))?;
    let (mut heard, mut buffer) = (Vec::new(), [0; 64]);
    // What a guest has sent comes before its own.
    while heard.iter().filter(|text| *text == "own").count() < 2 {
        let (length, _) = socket.recv_from(&mut buffer).context("it does not hear itself")?;
        heard.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
    }
    assert_eq!(heard, ["own", "own"], "this machine hears itself alone");
    Ok(())
}

/// Packets of guests that were more than their share.
fn policed(mesh: &Mesh) -> anyhow::Result<u64> {
    let names = mesh.network_names();
    let mut all = 0;
    for number in mesh.networks()? {
        let mut nft = Command::new("ip");
        nft.args(["netns", "exec", &names.vm(number), "nft", "list", "chain", "netdev", "oc", "guest"]);
        let rules = succeeded(nft)?;
        let rule = rules.lines().find(|line| line.contains("limit rate over")).context("no limit")?;
        let counted = rule.split("counter packets ").nth(1).context("no counter")?;
        all += counted.split(' ').next().context("no number")?.parse::<u64>()?;
    }
    Ok(all)
}

/// Every address of this machine but those that only lead to itself, and those of other tests' worlds: of the internet once they have
/// ended, which may be amid a scan.
fn addresses_of_host(world: &World) -> anyhow::Result<Vec<String>> {
    let mut command = Command::new("ip");
    command.args(["-o", "address", "show", "scope", "global"]);
    let text = succeeded(command)?;
    let addresses = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next().filter(|link| *link == world.name || !link.starts_with(world::PREFIX))?;
        let address = words.nth(1)?.split('/').next()?;
        address.parse::<IpAddr>().ok().map(|address| address.to_string())
    });
    Ok(addresses.collect())
}

/// Has it serve its files, and waits until it does.
async fn serves(sandbox: &Sandbox, port: u16) -> anyhow::Result<()> {
    let script = format!(
        "python3 -m http.server {port} --bind :: > /dev/null 2>&1 & \
         until bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}' 2> /dev/null; do sleep 0.2; done"
    );
    sandbox.run(&script).await.map(drop)
}

/// Which of the targets take a connection, tried all at once.
async fn scan(sandbox: &Sandbox, targets: &[(String, u16)]) -> anyhow::Result<Vec<String>> {
    let targets: Vec<_> = targets.iter().map(|(address, port)| json!([address, port])).collect();
    let script = format!(
        "import socket, threading\n\
         def attempt(address, port):\n    \
             try:\n        \
                 socket.create_connection((address, port), 5).close()\n        \
                 print(address, port)\n    \
             except OSError: pass\n\
         threads = [threading.Thread(target=attempt, args=one) for one in {}]\n\
         [thread.start() for thread in threads]; [thread.join() for thread in threads]\n",
        Value::Array(targets)
    );
    sandbox.put("scan.py", script).await?.expect(204)?;
    Ok(sandbox.run("python3 scan.py").await?.lines().map(str::to_owned).collect())
}

pub async fn two_meshes_of_one_machine_do_not_meet(_: Arc<Mesh>) -> anyhow::Result<()> {
    let world = World::make()?;
    let meshes = [Mesh::start(&["--pool-size", "0"])?, Mesh::start(&["--pool-size", "0"])?];
    let mut sandboxes = Vec::new();
    for (mesh, port) in meshes.iter().zip([8001, 8002]) {
        let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
        serves(&sandbox, port).await?;
        sandboxes.push(sandbox);
    }
    // Everything that leads to a sandbox of some mesh, from where it does.
    let mut between: BTreeSet<String> = addresses_of_host(&world)?.into_iter().collect();
    for number in 2..40 {
        between.extend([format!("198.19.0.{number}"), format!("198.18.128.{number}")]);
        between.extend([format!("fdb7:1e5c:c00:1::{number:x}"), format!("fdb7:1e5c:c00:2::{number:x}")]);
    }
    for (sandbox, port) in sandboxes.iter().zip([8002, 8001]) {
        assert_eq!(reaches(sandbox, &world.public).await?, world.public_of_host);
        let targets: Vec<_> = between.iter().map(|address| (address.clone(), port)).collect();
        let found = scan(sandbox, &targets).await?;
        assert!(found.is_empty(), "it reaches {found:?}");
    }
    // What one mesh leaves takes nothing of the other.
    let [first, second] = meshes;
    first.stop()?;
    assert_eq!(reaches(&sandboxes[1], &world.public).await?, world.public_of_host);
    let another = second.rest().create(json!({})).await?;
    assert_eq!(reaches(&another, &world.public).await?, world.public_of_host);
    second.stop()
}

pub async fn a_mesh_without_a_network_is_of_use(_: Arc<Mesh>) -> anyhow::Result<()> {
    let mesh = Mesh::start(&["--pool-size", "0", "--network", "off"])?;
    let sandbox = mesh.rest().create(json!({})).await?;
    assert_eq!(sandbox.run("ls /sys/class/net").await?, "lo\n");
    let network = mesh.rest().get(&sandbox.path("/network")).await?.expect(200)?.json();
    assert_eq!(network["isConnected"], false, "{network}");
    // Its ports are reached all the same.
    sandbox.run("(python3 -m http.server 8000 > /dev/null 2>&1 &)").await?;
    let rest = mesh.rest();
    let host = format!("{}-p8000.preview.localhost", sandbox.id);
    eventually("its server", async || {
        let answer = rest.send(rest.anonymous(Method::GET, "/").header("host", &host)).await?;
        ensure!(answer.status == 200, "{}", answer.status);
        Ok(())
    })
    .await?;
    mesh.stop()
}

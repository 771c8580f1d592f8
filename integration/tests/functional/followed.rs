//! The connections of sandboxes where they are followed: in the VM's namespace, in the agent's, and on the host.

use std::{collections::BTreeSet, net::IpAddr, process::Command};

use anyhow::{Context as _, ensure};
use oc_integration::{
    mesh::{Mesh, eventually, succeeded},
    rest::Sandbox,
    world::{PORT, World},
};
use oc_vmm_agent::network::{
    connections::{self, Connection},
    namespace,
    plan::{GUEST, GUEST6, Names, Pair},
};
use serde_json::json;

/// Run as the guest's root: ends connections for its own namespace alone, if that can be done.
const DESYNC: &str = include_str!("network/desync.py");

const TCP: u8 = 6;

/// Where those of a mesh are followed.
struct Tables {
    names: Names,
    of_agent: Pair,
}

impl Tables {
    fn of(mesh: &Mesh) -> anyhow::Result<Self> {
        let names = mesh.network_names();
        let mut link = Command::new("ip");
        link.args(["-o", "-4", "address", "show", "dev", &names.link()]);
        let shown = succeeded(link)?;
        let near = shown.split_whitespace().find_map(|word| word.split_once('/')).context("no address")?.0;
        Ok(Self { names, of_agent: Pair::of_agent_at(near.parse()?).context("another address")? })
    }

    /// How many connections of TCP the VMs of these numbers have to this address of a world, by each of the three.
    async fn count(&self, vms: &BTreeSet<u32>, to: IpAddr) -> anyhow::Result<[usize; 3]> {
        let far = |pair: Pair| if to.is_ipv4() { pair.far.into() } else { IpAddr::from(pair.far6) };
        let own = if to.is_ipv4() { GUEST.into() } else { GUEST6.into() };
        let fits = move |one: &Connection| one.asks.to == (to, PORT).into() && one.asks.protocol == TCP;
        let from = |from: IpAddr| {
            move || Ok(connections::begun_by(from)?.into_iter().filter(|one| fits(one)).count())
        };
        let (mut of_vms, mut of_hub) = (0, 0);
        for &number in vms {
            // One that was given back meanwhile has none.
            of_vms += namespace::enter(self.names.vm(number), from(own)).await.unwrap_or_default();
            of_hub += namespace::enter(self.names.hub(), from(far(Pair::of_vm(number)))).await?;
        }
        let of_host: std::io::Result<usize> = from(far(self.of_agent))();
        Ok([of_vms, of_hub, of_host?])
    }
}

/// Whatever a guest sends, nobody on its way follows a connection that its own namespace, where they are counted, takes for ended.
pub async fn end_for_all(mesh: &Mesh, sandbox: &Sandbox, world: &World) -> anyhow::Result<()> {
    let (tables, vms) = (Tables::of(mesh)?, mesh.networks()?);
    sandbox.put("desync.py", DESYNC).await?.expect(204)?;
    let script = format!(
        "(python3 /home/sandbox/desync.py {} {} {PORT} > /tmp/desync 2> /tmp/desync.log; touch /tmp/desync.ended) > /dev/null 2>&1 & \
         until [ -s /tmp/desync ]; do [ -e /tmp/desync.ended ] && {{ cat /tmp/desync.log >&2; exit 1; }}; sleep 0.5; done",
        world.excepted, world.excepted6
    );
    let ran = sandbox.run_with(json!({ "cmd": script, "user": "root", "timeout": 300 })).await?;
    ensure!(ran.code == 0, "it does not send what it should not: {}", ran.stderr);
    let (four, six) = (world.excepted.parse()?, world.excepted6.parse()?);
    eventually("what has ended is forgotten by all, and what has not by none", async || {
        let counts = [tables.count(&vms, four).await?, tables.count(&vms, six).await?];
        ensure!(counts == [[0; 3], [1; 3]], "VM, agent, host: {counts:?}");
        Ok(())
    })
    .await?;
    sandbox.run_as_root("pkill -f [d]esync.py").await?;
    Ok(())
}

/// A sandbox that has something open to a world, at both of these addresses of it, is deleted, and what it began is followed no more where
/// it passed.
pub async fn end_with_their_sandbox(mesh: &Mesh, sandbox: Sandbox, world: [IpAddr; 2]) -> anyhow::Result<()> {
    let Tables { names, of_agent } = Tables::of(mesh)?;
    let begun_by = |pair: Pair| {
        let mut all = connections::begun_by(pair.far.into())?;
        all.extend(connections::begun_by(pair.far6.into())?);
        std::io::Result::Ok(all)
    };
    for address in world {
        let is_open = |one: &Connection| one.asks.to.ip() == address && one.asks.protocol == TCP;
        assert!(begun_by(of_agent)?.iter().any(is_open), "there is one to {address}");
    }
    let before = mesh.networks()?;
    sandbox.delete().await?;
    eventually("they are forgotten", async || {
        let mut left = begun_by(of_agent)?;
        left.retain(|one| world.contains(&one.asks.to.ip()));
        ensure!(left.is_empty(), "on the host: {left:?}");
        let after = mesh.networks()?;
        let gone: Vec<_> = before.difference(&after).map(|number| Pair::of_vm(*number)).collect();
        ensure!(!gone.is_empty(), "its network is there yet: {after:?}");
        for pair in gone {
            let left = namespace::enter(names.hub(), move || begun_by(pair)).await?;
            ensure!(left.is_empty(), "in the agent's namespace: {left:?}");
        }
        Ok(())
    })
    .await
}

//! The network of one host's VMs: a namespace for each, in which every guest has the same address (docs/decisions/0017).
//!
//! ```text
//!   guest ── tap0 ┌─────────────┐ up ──── v1 ┌──────────┐ up ──── oc7f3a… ┌──────┐
//!                 │ oc-TAG-1    │            │ oc-TAG   │                 │ host │ ── the world
//!   guest ── tap0 │ oc-TAG-2    │ up ──── v2 │ names    │                 │      │
//!                 └─────────────┘            └──────────┘                 └──────┘
//!                  who, where to,             no way from                  no way to
//!                  how much                   one to another               itself
//! ```
//!
//! - [`plan`]: names and addresses; [`rules`]: what may pass, of which [`sets`] change.
//! - [`namespace`], [`links`], [`tap`]: what the kernel does of it.
//! - [`connections`]: what it follows of them, forgotten when a VM goes. [`netfilter`]: how it is told.
//! - [`dns`]: names for guests.
//!
//! Namespaces are made ahead: one is taken when a VMM is launched, and removed when that has ended. Which VM has which is
//! written in its home before its VMM is started; a namespace that no home names is nobody's, and removed at the next start.

pub mod connections;
pub mod dns;
pub mod links;
pub mod namespace;
pub mod netfilter;
pub mod plan;
pub mod rules;
pub mod sets;
pub mod tap;

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use tokio::{runtime, sync::Notify, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use self::{
    connections::Connection,
    links::Links,
    plan::{
        GATEWAY, GATEWAY_MAC, GATEWAY6, GUEST, GUEST_MAC, GUEST6, MAX_AGENTS, MAX_VMS, Names, Pair, TAP, UP,
    },
};

/// Namespaces that wait for a VM.
const SPARE: usize = 4;
/// After a failure to make one.
const RESTS: Duration = Duration::from_secs(5);
/// How many connections the kernel follows at least, in each namespace: as many as 256 VMs may have by default. Each takes about
/// 320 bytes while it is there.
const FOLLOWED: u32 = 1 << 20;
/// Who holds it looks for an address that no agent of this machine has, and takes it.
const LOCK: &str = "/run/lock/opencomputer-network";

/// What VMs may do, and what all may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Addresses that guests reach although they are not of the internet.
    pub allow: Vec<IpNet>,
    /// The host's resolvers: a resolv.conf(5).
    pub resolv_conf: PathBuf,
    /// What each VM may do.
    pub limits: Limits,
}

/// What a VM may do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections that it may have at once.
    pub connections: u32,
    /// What it may send, and receive, each second: millions of bits.
    pub mbit: u32,
}

/// What a VM has made of its network since its VMM was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Connections that are followed now.
    pub connections: u64,
    /// What the guest has sent, bytes.
    pub sent_bytes: u64,
    /// What it has received, bytes.
    pub received_bytes: u64,
}

/// What a VM may reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// The internet.
    #[default]
    Open,
    /// Nothing.
    Nothing,
}

/// A VM's way to its network, as its VMM gets it.
#[derive(Debug)]
pub struct Interface {
    /// Which of the agent's namespaces it is in.
    pub number: u32,
    /// That namespace.
    pub namespace: PathBuf,
    /// The TAP's name there.
    pub tap: &'static str,
    /// The TAP, open.
    pub fd: OwnedFd,
    /// The guest's MAC.
    pub mac: [u8; 6],
}

/// The network of one agent's VMs.
#[derive(Debug)]
pub struct Network {
    names: Names,
    settings: Settings,
    hub: Links,
    state: Mutex<State>,
    wanted: Notify,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    /// Numbers that are taken: by those that wait, too.
    taken: BTreeSet<u32>,
    ready: Vec<Interface>,
    /// Of those that are taken: could not be made, nor removed.
    unmade: BTreeSet<u32>,
}

impl Network {
    /// Makes the network of the agent called `names`, or takes over what is there of it; `used` are the numbers of the
    /// namespaces that VMs have.
    ///
    /// # Errors
    ///
    /// If this host does not permit.
    pub async fn open(names: Names, settings: Settings, used: BTreeSet<u32>) -> io::Result<Arc<Self>> {
        sweep(&names, &used).await?;
        let runtime = runtime::Handle::current();
        let is_there = namespace::exists(&names.hub()) && !used.is_empty();
        if !is_there {
            remove_all(&names).await?;
            namespace::create(names.hub(), forward).await?;
        }
        let rules = rules::of_hub(&settings);
        namespace::enter(names.hub(), move || filter(&rules)).await?;
        let of_runtime = runtime.clone();
        let hub = namespace::enter(names.hub(), move || Links::open(&of_runtime)).await?;
        let pair = link_to_host(&names, &hub, &runtime).await?;
        forward_on_host()?;
        rules::load(&rules::of_host(&names, &pair))?;
        follow_on_host()?;
        // As whenever a VM goes: better that it fails here.
        on_host(move || begun_by(&pair)).await.map_err(|error| {
            let remedy = "the kernel needs nf_conntrack_netlink";
            io::Error::new(error.kind(), format!("cannot look connections up: {error}; {remedy}"))
        })?;
        let sockets = namespace::enter(names.hub(), dns::bind).await?;
        let network = Arc::new(Self {
            names,
            settings,
            hub,
            state: Mutex::new(State { taken: used, ..State::default() }),
            wanted: Notify::new(),
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let (cancel, resolv_conf) = (network.cancel.clone(), network.settings.resolv_conf.clone());
        network.tasks.spawn(async move {
            tokio::select! {
                served = dns::serve(sockets, resolv_conf) => {
                    if let Err(error) = served {
                        warn!(%error, "guests cannot look names up");
                    }
                }
                () = cancel.cancelled() => {}
            }
        });
        network.tasks.spawn(network.clone().fill());
        Ok(network)
    }

    /// Removes what waits, and stops. What VMs have stays.
    pub async fn close(&self) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let ready = std::mem::take(&mut self.state.lock().ready);
        for interface in ready {
            if let Err(error) = self.release(interface.number).await {
                warn!(%error, "cannot remove a namespace; the next start will");
            }
        }
    }

    /// Takes a namespace for a VM, which may reach the internet from there, and which `note` writes down with its number.
    ///
    /// # Errors
    ///
    /// If none can be made, or it cannot be written down.
    pub async fn take(self: &Arc<Self>, note: impl FnOnce(u32) -> io::Result<()>) -> io::Result<Interface> {
        let interface = loop {
            let ready = self.state.lock().ready.pop();
            self.wanted.notify_one();
            match ready {
                Some(ready) => break ready,
                None => {
                    // Of its own, so that it is not dropped half-way.
                    let this = self.clone();
                    self.tasks.spawn(async move { this.make().await }).await.map_err(io::Error::other)??;
                }
            }
        };
        // Not one await since it was taken: it is in the home, or waits for another.
        match note(interface.number) {
            Ok(()) => Ok(interface),
            Err(error) => {
                self.state.lock().ready.push(interface);
                Err(error)
            }
        }
    }

    /// Removes the namespace of that number, whose VMM has ended.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub async fn release(&self, number: u32) -> io::Result<()> {
        remove_vm(&self.names, &self.hub, number).await?;
        self.state.lock().taken.remove(&number);
        Ok(())
    }

    /// Has no VM reach these, where parts of the mesh listen, nor any that it, or an agent before, was told.
    ///
    /// # Errors
    ///
    /// If the host's filter does not take it: then it is as it was.
    pub async fn seclude(&self, parts: &BTreeSet<SocketAddr>) -> io::Result<()> {
        let rules = rules::parts(&self.names, parts);
        on_host(move || rules::load(&rules)).await
    }

    /// Sets what the VM in the namespace of that number may reach.
    ///
    /// # Errors
    ///
    /// If it does not take it.
    pub async fn restrict(&self, number: u32, egress: Egress) -> io::Result<()> {
        namespace::enter(self.names.vm(number), move || rules::restrict(egress)).await
    }

    /// What the VMs may do that get their network from now on.
    pub fn limits(&self) -> Limits {
        self.settings.limits
    }

    /// What the VM in the namespace of that number has made of it.
    ///
    /// # Errors
    ///
    /// If it is not there.
    pub async fn usage(&self, number: u32) -> io::Result<Usage> {
        namespace::enter(self.names.vm(number), usage).await
    }

    /// Keeps some waiting.
    async fn fill(self: Arc<Self>) {
        while !self.cancel.is_cancelled() {
            if self.state.lock().ready.len() >= SPARE {
                tokio::select! {
                    () = self.wanted.notified() => {}
                    () = self.cancel.cancelled() => {}
                }
            } else if let Err(error) = self.make().await {
                warn!(%error, "cannot make a network for a VM ahead of its use");
                tokio::select! {
                    () = sleep(RESTS) => {}
                    () = self.cancel.cancelled() => {}
                }
            }
        }
    }

    /// Makes one more that waits. Not to be dropped half-way.
    async fn make(&self) -> io::Result<()> {
        let unmade = std::mem::take(&mut self.state.lock().unmade);
        for number in unmade {
            self.unmake(number).await;
        }
        let number = {
            let mut state = self.state.lock();
            let free = (1..MAX_VMS).find(|number| !state.taken.contains(number));
            let number = free.ok_or_else(|| io::Error::other("this agent has as many networks as it can"))?;
            state.taken.insert(number);
            number
        };
        match self.make_numbered(number).await {
            Ok(interface) => {
                self.state.lock().ready.push(interface);
                Ok(())
            }
            Err(error) => {
                self.unmake(number).await;
                Err(error)
            }
        }
    }

    /// Removes what could not be made. What resists, the next one that is made removes.
    async fn unmake(&self, number: u32) {
        if let Err(error) = self.release(number).await {
            warn!(%error, number, "cannot remove what could not be made of a network");
            self.state.lock().unmade.insert(number);
        }
    }

    async fn make_numbered(&self, number: u32) -> io::Result<Interface> {
        let (name, hub) = (self.names.vm(number), self.names.hub());
        let namespace = Names::file(&name);
        let rules = rules::of_vm(&self.settings);
        let fd = namespace::create(name, move || make_vm(number, &hub, &rules)).await?;
        let pair = Pair::of_vm(number);
        let near = [(pair.near.into(), 31), (pair.near6.into(), 127)];
        self.hub.set_up(&Names::leg(number), None, &near).await?;
        Ok(Interface { number, namespace, tap: TAP, fd, mac: GUEST_MAC })
    }
}

/// Which of the agent's namespaces a VM had, is removed with no agent running.
///
/// # Errors
///
/// If it resists.
pub async fn remove(names: &Names, number: u32) -> io::Result<()> {
    match links_of_hub(names).await? {
        Some(hub) => remove_vm(names, &hub, number).await,
        None => namespace::remove(&names.vm(number)),
    }
}

/// The links of the agent's namespace, if there is one.
async fn links_of_hub(names: &Names) -> io::Result<Option<Links>> {
    if !namespace::exists(&names.hub()) {
        return Ok(None);
    }
    let runtime = runtime::Handle::current();
    namespace::enter(names.hub(), move || Links::open(&runtime)).await.map(Some)
}

/// Removes what the VM of that number had, and what is known of its connections.
async fn remove_vm(names: &Names, hub: &Links, number: u32) -> io::Result<()> {
    // The link first, so that nothing more comes; the namespace last, by which the next start finds what there is to do.
    hub.remove(&Names::leg(number)).await?;
    forget_connections(names, number).await?;
    namespace::remove(&names.vm(number))
}

/// Has the host and the agent's namespace forget the connections of the VM of that number.
async fn forget_connections(names: &Names, number: u32) -> io::Result<()> {
    let pair = Pair::of_vm(number);
    let begun = namespace::enter(names.hub(), move || begun_by(&pair)).await?;
    if begun.is_empty() {
        return Ok(());
    }
    // Those of the host first: what they are called there, only the agent's namespace knows.
    let beyond: Vec<_> = begun.iter().map(Connection::beyond).collect();
    on_host(move || connections::forget(&beyond)).await?;
    let own: Vec<_> = begun.iter().map(|connection| connection.asks).collect();
    namespace::enter(names.hub(), move || connections::forget(&own)).await
}

/// The connections of this thread's namespace that came in by the link between these.
fn begun_by(pair: &Pair) -> io::Result<Vec<Connection>> {
    Ok([connections::begun_by(pair.far.into())?, connections::begun_by(pair.far6.into())?].concat())
}

/// Does `work` on a thread that may wait for the kernel, in the host's namespace.
async fn on_host<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Removes all that agents called `names` have made.
///
/// # Errors
///
/// If something resists.
pub async fn remove_all(names: &Names) -> io::Result<()> {
    sweep(names, &BTreeSet::new()).await?;
    let links = Links::open(&runtime::Handle::current())?;
    let near = links.addresses_of(&names.link()).await?;
    let was_there = near.is_some() || namespace::exists(&names.hub());
    // No VM has a link any more by which anything came. The host's goes last: by it is known whose connections these are.
    for pair in near.into_iter().flatten().filter_map(Pair::of_agent_at) {
        let forget = move || {
            let left: Vec<_> = begun_by(&pair)?.iter().map(|connection| connection.asks).collect();
            connections::forget(&left)
        };
        on_host(forget).await?;
    }
    links.remove(&names.link()).await?;
    namespace::remove(&names.hub())?;
    match rules::load(&rules::without_host(names)) {
        // A host that lacks what it takes to have one has none.
        Err(error) if was_there => Err(error),
        _ => Ok(()),
    }
}

/// Removes every namespace of a VM whose number is none of those that are `used`.
///
/// # Errors
///
/// If one resists.
pub async fn sweep(names: &Names, used: &BTreeSet<u32>) -> io::Result<()> {
    let unused = |name: &String| names.number(name).filter(|number| !used.contains(number));
    for number in namespace::all()?.iter().filter_map(unused) {
        remove(names, number).await?;
    }
    if let Some(hub) = links_of_hub(names).await? {
        for link in hub.names().await? {
            let number = link.strip_prefix('v').and_then(|number| number.parse().ok());
            if number.is_some_and(|number| !used.contains(&number)) {
                hub.remove(&link).await?;
            }
        }
    }
    Ok(())
}

/// Whether the namespace of that number is there.
pub fn has(names: &Names, number: u32) -> bool {
    namespace::exists(&names.vm(number))
}

/// Links the agent's namespace to the host, unless it is.
async fn link_to_host(names: &Names, hub: &Links, runtime: &runtime::Handle) -> io::Result<Pair> {
    let host = Links::open(runtime)?;
    // Another agent may be at the same.
    fs::create_dir_all(Path::new(LOCK).parent().unwrap_or_else(|| Path::new("/")))?;
    let lock = fs::OpenOptions::new().create(true).truncate(false).write(true).open(LOCK)?;
    let _lock = tokio::task::spawn_blocking(move || {
        Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))
    })
    .await
    .map_err(io::Error::other)??;
    let known: BTreeSet<IpAddr> = host.addresses().await?.into_iter().collect();
    let own: BTreeSet<IpAddr> = hub.addresses().await?.into_iter().collect();
    let pairs = || (0..MAX_AGENTS).map(Pair::of_agent);
    if let Some(pair) =
        pairs().find(|pair| own.contains(&pair.far.into()) && known.contains(&pair.near.into()))
    {
        host.widen(&names.link()).await?;
        hub.widen(UP).await?;
        return Ok(pair);
    }
    let is_free = |pair: &Pair| !known.contains(&pair.near.into()) && !known.contains(&pair.near6.into());
    let pair = pairs().skip(1).find(is_free);
    let pair = pair.ok_or_else(|| io::Error::other("this machine has as many agents as it can"))?;
    host.remove(&names.link()).await?;
    host.add_pair(&names.link(), UP, &names.hub()).await?;
    let near = [(pair.near.into(), 31), (pair.near6.into(), 127)];
    host.set_up(&names.link(), None, &near).await?;
    hub.set_up("lo", None, &[(plan::DNS.into(), 32)]).await?;
    hub.set_up(UP, None, &[(pair.far.into(), 31), (pair.far6.into(), 127)]).await?;
    hub.route_by(UP, pair.near.into()).await?;
    hub.route_by(UP, pair.near6.into()).await?;
    info!(link = names.link(), address = %pair.near, "linked to the network of the VMs");
    Ok(pair)
}

/// Readies the namespace of this thread for the VM of that number; the TAP of its guest.
fn make_vm(number: u32, hub: &str, rules: &str) -> io::Result<OwnedFd> {
    forward()?;
    // As much as one of our connections to the guest holds of what is not read, bytes (tcp(7)): least, at first, and at most.
    set("ipv4/tcp_rmem", "4096 131072 1048576")?;
    set("ipv4/tcp_wmem", "4096 65536 1048576")?;
    let fd = tap::open(TAP)?;
    filter(rules)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let links = Links::open(&runtime::Handle::current())?;
        let pair = Pair::of_vm(number);
        links.add_pair(UP, &Names::leg(number), hub).await?;
        links.set_up("lo", None, &[]).await?;
        links.set_up(UP, None, &[(pair.far.into(), 31), (pair.far6.into(), 127)]).await?;
        links.set_up(TAP, Some(GATEWAY_MAC), &[(GATEWAY.into(), 30), (GATEWAY6.into(), 64)]).await?;
        links.pin(TAP, GUEST.into(), GUEST_MAC).await?;
        links.pin(TAP, GUEST6.into(), GUEST_MAC).await?;
        links.route_by(UP, pair.near.into()).await?;
        links.route_by(UP, pair.near6.into()).await
    })?;
    Ok(fd)
}

/// Of this thread's namespace.
fn usage() -> io::Result<Usage> {
    let connections = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?;
    let devices = fs::read_to_string("/proc/thread-self/net/dev")?;
    let (sent_bytes, received_bytes) = traffic(&devices).unwrap_or_default();
    Ok(Usage { connections: connections.trim().parse().unwrap_or_default(), sent_bytes, received_bytes })
}

/// What the guest has sent and received, by the host's count of its link: after the name what was received, its bytes first,
/// and eight columns on what was sent (proc_pid_net(5)). What the host received the guest has sent.
fn traffic(devices: &str) -> Option<(u64, u64)> {
    let line = devices.lines().find_map(|line| line.trim_start().strip_prefix(TAP)?.strip_prefix(':'))?;
    let mut columns = line.split_whitespace().map(|number| number.parse().ok());
    Some((columns.next()??, columns.nth(7)??))
}

/// Has this thread's namespace pass packets on, and believe no routes that anybody tells.
fn forward() -> io::Result<()> {
    set("ipv4/ip_forward", "1")?;
    for kind in ["all", "default"] {
        set(&format!("ipv4/conf/{kind}/accept_redirects"), "0")?;
        set(&format!("ipv4/conf/{kind}/send_redirects"), "0")?;
        set(&format!("ipv6/conf/{kind}/accept_ra"), "0")?;
        set(&format!("ipv6/conf/{kind}/accept_redirects"), "0")?;
    }
    set("ipv6/conf/all/forwarding", "1")
}

/// Loads the rules of this thread's namespace, which follows connections by them, and sets how long.
fn filter(rules: &str) -> io::Result<()> {
    rules::load(rules)?;
    set("netfilter/nf_conntrack_tcp_timeout_established", &rules::SILENT_FOR.to_string())?;
    set("netfilter/nf_conntrack_tcp_timeout_time_wait", &rules::ENDED_FOR.to_string())
}

/// Has the kernel follow no fewer connections than VMs may have.
fn follow_on_host() -> io::Result<()> {
    const MAX: &str = "netfilter/nf_conntrack_max";
    let known = fs::read_to_string(Path::new("/proc/sys/net").join(MAX))?;
    if known.trim().parse().is_ok_and(|max: u32| max < FOLLOWED) {
        // In a container with a network of its own nobody may.
        if let Err(error) = set(MAX, &FOLLOWED.to_string()) {
            warn!(%error, known = known.trim(), wanted = FOLLOWED, "the host follows fewer connections than its sandboxes may have");
        }
    }
    Ok(())
}

/// Has the host pass packets on, as it must; it goes on to learn its own routes as before.
fn forward_on_host() -> io::Result<()> {
    let is_on =
        |path: &str| fs::read_to_string(Path::new("/proc/sys/net").join(path)).map(|on| on.trim() == "1");
    if !is_on("ipv4/ip_forward")? {
        set("ipv4/ip_forward", "1")?;
    }
    if is_on("ipv6/conf/all/forwarding")? {
        return Ok(());
    }
    // One that forwards listens to routers only if it is told to in so many words (ip-sysctl, `accept_ra`).
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let accepts = format!("ipv6/conf/{name}/accept_ra");
        if is_on(&accepts).unwrap_or_default() {
            set(&accepts, "2")?;
        }
    }
    set("ipv6/conf/all/forwarding", "1")
}

/// Sets a value of this thread's namespace, unless it is so already.
fn set(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    fs::write(&path, value)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot set {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_received_the_guest_has_sent() {
        let devices = "Inter-|   Receive  |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes\n    \
                       lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0 0\n  \
                       tap0: 1234 5 0 0 0 0 0 0 567 8 0 0 0 0 0 0\n";
        assert_eq!(traffic(devices), Some((1234, 567)));
        assert_eq!(traffic(""), None);
    }
}

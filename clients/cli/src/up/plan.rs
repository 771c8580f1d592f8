//! What `oc up` is going to run, checked as a whole before anything is started.

use std::{
    env,
    ffi::OsString,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::ValueEnum as _;

use crate::{
    arguments::{Network, UpArguments},
    failure::Failure,
};

use super::{key::ApiKey, layout::Layout};

/// Name of the scheduler, of its log, its socket, its journal.
pub const SCHEDULER: &str = "scheduler";
/// The same of the vmm-agent.
pub const AGENT: &str = "vmm-agent";
/// The same of the gateway.
pub const GATEWAY: &str = "gateway";
/// In the order in which they are stopped: first whoever calls, then who is called.
pub const STOP_ORDER: [&str; 3] = [GATEWAY, SCHEDULER, AGENT];

/// For a service to drain and end after SIGTERM. Longer than any of them takes by itself: a scheduler gives its calls
/// 10 s, what they began another 10 s, and its ledger 5 s.
pub const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// Where `make setup` puts templates: microVMs run as users of their own, who could not reach a home directory.
const IMAGE_DIR: &str = "/var/cache/opencomputer/images";

/// The gateway's own default.
const PREVIEW_DOMAIN: &str = "preview.localhost";

/// What to run.
#[derive(Debug)]
pub struct Plan {
    /// The state directory.
    pub layout: Layout,
    /// Where the binaries are.
    pub bin_dir: PathBuf,
    /// Name of this machine in the mesh.
    pub host_id: String,
    /// Address of the gateway; its port may still be 0.
    pub listen: SocketAddr,
    /// Size of the pool, if it was said.
    pool_size: Option<u32>,
    /// When a mesh that is not ready counts as failed.
    pub ready_timeout: Duration,
    /// The state directory's own store, rather than one elsewhere.
    pub own_store: bool,
    store: String,
    image_dir: PathBuf,
    has_network: bool,
    network_allow: String,
    guest_binary: PathBuf,
    max_sandboxes: Option<u32>,
    paused_for: Option<u32>,
    data_image_mb: Option<u32>,
    no_snapshots: bool,
    object_store: String,
    /// Whether that may outlive this machine.
    is_object_store_elsewhere: bool,
    public_url: Option<String>,
    preview_domain: Option<String>,
    own_names: String,
    tls_dir: Option<PathBuf>,
    /// How the gateway speaks TLS.
    pub tls: Tls,
    accelerator: String,
}

/// How the gateway speaks TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// Not at all.
    None,
    /// With certificates that are made here.
    Made,
    /// With these.
    Files {
        /// The chain.
        certificate: PathBuf,
        /// Its key.
        key: PathBuf,
    },
}

/// One service.
#[derive(Debug)]
pub struct Service {
    /// Its name.
    pub name: &'static str,
    /// Its command line.
    pub command: Vec<OsString>,
    /// Only the owner may use the files it makes.
    pub private: bool,
}

impl Plan {
    /// Checks what was asked for.
    pub fn new(state_dir: &Path, arguments: &UpArguments) -> Result<Self, Failure> {
        let layout = Layout::new(state_dir)?;
        let bin_dir = match &arguments.bin_dir {
            Some(directory) => absolute(directory)?,
            None => beside_oc()?,
        };
        for name in [SCHEDULER, AGENT, GATEWAY] {
            let program = program(&bin_dir, name);
            if !program.is_file() {
                return Err(Failure::Unfit(format!(
                    "there is no {}: name its directory with --bin-dir",
                    program.display()
                )));
            }
        }
        let image_dir = match &arguments.image_dir {
            Some(directory) => absolute(directory)?,
            None => IMAGE_DIR.into(),
        };
        if !image_dir.join("base/manifest.json").is_file() {
            return Err(Failure::Unfit(format!(
                "there is no template in {}: build it with `make setup`, or name its directory with --image-dir",
                image_dir.display()
            )));
        }
        let store = match &arguments.store {
            Some(url) => checked_store(url)?,
            None => format!("file://{}", text(&layout.store())?),
        };
        let object_store = match &arguments.object_store {
            Some(url) => checked_object_store(url)?,
            None => format!("file://{}", text(&layout.objects())?),
        };
        let on_etcd = store.starts_with("etcd://");
        Ok(Self {
            guest_binary: guest_binary(&bin_dir, arguments.guest_binary.as_deref())?,
            host_id: host_id(arguments.host_id.as_deref(), on_etcd)?,
            listen: arguments.listen,
            pool_size: arguments.pool_size,
            ready_timeout: Duration::from_secs(arguments.ready_timeout),
            own_store: arguments.store.is_none(),
            store,
            image_dir,
            max_sandboxes: arguments.max_sandboxes,
            paused_for: arguments.paused_for,
            data_image_mb: arguments.data_image_mb,
            no_snapshots: arguments.no_snapshots,
            has_network: arguments.network == Network::On,
            network_allow: arguments.network_allow.join(","),
            object_store,
            is_object_store_elsewhere: arguments.object_store.is_some(),
            public_url: arguments.public_url.clone(),
            preview_domain: arguments.preview_domain.clone(),
            own_names: arguments.own_names.join(","),
            tls_dir: arguments.tls_dir.as_deref().map(absolute).transpose()?,
            tls: match (&arguments.tls_cert, &arguments.tls_key) {
                (Some(certificate), Some(key)) => {
                    Tls::Files { certificate: absolute(certificate)?, key: absolute(key)? }
                }
                _ if arguments.tls => Tls::Made,
                _ => Tls::None,
            },
            accelerator: arguments
                .accelerator
                .to_possible_value()
                .map_or_else(|| "auto".to_owned(), |value| value.get_name().to_owned()),
            layout,
            bin_dir,
        })
    }

    /// Makes sure of the certificates that are made here, for a gateway that listens there.
    pub fn ensure_certificates(&self, listen: SocketAddr) -> Result<(), Failure> {
        match self.tls {
            Tls::Made => {
                let domain = self.preview_domain.as_deref().unwrap_or(PREVIEW_DOMAIN);
                self.layout.certificates().ensure(listen, domain)
            }
            Tls::None | Tls::Files { .. } => Ok(()),
        }
    }

    /// URL under which its gateway is reached from this machine.
    pub fn local_url(&self, listen: SocketAddr) -> String {
        let url = local_url(listen);
        match (&self.tls, &self.public_url) {
            (Tls::None, _) => url,
            // Its certificate is for that name alone, most likely.
            (Tls::Files { .. }, Some(public)) => public.clone(),
            (Tls::Files { .. } | Tls::Made, _) => url.replacen("http://", "https://", 1),
        }
    }

    /// Whether sandboxes are kept ready.
    pub fn fills_pool(&self) -> bool {
        self.pool_size != Some(0) && !self.no_snapshots
    }

    /// Settles on a port, and sees that it is free.
    pub fn free_address(&self) -> Result<SocketAddr, Failure> {
        TcpListener::bind(self.listen).and_then(|listener| listener.local_addr()).map_err(|error| {
            let hint =
                if error.kind() == io::ErrorKind::AddrInUse { " (choose another --listen)" } else { "" };
            Failure::local(format!("cannot listen on {}{hint}", self.listen), error)
        })
    }

    /// The services, in the order in which they are started.
    pub fn services(&self, listen: SocketAddr, key: &ApiKey) -> [Service; 3] {
        let mut scheduler = Command::new(self, SCHEDULER);
        scheduler.option("--store", &self.store);
        scheduler.option("--listen", self.endpoint(SCHEDULER));
        scheduler.option("--bootstrap-key-hash", key.hash());
        scheduler.listed("--own-names", &self.own_names);

        let mut agent = Command::new(self, AGENT);
        agent.option("--store", &self.store);
        agent.option("--listen", self.endpoint(AGENT));
        agent.option("--host-id", &self.host_id);
        agent.option("--data-dir", self.layout.agent());
        agent.option("--image-dir", &self.image_dir);
        agent.option("--guest-binary", &self.guest_binary);
        agent.option("--accelerator", &self.accelerator);
        agent.option("--object-store", &self.object_store);
        if self.is_object_store_elsewhere {
            agent.words.push("--upload-hibernated".into());
        }
        agent.number("--pool-size", self.pool_size);
        agent.number("--max-sandboxes", self.max_sandboxes);
        agent.number("--paused-for", self.paused_for);
        agent.number("--data-image-mb", self.data_image_mb);
        if !self.has_network {
            agent.option("--network", "off");
        }
        agent.listed("--network-allow", &self.network_allow);
        if self.no_snapshots {
            agent.words.push("--no-snapshots".into());
        }

        let mut gateway = Command::new(self, GATEWAY);
        gateway.option("--store", &self.store);
        gateway.option("--listen", listen.to_string());
        if let Some(url) = &self.public_url {
            gateway.option("--public-url", url);
        }
        if let Some(domain) = &self.preview_domain {
            gateway.option("--preview-domain", domain);
        }
        gateway.listed("--own-names", &self.own_names);
        let made = self.layout.certificates();
        let pair = match &self.tls {
            Tls::None => None,
            Tls::Made => Some((&made.certificate, &made.key)),
            Tls::Files { certificate, key } => Some((certificate, key)),
        };
        if let Some((certificate, key)) = pair {
            gateway.option("--tls-cert", certificate);
            gateway.option("--tls-key", key);
            if let Some(directory) = &self.tls_dir {
                gateway.option("--tls-dir", directory);
            }
        }
        [scheduler.service(true), agent.service(false), gateway.service(true)]
    }

    fn endpoint(&self, service: &str) -> OsString {
        let mut endpoint = OsString::from("unix://");
        endpoint.push(self.layout.socket(service));
        endpoint
    }
}

/// A service's command line in the making.
struct Command {
    name: &'static str,
    words: Vec<OsString>,
}

impl Command {
    fn new(plan: &Plan, name: &'static str) -> Self {
        Self { name, words: vec![program(&plan.bin_dir, name).into()] }
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.words.extend([name.into(), value.into()]);
    }

    fn number(&mut self, name: &str, value: Option<u32>) {
        if let Some(value) = value {
            self.option(name, value.to_string());
        }
    }

    fn listed(&mut self, name: &str, values: &str) {
        if !values.is_empty() {
            self.option(name, values);
        }
    }

    fn service(self, private: bool) -> Service {
        Service { name: self.name, command: self.words, private }
    }
}

/// The binary of a service.
pub fn program(bin_dir: &Path, service: &str) -> PathBuf {
    bin_dir.join(format!("oc-{service}"))
}

/// URL under which a gateway that listens there is reached from this machine.
pub fn local_url(listen: SocketAddr) -> String {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, listen.port()))
}

/// The directory that this binary is in.
pub fn beside_oc() -> Result<PathBuf, Failure> {
    let failed = |error| Failure::local("cannot find the directory of oc", error);
    let oc = env::current_exe().map_err(failed)?;
    oc.parent().map(Path::to_owned).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
}

/// `oc-init` is `oc-guest`, linked statically.
fn guest_binary(bin_dir: &Path, named: Option<&Path>) -> Result<PathBuf, Failure> {
    let candidates = match named {
        Some(path) => vec![absolute(path)?],
        None => vec![bin_dir.join("oc-init"), bin_dir.join("oc-guest")],
    };
    let wanted = candidates.last().map(|path| path.display().to_string()).unwrap_or_default();
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        Failure::Unfit(format!("there is no {wanted}: name the guest's binary with --guest-binary"))
    })
}

/// A store of one machine needs no telling names; in a bigger mesh the host's own name tells it from others.
fn host_id(named: Option<&str>, shared: bool) -> Result<String, Failure> {
    let name = match named {
        Some(name) => name.to_owned(),
        None if shared => nix::unistd::gethostname()
            .map_err(|errno| Failure::local("cannot read the host name", io::Error::from(errno)))?
            .to_string_lossy()
            .to_ascii_lowercase(),
        None => "local".to_owned(),
    };
    let fits = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
    if !fits {
        let message =
            format!("{name:?} cannot name this machine: give --host-id, 1 to 63 characters of [a-z0-9.-]");
        return Err(Failure::Usage(message));
    }
    Ok(name)
}

fn checked_store(url: &str) -> Result<String, Failure> {
    match url.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => Ok(url.to_owned()),
        Some(("etcd", hosts)) if !hosts.is_empty() => Ok(url.to_owned()),
        _ => Err(Failure::Usage(format!(
            "{url:?} is no store: give file:///PATH or etcd://HOST:PORT[,HOST:PORT]"
        ))),
    }
}

/// The agent says the rest; here so that what is wrong is said at once.
fn checked_object_store(url: &str) -> Result<String, Failure> {
    match url.split_once("://") {
        None if url == "none" => Ok(url.to_owned()),
        Some(("file", path)) if path.starts_with('/') => Ok(url.to_owned()),
        // Command lines are for all to see: nothing secret is passed in one.
        Some(("s3", bucket)) if !bucket.is_empty() && !bucket.contains('@') => Ok(url.to_owned()),
        _ => Err(Failure::Usage(
            "--object-store: give file:///PATH, s3://BUCKET[/PREFIX] without credentials, or none".to_owned(),
        )),
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    fs::canonicalize(path).map_err(|error| Failure::local(format!("cannot find {}", path.display()), error))
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str()
        .ok_or_else(|| Failure::Usage(format!("{} is not UTF-8: choose another path", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_on_all_addresses_is_reached_on_the_loopback() {
        for (listen, url) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("0.0.0.0:80", "http://127.0.0.1:80"),
            ("[::]:80", "http://[::1]:80"),
            ("10.0.0.1:80", "http://10.0.0.1:80"),
        ] {
            assert_eq!(local_url(listen.parse().unwrap()), url);
        }
    }

    #[test]
    fn stores_and_host_names_are_checked() {
        assert!(checked_store("file:///x/store.db").is_ok());
        assert!(checked_store("etcd://a:1,b:2").is_ok());
        for url in ["file://x", "x", "etcd://", "redis://a"] {
            assert!(checked_store(url).is_err(), "{url}");
        }
        for url in ["none", "file:///x", "s3://bucket/prefix"] {
            assert!(checked_object_store(url).is_ok(), "{url}");
        }
        for url in ["", "file://x", "s3://", "s3://key:secret@bucket", "ftp://x"] {
            let refusal = checked_object_store(url).unwrap_err().to_string();
            assert!(!refusal.contains("secret"), "{refusal}");
        }
        assert_eq!(host_id(None, false).unwrap(), "local");
        assert!(host_id(Some("a/b"), true).is_err());
        assert!(host_id(Some(""), true).is_err());
    }
}

//! What the agent is told at its start. Parsed by clap, then checked as a whole, then plain data.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Parser, ValueEnum};
use ipnet::IpNet;
use oc_mesh::endpoint::Endpoint;

use crate::{
    capacity::{self, Limits},
    driver::{firecracker, objects},
    microvm::Kind,
    network, pool,
    vm::tier::Policy,
};

/// Memory that a waiting clone and what a sandbox soon makes of it take together, MiB: what the pool's size is
/// made for where none is given.
const CLONE_BUDGET_MB: u64 = 256;
/// A waiting clone of a 1024 MiB guest takes 26 to 36 MiB (measured); this leaves room for the warm-up.
const WAITING_CLONE_MB: u64 = 64;
/// The pool is no larger than this unless told.
const DEFAULT_POOL: u64 = 24;
/// As long as a sandbox may be idle at most: 31 days.
const MAX_PAUSED_FOR_SECONDS: u64 = 31 * 24 * 3600;
/// Room for a golden snapshot and a sandbox or two, MiB.
const LEAST_IMAGE_MB: u32 = 1024;
/// What most sandboxes are: the size a create gets that names none.
const DEFAULT_KIND: (&str, u32, u32) = ("base", 1, 1024);

/// The microVMs of one host.
#[derive(Clone, Debug, Parser)]
#[command(name = "oc-vmm-agent", version, about)]
pub struct Args {
    /// Record store: `file:///path/store.db` or `etcd://host:port`.
    #[arg(long, env = "OC_STORE", required_unless_present = "cleanup")]
    pub store: Option<String>,
    /// Where to serve: `unix:///path` or `tcp://ip:port`.
    #[arg(long, env = "OC_AGENT_LISTEN", required_unless_present = "cleanup")]
    pub listen: Option<Endpoint>,
    /// Name of this host, unique in the mesh.
    #[arg(long, env = "OC_HOST_ID")]
    pub host_id: String,
    /// Where everything that the agent makes lies.
    #[arg(long, env = "OC_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Size of an XFS of its own, in a file beside it, that the data directory is put on, MiB: copies of disks and memory share
    /// their blocks there. Without, it lies on the host's filesystem.
    #[arg(long, env = "OC_DATA_IMAGE_MB")]
    pub data_image_mb: Option<u32>,
    /// Where the templates lie.
    #[arg(long, env = "OC_IMAGE_DIR", default_value = "/var/cache/opencomputer/images")]
    pub image_dir: PathBuf,
    /// The guest's PID 1; `oc-init` beside this program where absent.
    #[arg(long, env = "OC_GUEST_BINARY")]
    pub guest_binary: Option<PathBuf>,
    /// Clones of the default kind that wait in the pool; by the host's memory where absent.
    #[arg(long, env = "OC_POOL_SIZE")]
    pub pool_size: Option<usize>,
    /// Further kinds that wait in the pool: `TEMPLATE:CPUS:MEMORY_MIB=COUNT`.
    #[arg(long = "pool", env = "OC_POOL", value_delimiter = ',', value_name = "KIND=COUNT")]
    pub pools: Vec<PoolSpec>,
    /// Sandboxes at most; by the host's memory where absent.
    #[arg(long, env = "OC_MAX_SANDBOXES")]
    pub max_sandboxes: Option<u32>,
    /// Memory that must stay available on the host, MiB.
    #[arg(long, env = "OC_MEMORY_RESERVE_MB", default_value_t = 768)]
    pub memory_reserve_mb: u64,
    /// Disk space that must stay free, MiB.
    #[arg(long, env = "OC_DISK_RESERVE_MB", default_value_t = 2048)]
    pub disk_reserve_mb: u64,
    /// How many times the host's memory may be promised to guests: clones share what they do not change.
    #[arg(long, env = "OC_MEMORY_OVERCOMMIT", default_value_t = 8)]
    pub memory_overcommit: u32,
    /// Seconds that a hibernated sandbox's process stays, paused, so that it wakes at once; 0 ends it before the
    /// hibernation is answered. Whenever memory is short it is ended early.
    #[arg(long, env = "OC_PAUSED_FOR", default_value_t = 120, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(..=MAX_PAUSED_FOR_SECONDS))]
    pub paused_for: u64,
    /// What runs the VMs.
    #[arg(long, env = "OC_VMM", value_enum, default_value_t = VmmChoice::Auto)]
    pub vmm: VmmChoice,
    /// Firecracker, of a release from 1.12.1 on and before 1.16: a path, or a name that is looked for as programs are.
    #[arg(long, env = "OC_FIRECRACKER", default_value = "firecracker", value_name = "PATH")]
    pub firecracker: PathBuf,
    /// The jailer of the same release.
    #[arg(long, env = "OC_JAILER", default_value = "jailer", value_name = "PATH")]
    pub jailer: PathBuf,
    /// One of Firecracker's CPU templates, such as `T2CL`, which makes hosts with different CPUs alike to their guests.
    #[arg(long, env = "OC_CPU_TEMPLATE", value_name = "NAME")]
    pub cpu_template: Option<String>,
    /// What a sandbox may read and write on each of its disks under Firecracker, MiB a second; no bound where absent.
    #[arg(long, env = "OC_DISK_MIB", value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub disk_mib: Option<u32>,
    /// Operations of a sandbox on each of its disks under Firecracker, a second; no bound where absent.
    #[arg(long, env = "OC_DISK_IOPS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub disk_iops: Option<u32>,
    /// Guests under Firecracker get memory of huge pages (2 MiB), of those that the host has set aside (`vm.nr_hugepages`): they
    /// run faster, but restores and checkpoints take time for all of a guest's memory, and clones share none of it.
    #[arg(long, env = "OC_HUGE_PAGES")]
    pub huge_pages: bool,
    /// What runs the guests' instructions under QEMU.
    #[arg(long, env = "OC_ACCELERATOR", value_enum, default_value_t = AcceleratorChoice::Auto)]
    pub accelerator: AcceleratorChoice,
    /// Boot every sandbox: no golden snapshots, no clones, no pool.
    #[arg(long, env = "OC_NO_SNAPSHOTS")]
    pub no_snapshots: bool,
    /// Where checkpoints are put, too, so that they do not depend on this host: `file:///path`, `s3://bucket/prefix`, or
    /// `none`. Hosts that name the same one can make something of each other's. Credentials come from the environment
    /// (`AWS_ACCESS_KEY_ID` and so on); a directory below the data directory where absent.
    #[arg(long, env = "OC_OBJECT_STORE", value_name = "URL")]
    pub object_store: Option<String>,
    /// Put hibernated sandboxes into the object store, too, once their process has ended, so that another host that names
    /// the same one wakes them if this one is gone.
    #[arg(long, env = "OC_UPLOAD_HIBERNATED")]
    pub upload_hibernated: bool,
    /// Whether VMs have a network. Without one they reach nothing, and a host needs neither nftables nor network namespaces.
    #[arg(long, env = "OC_NETWORK", value_enum, default_value_t = NetworkChoice::On)]
    pub network: NetworkChoice,
    /// Addresses that sandboxes reach although they are private or reserved, such as `10.1.2.0/24`; never those of this host
    /// itself. May be repeated.
    #[arg(long = "network-allow", env = "OC_NETWORK_ALLOW", value_delimiter = ',', value_name = "CIDR")]
    pub network_allow: Vec<IpNet>,
    /// Whom sandboxes' questions for names are passed on to: a resolv.conf(5), read again when it changes.
    #[arg(long, env = "OC_RESOLV_CONF", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// Connections that a sandbox may have at once.
    #[arg(long, env = "OC_NETWORK_CONNECTIONS", default_value_t = 4096, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=262_144))]
    pub network_connections: u32,
    /// What a sandbox may send, and receive, each second: millions of bits.
    // The kernel multiplies the bytes of a second, and a burst's, by a second's nanoseconds, in 64 bits (net/netfilter/nft_limit.c).
    #[arg(long, env = "OC_NETWORK_MBIT", default_value_t = 1000, value_name = "MBIT",
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub network_mbit: u32,
    /// Where this host stands: shown to users as their sandbox's region.
    #[arg(long, env = "OC_REGION", default_value = "local")]
    pub region: String,
    /// Ends every VM of this host, removes all that agents have made in the data directory, and exits.
    #[arg(long)]
    pub cleanup: bool,
}

/// Whether VMs have a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NetworkChoice {
    /// They reach the internet, unless their sandbox's policy says otherwise.
    On,
    /// They have none.
    Off,
}

/// What runs the VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VmmChoice {
    /// Firecracker if a guest really boots under it, else QEMU.
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker under its jailer.
    Firecracker,
}

/// What runs the guests' instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AcceleratorChoice {
    /// KVM if it really boots a guest, else software emulation.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// How many clones of a kind wait in the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Template and size.
    pub kind: Kind,
    /// How many.
    pub count: usize,
}

impl FromStr for PoolSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (kind, count) = text.split_once('=')?;
            let [template, cpus, memory_mb] = kind.split(':').collect::<Vec<_>>().try_into().ok()?;
            let kind = Kind {
                template: template.to_owned(),
                cpu_count: cpus.parse().ok().filter(|&cpus| cpus > 0)?,
                memory_mb: memory_mb.parse().ok().filter(|&mb| mb > 0)?,
            };
            (!template.is_empty()).then_some(())?;
            Some(Self { kind, count: count.parse().ok()? })
        };
        parse().ok_or_else(|| format!("{text:?} is not of the form TEMPLATE:CPUS:MEMORY_MIB=COUNT"))
    }
}

/// The agent's configuration, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Record store.
    pub store: String,
    /// Where to serve.
    pub listen: Endpoint,
    /// Name of this host.
    pub host_id: String,
    /// Where everything that the agent makes lies.
    pub data_dir: PathBuf,
    /// Size of the filesystem that it is put on, MiB, if it gets one of its own.
    pub data_image_mb: Option<u32>,
    /// Where the templates lie.
    pub image_dir: PathBuf,
    /// The guest's PID 1.
    pub guest_binary: PathBuf,
    /// What the pool holds and leaves.
    pub pool: pool::Settings,
    /// What the host takes at most.
    pub limits: Limits,
    /// How long hibernated VMs keep their process, and what becomes of them then.
    pub paused: Policy,
    /// Guest memory that may be promised, MiB.
    pub memory_capacity_mb: u64,
    /// What runs the VMs.
    pub vmm: VmmChoice,
    /// Which Firecracker, and what its VMs may.
    pub firecracker: firecracker::Settings,
    /// What runs the guests' instructions under QEMU.
    pub accelerator: AcceleratorChoice,
    /// Whether sandboxes are clones of golden snapshots; else each is booted.
    pub snapshots: bool,
    /// What VMs may do of their network; they have none where this is absent.
    pub network: Option<network::Settings>,
    /// URL of the object store, if there is one.
    pub object_store: Option<String>,
    /// Where this host stands.
    pub region: String,
}

/// A configuration that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value does not fit.
    #[error("{option}: {problem}")]
    Invalid {
        /// The option.
        option: &'static str,
        /// What is wrong, and what would do.
        problem: String,
    },
    /// The host does not say what it has.
    #[error("cannot measure this host")]
    Host(#[source] std::io::Error),
}

fn invalid(option: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { option, problem: problem.into() }
}

impl Config {
    /// Checks the arguments and fills in what depends on the host.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the option.
    pub fn new(args: Args) -> Result<Self, ConfigError> {
        let host_id = checked_host_id(&args.host_id)?;
        let data_dir = absolute("--data-dir", &args.data_dir)?;
        let guest_binary = match args.guest_binary {
            Some(path) => path,
            None => beside_this_program("oc-init").map_err(ConfigError::Host)?,
        };
        if !guest_binary.is_file() {
            return Err(invalid("--guest-binary", format!("there is no file {}", guest_binary.display())));
        }
        let total_mb = capacity::memory_total_mb().map_err(ConfigError::Host)?;
        let available_mb = capacity::memory_available_mb().map_err(ConfigError::Host)?;
        if args.memory_reserve_mb >= total_mb {
            return Err(invalid("--memory-reserve-mb", format!("this host has {total_mb} MiB in all")));
        }
        if args.data_image_mb.is_some_and(|size| size < LEAST_IMAGE_MB) {
            return Err(invalid("--data-image-mb", format!("want {LEAST_IMAGE_MB} at least")));
        }
        let limits = Limits {
            max_sandboxes: match args.max_sandboxes {
                Some(max) => max as usize,
                // A sandbox at rest takes a quarter of that; a busy one may take more.
                None => as_count(total_mb / 128),
            },
            memory_reserve_mb: args.memory_reserve_mb,
            disk_reserve_mb: args.disk_reserve_mb,
        };
        let by_memory = available_mb.saturating_sub(args.memory_reserve_mb) / CLONE_BUDGET_MB;
        let (template, cpu_count, memory_mb) = DEFAULT_KIND;
        let default = PoolSpec {
            kind: Kind { template: template.to_owned(), cpu_count, memory_mb },
            count: args.pool_size.unwrap_or_else(|| as_count(by_memory.min(DEFAULT_POOL))),
        };
        let mut shelves: Vec<(Kind, usize)> = Vec::new();
        // What was asked for by name stands before what is there by default.
        for spec in args.pools.into_iter().chain([default]) {
            if !shelves.iter().any(|(kind, _)| *kind == spec.kind) {
                shelves.push((spec.kind, spec.count));
            }
        }
        if args.no_snapshots {
            shelves.clear();
        }
        let pool = pool::Settings {
            shelves,
            parallel: std::thread::available_parallelism().map_or(1, Into::into),
            memory_reserve_mb: args.memory_reserve_mb,
            clone_mb: WAITING_CLONE_MB,
            disk_reserve_mb: args.disk_reserve_mb,
            data_dir: data_dir.clone(),
        };
        let object_store = checked_object_store(args.object_store, &data_dir)?;
        let paused = Policy {
            paused_for: Duration::from_secs(args.paused_for),
            // The pool makes no clone, and gives none up, for the sake of a sandbox that sleeps.
            headroom_mb: if pool.shelves.iter().any(|(_, count)| *count > 0) { WAITING_CLONE_MB } else { 0 },
            uploads: args.upload_hibernated && object_store.is_some(),
        };
        let network = (args.network == NetworkChoice::On).then_some(network::Settings {
            allow: args.network_allow,
            resolv_conf: args.resolv_conf,
            limits: network::Limits { connections: args.network_connections, mbit: args.network_mbit },
        });
        Ok(Self {
            store: args.store.ok_or_else(|| invalid("--store", "is needed"))?,
            listen: args.listen.ok_or_else(|| invalid("--listen", "is needed"))?,
            host_id,
            data_dir,
            data_image_mb: args.data_image_mb,
            image_dir: absolute("--image-dir", &args.image_dir)?,
            guest_binary,
            pool,
            limits,
            paused,
            memory_capacity_mb: total_mb.saturating_mul(u64::from(args.memory_overcommit.max(1))),
            vmm: args.vmm,
            firecracker: firecracker::Settings {
                firecracker: program("--firecracker", &args.firecracker)?,
                jailer: program("--jailer", &args.jailer)?,
                cpu_template: args.cpu_template.map(checked_cpu_template).transpose()?,
                disk_mib: args.disk_mib,
                disk_iops: args.disk_iops,
                huge_pages: args.huge_pages,
            },
            accelerator: args.accelerator,
            snapshots: !args.no_snapshots,
            network,
            object_store,
            region: args.region,
        })
    }
}

/// Checks a host's name: it becomes part of record keys and of cgroup names.
///
/// # Errors
///
/// [`ConfigError`] unless it is 1 to 63 letters, digits, hyphens and dots and begins with none of the latter.
pub fn checked_host_id(text: &str) -> Result<String, ConfigError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_';
    let fits = (1..=63).contains(&text.len()) && text.bytes().all(plain);
    if fits && text.as_bytes()[0].is_ascii_alphanumeric() {
        Ok(text.to_owned())
    } else {
        Err(invalid(
            "--host-id",
            "want 1 to 63 letters, digits, `-`, `_` and `.`, the first a letter or digit",
        ))
    }
}

/// Makes a path absolute: VM processes run in other directories.
///
/// # Errors
///
/// [`ConfigError`] for an empty path.
pub fn absolute(option: &'static str, path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path).map_err(|error| invalid(option, error.to_string()))
}

/// Firecracker's own templates for Intel and AMD (docs/cpu_templates/cpu-templates.md).
const CPU_TEMPLATES: [&str; 5] = ["C3", "T2", "T2S", "T2CL", "T2A"];

fn checked_cpu_template(name: String) -> Result<String, ConfigError> {
    match CPU_TEMPLATES.contains(&name.as_str()) {
        true => Ok(name),
        false => Err(invalid("--cpu-template", format!("want one of {}", CPU_TEMPLATES.join(", ")))),
    }
}

/// A program's path, from the root: it is started with no environment. A name that is not found stays as it is, for whoever
/// needs it to miss it.
fn program(option: &'static str, named: &Path) -> Result<PathBuf, ConfigError> {
    if named.components().count() > 1 {
        return absolute(option, named);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    Ok(found_in(env::split_paths(&path), named).unwrap_or_else(|| named.to_owned()))
}

/// The program called `named` in the first of these directories that has it.
pub fn found_in(directories: impl IntoIterator<Item = PathBuf>, named: &Path) -> Option<PathBuf> {
    directories.into_iter().map(|directory| directory.join(named)).find(|program| is_program(program))
}

/// Whether it is a file that can be run.
pub fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// What says that there is to be no object store.
const NO_OBJECT_STORE: &str = "none";

fn checked_object_store(url: Option<String>, data_dir: &Path) -> Result<Option<String>, ConfigError> {
    let url = match url {
        Some(url) if url == NO_OBJECT_STORE => return Ok(None),
        Some(url) => url,
        None => match data_dir.join("objects").to_str() {
            Some(path) => format!("file://{path}"),
            None => return Err(invalid("--object-store", "is needed where the data directory is not UTF-8")),
        },
    };
    objects::check(&url).map_err(|error| invalid("--object-store", error.to_string()))?;
    Ok(Some(url))
}

fn beside_this_program(name: &str) -> std::io::Result<PathBuf> {
    Ok(env::current_exe()?.with_file_name(name))
}

fn as_count(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(more: &[&str]) -> Args {
        let base =
            ["oc-vmm-agent", "--host-id", "h", "--data-dir", "/tmp/x", "--guest-binary", "/proc/self/exe"];
        let listen = ["--store", "file:///tmp/x/store", "--listen", "unix:///tmp/x/sock"];
        Args::try_parse_from(base.iter().chain(&listen).chain(more)).unwrap()
    }

    #[test]
    fn defaults_fit_the_host() {
        let config = Config::new(args(&[])).unwrap();
        let [(kind, count)] = &config.pool.shelves[..] else { panic!("one shelf") };
        assert_eq!((kind.template.as_str(), kind.memory_mb), ("base", 1024));
        assert!(*count <= 24);
        assert!(config.limits.max_sandboxes > 0);
    }

    #[test]
    fn a_named_kind_overrides_the_default_one() {
        let config = Config::new(args(&["--pool", "base:1:1024=3,base:1:512=2"])).unwrap();
        let counts: Vec<_> = config.pool.shelves.iter().map(|(kind, n)| (kind.memory_mb, *n)).collect();
        assert_eq!(counts, [(1024, 3), (512, 2)]);
    }

    #[test]
    fn without_snapshots_nothing_waits() {
        let config = Config::new(args(&["--no-snapshots", "--pool", "base:1:512=2"])).unwrap();
        assert!(!config.snapshots && config.pool.shelves.is_empty());
    }

    #[test]
    fn hibernated_sandboxes_are_paused_for_a_while_unless_told_otherwise() {
        let paused = |more: &[&str]| Config::new(args(more)).unwrap().paused;
        assert_eq!(paused(&[]).paused_for, Duration::from_secs(120));
        assert!(paused(&["--paused-for", "0"]).paused_for.is_zero());
        assert_eq!(paused(&["--pool-size", "1"]).headroom_mb, WAITING_CLONE_MB);
        assert_eq!(paused(&["--pool-size", "0"]).headroom_mb, 0, "nobody else wants it");
    }

    #[test]
    fn nonsense_is_named() {
        for bad in ["base=3", "base:0:512=1", ":1:512=1", "base:1:512", "base:1:512=x"] {
            assert!(bad.parse::<PoolSpec>().is_err(), "{bad}");
        }
        let mut bad = args(&[]);
        bad.host_id = "../x".into();
        assert!(matches!(Config::new(bad), Err(ConfigError::Invalid { option: "--host-id", .. })));
        let base =
            ["oc-vmm-agent", "--cleanup", "--host-id", "h", "--data-dir", "d", "--paused-for", "2678401"];
        assert!(Args::try_parse_from(base).is_err());
        let bad = args(&["--cpu-template", "T3"]);
        assert!(matches!(Config::new(bad), Err(ConfigError::Invalid { option: "--cpu-template", .. })));
        let bad = args(&["--data-image-mb", "300"]);
        assert!(matches!(Config::new(bad), Err(ConfigError::Invalid { option: "--data-image-mb", .. })));
        let bad = args(&["--memory-reserve-mb", "99999999999"]);
        assert!(matches!(Config::new(bad), Err(ConfigError::Invalid { option: "--memory-reserve-mb", .. })));
    }

    #[test]
    fn the_object_store_is_a_directory_of_its_own_unless_told() {
        let of = |more: &[&str]| Config::new(args(more)).map(|config| config.object_store);
        assert_eq!(of(&[]).unwrap().as_deref(), Some("file:///tmp/x/objects"));
        assert_eq!(of(&["--object-store", "s3://b/p"]).unwrap().as_deref(), Some("s3://b/p"));
        assert_eq!(of(&["--object-store", "none"]).unwrap(), None);
        for bad in ["file://x", "s3://", "ftp://a", "s3://key:secret@bucket"] {
            let refusal = of(&["--object-store", bad]).unwrap_err().to_string();
            assert!(refusal.contains("--object-store") && !refusal.contains("secret"), "{refusal}");
        }
    }

    #[test]
    fn cleanup_needs_no_store() {
        let args = ["oc-vmm-agent", "--cleanup", "--host-id", "h", "--data-dir", "d"];
        assert!(Args::try_parse_from(args).unwrap().cleanup);
        assert!(Args::try_parse_from(&args[..1]).is_err());
    }
}

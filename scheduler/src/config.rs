//! How the scheduler is told what to do: flags, or variables of the environment.

use clap::Parser;
use oc_mesh::{endpoint::Endpoint, host_name};
use sha2::{Digest as _, Sha256};

use crate::{quota::Quota, validate};

/// What should exist: sandboxes, placement, quota, reconciliation.
#[derive(Clone, Debug, Parser)]
#[command(name = "oc-scheduler", version)]
pub struct Config {
    /// Record store: `file:///path/store.db` or `etcd://host:port[,host:port]`.
    #[arg(long, env = "OC_STORE", value_name = "URL")]
    pub store: String,

    /// Where to listen: `unix:///path` or `tcp://ip:port`; with port 0 the member record says which was taken.
    #[arg(long, env = "OC_LISTEN", value_name = "ENDPOINT")]
    pub listen: Endpoint,

    /// Name among the schedulers; where absent, one that follows from this machine and `--listen`, so that a scheduler
    /// that is started again takes the place of the one before.
    #[arg(long, env = "OC_ID", value_name = "NAME")]
    pub id: Option<String>,

    /// SHA-256, in hex, of an API key that is to exist, as an administrator's.
    #[arg(long, env = "OC_BOOTSTRAP_KEY_HASH", value_name = "HEX", value_parser = key_hash)]
    pub bootstrap_key_hash: Option<String>,

    /// Tenant of that key.
    #[arg(long, env = "OC_BOOTSTRAP_TENANT", value_name = "TENANT", default_value = "default", value_parser = tenant)]
    pub bootstrap_tenant: String,

    /// Sandboxes that a tenant may have at once.
    #[arg(
        long, env = "OC_MAX_SANDBOXES_PER_TENANT", value_name = "N", default_value_t = 1000,
        value_parser = clap::value_parser!(i32).range(0..)
    )]
    pub max_sandboxes_per_tenant: i32,

    /// Guest memory that a tenant's sandboxes may have together, MiB; 4 TiB where absent.
    #[arg(
        long, env = "OC_MAX_MEMORY_MB_PER_TENANT", value_name = "MIB", default_value_t = 4 << 20,
        value_parser = clap::value_parser!(i64).range(0..)
    )]
    pub max_memory_mb_per_tenant: i64,

    /// Host names that are the mesh's own, separated by commas, each with every name below it: no preview is given one of them. Those
    /// of the gateway's public URL, its preview domain and `localhost` are so without being named. The gateways want the same.
    #[arg(
        long, env = "OC_OWN_NAMES", value_name = "NAMES", value_delimiter = ',',
        value_parser = host_name::option
    )]
    pub own_names: Vec<String>,

    /// Calls that are answered at the same time; more are refused as `OVERLOADED`.
    #[arg(long, env = "OC_MAX_CALLS", value_name = "N", default_value_t = 1024)]
    pub max_calls: usize,
}

impl Config {
    /// The limits of every tenant.
    pub fn quota(&self) -> Quota {
        Quota { max_sandboxes: self.max_sandboxes_per_tenant, max_memory_mb: self.max_memory_mb_per_tenant }
    }

    /// The name among the schedulers.
    pub fn scheduler_id(&self) -> String {
        self.id.clone().unwrap_or_else(|| {
            let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let place = format!("{} {}", machine.trim(), self.listen);
            let digest = hex::encode(Sha256::digest(place.as_bytes()));
            format!("scheduler-{}", digest.get(..12).unwrap_or(&digest))
        })
    }
}

fn key_hash(text: &str) -> Result<String, String> {
    let is_hash = text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if is_hash { Ok(text.to_owned()) } else { Err("want 64 lower-case hex digits".to_owned()) }
}

fn tenant(text: &str) -> Result<String, String> {
    validate::tenant(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(more: &[&str]) -> Result<Config, clap::Error> {
        let base = ["oc-scheduler", "--store", "file:///x/store.db", "--listen", "unix:///x/scheduler.sock"];
        Config::try_parse_from(base.iter().chain(more))
    }

    #[test]
    fn the_name_stays_the_same_from_start_to_start() {
        let (first, second) = (parsed(&[]).unwrap(), parsed(&[]).unwrap());
        assert_eq!(first.scheduler_id(), second.scheduler_id());
        let other = Config { listen: "unix:///y/scheduler.sock".parse().unwrap(), ..first.clone() };
        assert_ne!(first.scheduler_id(), other.scheduler_id());
        assert_eq!(parsed(&["--id", "mine"]).unwrap().scheduler_id(), "mine");
    }

    #[test]
    fn own_names_are_told_in_any_case() {
        let told = parsed(&["--own-names", "API.example., b.Example"]).unwrap();
        assert_eq!(told.own_names, ["api.example", "b.example"]);
    }

    #[test]
    fn malformed_flags_are_refused_at_start() {
        for flags in [
            ["--bootstrap-key-hash", "abc"],
            ["--bootstrap-tenant", "No Such"],
            ["--max-sandboxes-per-tenant", "-1"],
            ["--listen", "somewhere"],
            ["--own-names", "*.example"],
            ["--own-names", "https://api.example"],
        ] {
            assert!(parsed(&flags).is_err(), "{flags:?}");
        }
        assert!(parsed(&["--bootstrap-key-hash", &"a".repeat(64)]).is_ok());
    }
}

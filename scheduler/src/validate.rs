//! What a request may say. Parsed once, here; what comes out is trusted behind.

use std::{collections::HashMap, time::Duration};

use oc_proto::{
    mesh::VmSize,
    v1::{CreateSandboxRequest, EgressPolicy},
};
use thiserror::Error;

use crate::size::{self, SizeError};

/// The template of who asks for none.
const DEFAULT_TEMPLATE: &str = "base";
/// Longest name of a template, bytes.
const MAX_TEMPLATE: usize = 64;
/// The idle timeout of who says nothing, seconds.
pub const DEFAULT_TIMEOUT: i32 = 300;
/// The longest idle timeout, seconds: 31 days.
const MAX_TIMEOUT: i32 = 31 * 24 * 3600;
/// Names and values of the environment together, bytes.
const MAX_ENVS_BYTES: usize = 64 << 10;
/// Variables of the environment.
const MAX_ENVS: usize = 1024;
/// Keys and values of the metadata together, bytes.
const MAX_METADATA_BYTES: usize = 16 << 10;
/// Entries of the metadata.
const MAX_METADATA: usize = 256;
/// Longest name of a tenant, bytes.
const MAX_TENANT: usize = 64;
/// Longest description of a key, bytes.
const MAX_DESCRIPTION: usize = 256;

/// Where relative paths in a sandbox start.
const HOME: &str = "/home/sandbox";
/// `PATH_MAX` (limits.h) without its NUL.
const MAX_PATH: usize = 4095;
/// Seconds that a file's URL is good for where nothing is said.
const DEFAULT_EXPIRES_IN: i32 = 3600;
/// The longest that a file's URL is good for, seconds: a week.
const MAX_EXPIRES_IN: i32 = 7 * 24 * 3600;
/// Longest name of a checkpoint, bytes.
const MAX_CHECKPOINT_NAME: usize = 128;
/// Sandboxes that are made of one at once.
const MAX_FORKS: i32 = 64;

/// A sandbox that may be asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// The template.
    pub template_id: String,
    /// The size.
    pub size: VmSize,
    /// Idle timeout, seconds; 0 for none.
    pub timeout: i32,
    /// Environment of its commands.
    pub envs: HashMap<String, String>,
    /// Attached by the caller.
    pub metadata: HashMap<String, String>,
    /// What it may reach.
    pub egress: EgressPolicy,
    /// SHA-256 of the token that its ports ask for, hex; empty for none.
    pub preview_token_hash: String,
}

/// What is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Invalid {
    /// The template's name has no such form.
    #[error(
        "templateID must be 1 to {MAX_TEMPLATE} characters of [a-z0-9._-] and begin with a letter or digit"
    )]
    Template,
    /// The timeout is negative or too long.
    #[error("timeout must be 0 to {MAX_TIMEOUT} seconds, not {0}")]
    Timeout(i32),
    /// The size is none of those there are.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A variable of the environment has no name that a process could be given.
    #[error("envs: the name {0:?} is empty or contains '=' or NUL")]
    EnvName(String),
    /// A variable of the environment has a value that a process cannot be given.
    #[error("envs: the value of {0:?} contains NUL")]
    EnvValue(String),
    /// It is no port.
    #[error("port must be 1 to 65535, not {0}")]
    Port(u32),
    /// It is no host name that could lead anywhere.
    #[error("domain must be a host name in lower case, with a dot")]
    PreviewDomain,
    /// It is the mesh's own, or below what is.
    #[error("domain: {0} is one of the mesh's own names, or below one, and no preview's")]
    OwnName(String),
    /// There is no such way of asking for a token.
    #[error("the scheme of a preview's token is bearer, not {0:?}")]
    PreviewScheme(String),
    /// It is no token that can be asked for.
    #[error("a preview's token is auto, or 16 to 256 visible ASCII characters")]
    PreviewToken,
    /// The environment is too large.
    #[error("envs must be at most {MAX_ENVS} variables and {MAX_ENVS_BYTES} bytes in all")]
    Envs,
    /// The metadata is too large.
    #[error("metadata must be at most {MAX_METADATA} entries and {MAX_METADATA_BYTES} bytes in all")]
    Metadata,
    /// An entry of the metadata has no name.
    #[error("metadata: a key is empty")]
    MetadataKey,
    /// The tenant's name has no such form.
    #[error("tenant must be 1 to {MAX_TENANT} characters of [a-z0-9-]")]
    Tenant,
    /// The description is too long.
    #[error("description must be at most {MAX_DESCRIPTION} bytes")]
    Description,
    /// The checkpoint's name has no such form.
    #[error("name must be 1 to {MAX_CHECKPOINT_NAME} bytes without control characters")]
    CheckpointName,
    /// More or fewer sandboxes than are made at once.
    #[error("count must be 1 to {MAX_FORKS}, not {0}")]
    Count(i32),
    /// A number that the contract does not know.
    #[error("{0} has a value that is none of those there are")]
    Enumeration(&'static str),
    /// Fewer checkpoints than none are to be kept, or more than there may be.
    #[error("retentionPolicy.maxCount must be 0 to {max}, not {given}")]
    Retention {
        /// What was asked for.
        given: i32,
        /// As many as there may be.
        max: usize,
    },
    /// No file in a sandbox can have that path.
    #[error("path must be 1 to {MAX_PATH} bytes without NUL and '..' components")]
    Path,
    /// A URL would be good for too long, or never.
    #[error("expiresIn must be 1 to {MAX_EXPIRES_IN} seconds, not {0}")]
    ExpiresIn(i32),
    /// The page is too large, or negative.
    #[error("page_size must be 0 to 1000, not {0}")]
    PageSize(i32),
    /// The page token is none of ours.
    #[error("page_token must be the next_page_token of the answer before")]
    PageToken,
}

/// Parses what is to be created.
///
/// # Errors
///
/// [`Invalid`] for the first thing that is wrong.
pub fn order(request: CreateSandboxRequest) -> Result<Order, Invalid> {
    let template_id = match request.template_id {
        empty if empty.is_empty() => DEFAULT_TEMPLATE.to_owned(),
        named => template(named)?,
    };
    let size = size::infer(request.cpu_count, request.memory_mb, request.disk_mb)?;
    let timeout = timeout(request.timeout.unwrap_or(DEFAULT_TIMEOUT))?;
    check_envs(&request.envs)?;
    check_metadata(&request.metadata)?;
    let egress = egress(request.egress)?;
    Ok(Order {
        template_id,
        size,
        timeout,
        envs: request.envs,
        metadata: request.metadata,
        egress,
        preview_token_hash: String::new(),
    })
}

fn template(name: String) -> Result<String, Invalid> {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let begins = name.bytes().next().is_some_and(legal);
    let all = name.bytes().all(|byte| legal(byte) || b"._-".contains(&byte));
    if begins && all && name.len() <= MAX_TEMPLATE { Ok(name) } else { Err(Invalid::Template) }
}

/// An idle timeout, seconds.
///
/// # Errors
///
/// [`Invalid::Timeout`].
pub fn timeout(seconds: i32) -> Result<i32, Invalid> {
    if (0..=MAX_TIMEOUT).contains(&seconds) { Ok(seconds) } else { Err(Invalid::Timeout(seconds)) }
}

/// A tenant's name.
///
/// # Errors
///
/// [`Invalid::Tenant`].
pub fn tenant(name: &str) -> Result<(), Invalid> {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=MAX_TENANT).contains(&name.len()) && name.bytes().all(legal) {
        Ok(())
    } else {
        Err(Invalid::Tenant)
    }
}

/// What a key is for.
///
/// # Errors
///
/// [`Invalid::Description`].
pub fn description(text: &str) -> Result<(), Invalid> {
    if text.len() <= MAX_DESCRIPTION { Ok(()) } else { Err(Invalid::Description) }
}

/// A checkpoint's name.
///
/// # Errors
///
/// [`Invalid::CheckpointName`].
pub fn checkpoint_name(name: &str) -> Result<(), Invalid> {
    let is_plain = !name.chars().any(char::is_control);
    if (1..=MAX_CHECKPOINT_NAME).contains(&name.len()) && is_plain {
        Ok(())
    } else {
        Err(Invalid::CheckpointName)
    }
}

/// The absolute path in a sandbox that `path` names, without `.` and empty components.
///
/// # Errors
///
/// [`Invalid::Path`].
pub fn path(path: &str) -> Result<String, Invalid> {
    let names = path.split('/').filter(|name| !matches!(*name, "" | "."));
    let is_legal = (1..=MAX_PATH).contains(&path.len()) && !path.contains('\0');
    if !is_legal || names.clone().any(|name| name == "..") {
        return Err(Invalid::Path);
    }
    let start = if path.starts_with('/') { String::new() } else { HOME.to_owned() };
    let absolute = names.fold(start, |before, name| before + "/" + name);
    Ok(if absolute.is_empty() { "/".to_owned() } else { absolute })
}

/// How long a file's URL is good for.
///
/// # Errors
///
/// [`Invalid::ExpiresIn`].
pub fn expires_in(asked: Option<i32>) -> Result<Duration, Invalid> {
    let seconds = asked.unwrap_or(DEFAULT_EXPIRES_IN);
    match u64::try_from(seconds) {
        Ok(good) if (1..=MAX_EXPIRES_IN).contains(&seconds) => Ok(Duration::from_secs(good)),
        _ => Err(Invalid::ExpiresIn(seconds)),
    }
}

/// How many sandboxes are to be made; one where nothing is said.
///
/// # Errors
///
/// [`Invalid::Count`].
pub fn count(asked: Option<i32>) -> Result<usize, Invalid> {
    let count = asked.unwrap_or(1);
    usize::try_from(count).ok().filter(|_| (1..=MAX_FORKS).contains(&count)).ok_or(Invalid::Count(count))
}

/// What a sandbox may reach; the internet where nothing is said.
fn egress(asked: i32) -> Result<EgressPolicy, Invalid> {
    match EgressPolicy::try_from(asked) {
        Ok(EgressPolicy::Unspecified) => Ok(EgressPolicy::Open),
        known => known.map_err(|_| Invalid::Enumeration("egress")),
    }
}

/// What is made of a state of another sandbox: as that one is, but for what is asked for.
///
/// # Errors
///
/// [`Invalid`] for the first thing that is wrong.
pub fn fork_order(
    of: Order,
    timeout_asked: Option<i32>,
    envs: HashMap<String, String>,
    metadata: HashMap<String, String>,
) -> Result<Order, Invalid> {
    let mut order = Order { timeout: timeout(timeout_asked.unwrap_or(of.timeout))?, metadata, ..of };
    order.envs.extend(envs);
    check_envs(&order.envs)?;
    check_metadata(&order.metadata)?;
    Ok(order)
}

fn check_envs(envs: &HashMap<String, String>) -> Result<(), Invalid> {
    if envs.len() > MAX_ENVS || bytes_in(envs) > MAX_ENVS_BYTES {
        return Err(Invalid::Envs);
    }
    for (name, value) in envs {
        // What execve(2) can carry; shells may ignore stranger names, other programs do not.
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(Invalid::EnvName(name.clone()));
        }
        if value.contains('\0') {
            return Err(Invalid::EnvValue(name.clone()));
        }
    }
    Ok(())
}

fn check_metadata(metadata: &HashMap<String, String>) -> Result<(), Invalid> {
    if metadata.len() > MAX_METADATA || bytes_in(metadata) > MAX_METADATA_BYTES {
        return Err(Invalid::Metadata);
    }
    if metadata.contains_key("") {
        return Err(Invalid::MetadataKey);
    }
    Ok(())
}

fn bytes_in(entries: &HashMap<String, String>) -> usize {
    entries.iter().map(|(key, value)| key.len() + value.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_env(name: &str, value: &str) -> Result<Order, Invalid> {
        order(CreateSandboxRequest { envs: [(name.into(), value.into())].into(), ..Default::default() })
    }

    #[test]
    fn an_empty_request_means_the_defaults() {
        let order = order(CreateSandboxRequest::default()).unwrap();
        assert_eq!((order.template_id.as_str(), order.timeout), ("base", 300));
        assert_eq!(order.size, VmSize { cpu_count: 1, memory_mb: 1024, disk_mb: 20_480 });
    }

    #[test]
    fn templates_have_plain_names() {
        for name in ["base", "python-3.12", "0", &"a".repeat(64)] {
            assert!(template(name.into()).is_ok(), "{name}");
        }
        for name in ["../base", ".", "-x", "Base", "a/b", "a b", "a\0", "ä", &"a".repeat(65)] {
            assert_eq!(template(name.into()), Err(Invalid::Template), "{name}");
        }
    }

    #[test]
    fn timeouts_are_bounded_and_zero_is_one() {
        let with = |timeout| order(CreateSandboxRequest { timeout: Some(timeout), ..Default::default() });
        assert_eq!(with(0).unwrap().timeout, 0);
        assert_eq!(with(MAX_TIMEOUT).unwrap().timeout, MAX_TIMEOUT);
        for bad in [-1, MAX_TIMEOUT + 1, i32::MIN] {
            assert_eq!(with(bad), Err(Invalid::Timeout(bad)));
        }
    }

    #[test]
    fn the_environment_is_what_a_process_can_be_given() {
        assert!(with_env("PATH", "/bin=\n").is_ok());
        assert!(with_env("npm_config_a-b", "").is_ok());
        assert_eq!(with_env("", "x"), Err(Invalid::EnvName(String::new())));
        assert_eq!(with_env("A=B", "x"), Err(Invalid::EnvName("A=B".into())));
        assert_eq!(with_env("A\0", "x"), Err(Invalid::EnvName("A\0".into())));
        assert_eq!(with_env("A", "x\0"), Err(Invalid::EnvValue("A".into())));
        assert!(with_env("A", &"x".repeat(MAX_ENVS_BYTES - 1)).is_ok());
        assert_eq!(with_env("A", &"x".repeat(MAX_ENVS_BYTES)), Err(Invalid::Envs));
    }

    #[test]
    fn metadata_is_bounded_by_bytes_and_by_count() {
        let with = |metadata: HashMap<String, String>| {
            order(CreateSandboxRequest { metadata, ..Default::default() }).map(|_| ())
        };
        let entries = |count: usize| (0..count).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(with(entries(MAX_METADATA)), Ok(()));
        assert_eq!(with(entries(MAX_METADATA + 1)), Err(Invalid::Metadata));
        assert_eq!(with([("k".into(), "v".repeat(MAX_METADATA_BYTES))].into()), Err(Invalid::Metadata));
        assert_eq!(with([(String::new(), "v".into())].into()), Err(Invalid::MetadataKey));
    }

    #[test]
    fn a_sandbox_reaches_the_internet_unless_told_otherwise_and_so_does_its_fork() {
        let with = |egress: i32| order(CreateSandboxRequest { egress, ..Default::default() });
        assert_eq!(with(0).unwrap().egress, EgressPolicy::Open);
        let closed = with(EgressPolicy::None.into()).unwrap();
        assert_eq!(closed.egress, EgressPolicy::None);
        assert_eq!(with(3), Err(Invalid::Enumeration("egress")));
        let fork = fork_order(closed, None, HashMap::new(), HashMap::new()).unwrap();
        assert_eq!(fork.egress, EgressPolicy::None);
    }

    #[test]
    fn forks_are_counted_and_lay_their_environment_over_their_origins() {
        assert_eq!((count(None), count(Some(1)), count(Some(64))), (Ok(1), Ok(1), Ok(64)));
        for bad in [0, 65, -1, i32::MIN] {
            assert_eq!(count(Some(bad)), Err(Invalid::Count(bad)));
        }
        let env = |name: &str, value: &str| HashMap::from([(name.to_owned(), value.to_owned())]);
        let of = with_env("A", "old").unwrap();
        let fork = fork_order(of.clone(), None, env("A", "new"), env("m", "n")).unwrap();
        assert_eq!((fork.timeout, &fork.envs, &fork.metadata), (300, &env("A", "new"), &env("m", "n")));
        let fork = fork_order(of.clone(), Some(0), env("B", "b"), HashMap::new()).unwrap();
        assert_eq!((fork.timeout, fork.envs.len()), (0, 2));
        let too_much = env("B", &"x".repeat(MAX_ENVS_BYTES));
        assert_eq!(fork_order(of, None, too_much, HashMap::new()), Err(Invalid::Envs));
    }

    #[test]
    fn checkpoints_have_names_of_one_line() {
        for name in ["a", "before the upgrade ✓", &"n".repeat(128)] {
            assert_eq!(checkpoint_name(name), Ok(()), "{name}");
        }
        for name in ["", "a\nb", "\0", "\u{9b}", &"n".repeat(129)] {
            assert_eq!(checkpoint_name(name), Err(Invalid::CheckpointName), "{name}");
        }
    }

    #[test]
    fn paths_are_made_absolute_and_stay_in_the_sandbox() {
        for (given, expected) in [
            ("/a/b", "/a/b"),
            ("a", "/home/sandbox/a"),
            ("./a//b/.", "/home/sandbox/a/b"),
            ("//x/", "/x"),
            ("/", "/"),
            ("/a\nb ä", "/a\nb ä"),
        ] {
            assert_eq!(path(given).as_deref(), Ok(expected), "{given}");
        }
        for given in ["", "..", "/a/../b", "a\0b", &"a".repeat(MAX_PATH + 1)] {
            assert_eq!(path(given), Err(Invalid::Path), "{given:?}");
        }
    }

    #[test]
    fn urls_are_good_for_a_week_at_most() {
        assert_eq!(expires_in(None), Ok(Duration::from_secs(3600)));
        assert_eq!(expires_in(Some(604_800)), Ok(Duration::from_secs(604_800)));
        for bad in [0, -1, 604_801] {
            assert_eq!(expires_in(Some(bad)), Err(Invalid::ExpiresIn(bad)));
        }
    }

    #[test]
    fn tenants_have_plain_names() {
        for name in ["a", "default", "acme-2", &"a".repeat(64)] {
            assert_eq!(tenant(name), Ok(()), "{name}");
        }
        for name in ["", "Acme", "a/b", "a_b", "a b", &"a".repeat(65)] {
            assert_eq!(tenant(name), Err(Invalid::Tenant), "{name}");
        }
    }
}

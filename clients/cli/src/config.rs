//! Where the gateway's URL and the API key come from. The first that says something wins:
//!
//! 1. flags: `--api-url`, `--api-key`
//! 2. environment: `OC_API_URL`, `OC_API_KEY`, then `OPENCOMPUTER_API_URL`, `OPENCOMPUTER_API_KEY`
//! 3. `~/.oc/config.json`, written by `oc config set`
//! 4. the mesh that `oc up` runs on this machine
//!
//! The local mesh's key is only ever sent to the local mesh, and its certificate authority trusted for it alone. Others are named
//! by `OC_CA_FILE`.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Where a gateway is expected if nothing says otherwise.
const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// URL and key, as far as one source knows them.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// URL of the gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_url: Option<String>,
    /// API key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<String>,
    /// A certificate authority to trust.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = self.api_key.as_ref().map(|_| "…");
        formatter.debug_struct("Settings").field("api_url", &self.api_url).field("api_key", &key).finish()
    }
}

/// The gateway to talk to.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    /// Base URL, without a trailing slash or `/api`.
    pub url: String,
    /// API key.
    pub key: String,
    /// A certificate authority to trust beside those of the system, for https.
    pub ca_file: Option<PathBuf>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Target").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Everything that may name a gateway, in order of precedence.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// From the command line.
    pub flags: Settings,
    /// From the environment.
    pub environment: Settings,
    /// From the configuration file.
    pub file: Settings,
    /// Of the mesh that runs on this machine; both or none.
    pub local: Option<Target>,
}

impl Sources {
    /// Decides.
    pub fn resolve(&self) -> Result<Target, Failure> {
        let named = [&self.flags, &self.environment, &self.file];
        let url = named.iter().find_map(|settings| settings.api_url.as_deref());
        let key = named.iter().find_map(|settings| settings.api_key.as_deref());
        let local = self.local.as_ref();
        let url = url.map(base_url).or_else(|| local.map(|local| local.url.clone()));
        let url = url.unwrap_or_else(|| DEFAULT_URL.to_owned());
        let local_key = local.filter(|local| local.url == url).map(|local| local.key.as_str());
        let key = key.or(local_key).ok_or(Failure::NoKey)?.to_owned();
        let local_ca = local.filter(|local| local.url == url).and_then(|local| local.ca_file.clone());
        let ca_file = named.iter().find_map(|settings| settings.ca_file.clone()).or(local_ca);
        Ok(Target { url, key, ca_file })
    }

    /// Decides for `oc env`: the mesh on this machine comes before what an earlier `oc env` has exported.
    pub fn resolve_for_export(&self) -> Result<Target, Failure> {
        match &self.local {
            Some(local) => Ok(Target {
                url: self.flags.api_url.as_deref().map_or_else(|| local.url.clone(), base_url),
                key: self.flags.api_key.clone().unwrap_or_else(|| local.key.clone()),
                ca_file: local.ca_file.clone(),
            }),
            None => self.resolve(),
        }
    }
}

/// The published clients take a URL with a slash or with `/api` at its end: so do we.
fn base_url(url: &str) -> String {
    let url = url.trim().trim_end_matches('/');
    url.strip_suffix("/api").unwrap_or(url).trim_end_matches('/').to_owned()
}

/// What the environment says; `get` reads a variable.
pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Settings {
    let first = |names: [&str; 2]| names.iter().find_map(|name| get(name).filter(|value| !value.is_empty()));
    Settings {
        api_url: first(["OC_API_URL", "OPENCOMPUTER_API_URL"]),
        api_key: first(["OC_API_KEY", "OPENCOMPUTER_API_KEY"]),
        ca_file: first(["OC_CA_FILE", "OC_CA_FILE"]).map(PathBuf::from),
    }
}

/// Path of the configuration file in the user's home.
pub fn file_path(home: Option<&Path>) -> Option<PathBuf> {
    home.filter(|home| home.is_absolute()).map(|home| home.join(".oc/config.json"))
}

/// Reads the configuration file. One that does not exist says nothing.
pub fn load(path: &Path) -> Result<Settings, Failure> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Settings::default()),
        Err(error) => return Err(Failure::local(format!("cannot read {}", path.display()), error)),
    };
    serde_json::from_str(&text)
        .map_err(|error| Failure::Unfit(format!("{} is no valid configuration: {error}", path.display())))
}

/// Writes the configuration file, for its owner's eyes only.
pub fn save(path: &Path, settings: &Settings) -> Result<(), Failure> {
    let failed = |error| Failure::local(format!("cannot write {}", path.display()), error);
    let text = serde_json::to_string_pretty(settings).map_err(|error| failed(error.into()))?;
    write_secret(path, format!("{text}\n").as_bytes()).map_err(failed)
}

/// Writes a file that only its owner may read; it appears whole or not at all.
pub fn write_secret(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    write_secret_by(&path.with_extension(format!("tmp-{}", std::process::id())), path, content)
}

/// The same by way of `temporary`, which nobody else writes.
pub fn write_secret_by(temporary: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let written = (|| {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(temporary, path)
    })();
    if written.is_err() {
        // The error that matters is the first one.
        let _ = fs::remove_file(temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn settings(url: &str, key: &str) -> Settings {
        let some = |value: &str| Some(value.to_owned()).filter(|value| !value.is_empty());
        Settings { api_url: some(url), api_key: some(key), ca_file: None }
    }

    fn local() -> Option<Target> {
        Some(Target { url: "http://127.0.0.1:7".into(), key: "local".into(), ca_file: None })
    }

    #[test]
    fn flags_win_over_the_environment_over_the_file_over_the_local_mesh() {
        let mut sources = Sources {
            flags: settings("http://flag", "flag"),
            environment: settings("http://env", "env"),
            file: settings("http://file", "file"),
            local: local(),
        };
        let mut seen = Vec::new();
        for forget in [
            |sources: &mut Sources| sources.flags = Settings::default(),
            |sources: &mut Sources| sources.environment = Settings::default(),
            |sources: &mut Sources| sources.file = Settings::default(),
            |sources: &mut Sources| sources.local = None,
        ] {
            let target = sources.resolve().unwrap();
            seen.push((target.url, target.key));
            forget(&mut sources);
        }
        let expected = [
            ("http://flag", "flag"),
            ("http://env", "env"),
            ("http://file", "file"),
            ("http://127.0.0.1:7", "local"),
        ];
        assert_eq!(seen, expected.map(|(url, key)| (url.to_owned(), key.to_owned())));
        assert!(matches!(sources.resolve(), Err(Failure::NoKey)));
    }

    #[test]
    fn url_and_key_may_come_from_different_sources() {
        let sources = Sources {
            environment: settings("", "env"),
            file: settings("http://file", "file"),
            ..Sources::default()
        };
        assert_eq!(
            sources.resolve().unwrap(),
            Target { url: "http://file".into(), key: "env".into(), ca_file: None }
        );
    }

    #[test]
    fn the_local_key_is_not_sent_elsewhere() {
        let sources =
            Sources { environment: settings("http://elsewhere", ""), local: local(), ..Sources::default() };
        assert!(matches!(sources.resolve(), Err(Failure::NoKey)));
    }

    #[test]
    fn an_export_prefers_the_mesh_on_this_machine() {
        let sources =
            Sources { environment: settings("http://env", "env"), local: local(), ..Sources::default() };
        assert_eq!(sources.resolve_for_export().unwrap(), local().unwrap());
    }

    #[test]
    fn our_variables_win_over_the_published_ones_and_empty_ones_say_nothing() {
        let get = |name: &str| match name {
            "OC_API_URL" => Some("http://ours".to_owned()),
            "OPENCOMPUTER_API_URL" => Some("http://theirs".to_owned()),
            "OC_API_KEY" => Some(String::new()),
            "OPENCOMPUTER_API_KEY" => Some("theirs".to_owned()),
            _ => None,
        };
        assert_eq!(from_environment(get), settings("http://ours", "theirs"));
    }

    #[test]
    fn urls_lose_a_trailing_slash_and_api() {
        for url in ["http://h:1", "http://h:1/", "http://h:1/api", "http://h:1/api/"] {
            assert_eq!(base_url(url), "http://h:1");
        }
    }

    #[test]
    fn the_file_comes_back_as_written_and_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = file_path(Some(directory.path())).unwrap();
        assert_eq!(load(&path).unwrap(), Settings::default());
        save(&path, &settings("http://u", "k")).unwrap();
        assert_eq!(load(&path).unwrap(), settings("http://u", "k"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, "{").unwrap();
        assert!(matches!(load(&path), Err(Failure::Unfit(_))));
    }

    #[test]
    fn keys_do_not_show_in_debug_output() {
        let text = format!(
            "{:?} {:?}",
            settings("u", "secret"),
            Target { url: "u".into(), key: "secret".into(), ca_file: None }
        );
        assert!(!text.contains("secret"));
    }
}

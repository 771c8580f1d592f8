//! `oc config`: the file that names gateway and key for every shell.

use std::path::Path;

use serde_json::json;

use crate::{
    arguments::{ConfigCommand, ConfigName},
    config,
    failure::Failure,
    output::{self, Output},
};

/// `oc config set` and `oc config show`.
pub fn run(command: &ConfigCommand, home: Option<&Path>, output: Output) -> Result<(), Failure> {
    let path = config::file_path(home).ok_or_else(|| {
        Failure::Unfit("there is no home directory for the configuration: set HOME".to_owned())
    })?;
    let mut settings = config::load(&path)?;
    match command {
        ConfigCommand::Set { name, value } => {
            let new = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
            match name {
                ConfigName::ApiUrl => settings.api_url = new.map(checked_url).transpose()?,
                ConfigName::ApiKey => settings.api_key = new.map(checked_key).transpose()?,
            }
            config::save(&path, &settings)?;
            output.done()
        }
        ConfigCommand::Show => {
            let url = settings.api_url.clone().unwrap_or_default();
            let key = settings.api_key.as_deref().map(masked).unwrap_or_default();
            output.show(
                || json!({ "path": path, "apiUrl": url, "apiKey": key }),
                || {
                    output::pairs([
                        ("path", path.display().to_string()),
                        ("api-url", url.clone()),
                        ("api-key", key.clone()),
                    ])
                },
            )
        }
    }
}

fn checked_url(url: String) -> Result<String, Failure> {
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    if matches!(scheme, "http" | "https") && !rest.is_empty() {
        return Ok(url);
    }
    Err(Failure::Usage(format!("{url:?} is no URL: give http(s)://HOST:PORT")))
}

/// Mistakes in copying a key are common: say so now rather than with every later command.
fn checked_key(key: String) -> Result<String, Failure> {
    if is_api_key(&key) {
        return Ok(key);
    }
    Err(Failure::Usage("that is no API key: one is osb_ and 64 hexadecimal digits".to_owned()))
}

/// Whether `text` has the shape of an API key.
pub fn is_api_key(text: &str) -> bool {
    text.strip_prefix("osb_")
        .is_some_and(|digits| digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Enough of a key to know it by, too little to use it.
fn masked(key: &str) -> String {
    let start: String = key.chars().take(8).collect();
    format!("{start}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_are_taken() {
        let key = format!("osb_{}", "0123456789abcdef".repeat(4));
        assert!(is_api_key(&key));
        assert!(!is_api_key(&key[..67]));
        assert!(!is_api_key(&key.replace('a', "g")));
        assert_eq!(masked(&key), "osb_0123…");
    }

    #[test]
    fn only_urls_are_taken() {
        assert!(checked_url("http://127.0.0.1:8080".into()).is_ok());
        assert!(checked_url("127.0.0.1:8080".into()).is_err());
        assert!(checked_url("http://".into()).is_err());
    }
}

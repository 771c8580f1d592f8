//! The API key of a mesh of one machine: made on first use, kept in the state directory. The mesh itself is
//! told only its hash.

use std::{fmt, fs, io, os::unix::fs::PermissionsExt as _, path::Path};

use sha2::{Digest as _, Sha256};

use crate::{commands::configure::is_api_key, config::write_secret_by, failure::Failure};

/// An API key.
pub struct ApiKey(String);

impl fmt::Debug for ApiKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    /// The key, to be sent to the mesh or shown to its owner.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// SHA-256 of the key, hex: what the mesh stores.
    pub fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.0.as_bytes()))
    }
}

/// Reads the key; none if there is none yet.
pub fn read(path: &Path) -> Result<Option<ApiKey>, Failure> {
    let failed = |error| Failure::local(format!("cannot read {}", path.display()), error);
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let key = text.trim();
    if !is_api_key(key) {
        return Err(Failure::Unfit(format!(
            "{} holds no API key: remove it to get a new one",
            path.display()
        )));
    }
    Ok(Some(ApiKey(key.to_owned())))
}

/// Reads the key, or makes one by way of `temporary`.
pub fn ensure(path: &Path, temporary: &Path) -> Result<ApiKey, Failure> {
    let failed = |error| Failure::local(format!("cannot write {}", path.display()), error);
    if let Some(key) = read(path)? {
        // Somebody may have opened it up since.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        return Ok(key);
    }
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|error| failed(io::Error::other(error)))?;
    let key = ApiKey(format!("osb_{}", hex::encode(random)));
    write_secret_by(temporary, path, format!("{}\n", key.0).as_bytes()).map_err(failed)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_and_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api-key");
        assert!(read(&path).unwrap().is_none());
        let temporary = directory.path().join("temporary");
        let key = ensure(&path, &temporary).unwrap();
        assert!(!temporary.exists());
        assert!(is_api_key(key.expose()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(ensure(&path, &temporary).unwrap().expose(), key.expose());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!format!("{key:?}").contains("osb_"));
        fs::write(&path, "garbage").unwrap();
        assert!(matches!(ensure(&path, &temporary), Err(Failure::Unfit(_))));
    }

    #[test]
    fn the_hash_is_sha_256() {
        let hash = ApiKey("abc".to_owned()).hash();
        // FIPS 180-2, appendix B.1.
        assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}

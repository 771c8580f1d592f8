//! API keys: `osb_` and 64 hex digits, 256 random bits. Only their SHA-256 is ever stored; with that much entropy a
//! slow hash would add nothing.

use std::{fmt, str::FromStr};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use thiserror::Error;
use zeroize::Zeroizing;

const PREFIX: &str = "osb_";

/// An API key in clear. Shows nothing of itself in logs.
#[derive(Clone)]
pub struct ApiKey(Zeroizing<String>);

/// The text has not the shape of a key.
#[derive(Debug, Error)]
#[error("an API key is osb_ and 64 hex digits")]
pub struct ApiKeyError;

impl ApiKey {
    /// Makes a new key from the system's randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = Zeroizing::new([0u8; 32]);
        getrandom::fill(bytes.as_mut())?;
        Ok(Self(Zeroizing::new(format!("{PREFIX}{}", hex::encode(*bytes)))))
    }

    /// The key in clear: to hand out once.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// SHA-256 of the whole key, lower-case hex: the name of its record.
    pub fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.0.as_bytes()))
    }

    /// First 16 digits of the hash: names the key where it may be shown.
    pub fn key_id(&self) -> String {
        key_id(&self.hash()).into()
    }
}

/// The short name of the key with this hash.
pub fn key_id(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

/// Compares two hashes in a time that does not depend on where they differ.
pub fn hashes_equal(left: &str, right: &str) -> bool {
    left.as_bytes().ct_eq(right.as_bytes()).into()
}

impl FromStr for ApiKey {
    type Err = ApiKeyError;

    fn from_str(text: &str) -> Result<Self, ApiKeyError> {
        let digits = text.strip_prefix(PREFIX).ok_or(ApiKeyError)?;
        if digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            Ok(Self(Zeroizing::new(text.into())))
        } else {
            Err(ApiKeyError)
        }
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_parsed_hashed_and_hidden() {
        let key = ApiKey::generate().unwrap();
        let again: ApiKey = key.expose().parse().unwrap();
        assert_eq!(key.hash(), again.hash());
        assert_eq!(key.hash().len(), 64);
        assert_eq!(key.key_id(), key.hash()[..16]);
        assert!(!format!("{key:?}").contains(&key.expose()[4..]));
        assert!(hashes_equal(&key.hash(), &again.hash()));
        assert!(!hashes_equal(&key.hash(), &ApiKey::generate().unwrap().hash()));
    }

    #[test]
    fn other_shapes_are_refused() {
        for text in
            ["", "osb_", "osb_zz", &format!("osb_{}", "g".repeat(64)), &format!("key_{}", "0".repeat(64))]
        {
            assert!(text.parse::<ApiKey>().is_err(), "{text}");
        }
    }
}

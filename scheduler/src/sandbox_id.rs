//! What names a sandbox: `sb-` and 20 random characters of `[0-9a-z]`, about 103 bits. Nobody guesses one, and none is
//! ever given twice.

use std::{fmt, str::FromStr};

use thiserror::Error;

const PREFIX: &str = "sb-";
const LEN: usize = 20;
const ALPHABET: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
/// Random bytes from here on are thrown away, so that every character is equally likely: the largest multiple of 36
/// that a byte holds.
const FAIR_BYTES: u8 = 252;

/// A sandbox's ID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxId(String);

/// The text names no sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a sandbox ID is sb- and 20 characters of [0-9a-z]")]
pub struct SandboxIdError;

impl SandboxId {
    /// Makes a new one from the system's randomness.
    ///
    /// # Errors
    ///
    /// The system has no randomness to give.
    pub fn generate() -> Result<Self, getrandom::Error> {
        random(PREFIX).map(Self)
    }

    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A new ID of anything: `prefix` and 20 random characters.
///
/// # Errors
///
/// The system has no randomness to give.
pub fn random(prefix: &str) -> Result<String, getrandom::Error> {
    let mut id = String::with_capacity(prefix.len() + LEN);
    id.push_str(prefix);
    let mut bytes = [0u8; 32];
    while id.len() < prefix.len() + LEN {
        getrandom::fill(&mut bytes)?;
        let fair = bytes.iter().filter(|byte| **byte < FAIR_BYTES);
        let missing = prefix.len() + LEN - id.len();
        id.extend(fair.take(missing).map(|byte| char::from(ALPHABET[usize::from(byte % 36)])));
    }
    Ok(id)
}

/// Whether [`random`] could have made `text`.
pub fn is_random(prefix: &str, text: &str) -> bool {
    text.strip_prefix(prefix)
        .is_some_and(|random| random.len() == LEN && random.bytes().all(|byte| ALPHABET.contains(&byte)))
}

impl FromStr for SandboxId {
    type Err = SandboxIdError;

    fn from_str(text: &str) -> Result<Self, SandboxIdError> {
        if is_random(PREFIX, text) { Ok(Self(text.into())) } else { Err(SandboxIdError) }
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn generated_ids_parse_and_differ() {
        let ids: HashSet<SandboxId> = (0..1000).map(|_| SandboxId::generate().unwrap()).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            assert_eq!(id.as_str().parse(), Ok(id.clone()));
        }
    }

    #[test]
    fn every_character_occurs() {
        let used: HashSet<char> = (0..500)
            .flat_map(|_| SandboxId::generate().unwrap().0[3..].chars().collect::<Vec<_>>())
            .collect();
        assert_eq!(used.len(), ALPHABET.len());
    }

    #[test]
    fn other_texts_are_refused() {
        let long = format!("sb-{}", "a".repeat(21));
        for text in ["", "sb-", "sb-short", "sb-0123456789ABCDEFGHIJ", "xx-0123456789abcdefghij", &long] {
            assert_eq!(text.parse::<SandboxId>(), Err(SandboxIdError), "{text}");
        }
    }
}

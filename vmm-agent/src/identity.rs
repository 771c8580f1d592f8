//! Names of what the agent works on, parsed once where they come in.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Names a sandbox: lower-case letters, digits and hyphens, 64 at most.
///
/// The agent never makes a file name of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

/// A text that names no sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox ID is 1 to 64 lower-case letters, digits and hyphens")]
pub struct InvalidSandboxId;

impl SandboxId {
    const MAX_LEN: usize = 64;

    /// Parses an ID.
    ///
    /// # Errors
    ///
    /// [`InvalidSandboxId`] for anything but 1 to 64 of `[a-z0-9-]`.
    pub fn parse(text: impl Into<String>) -> Result<Self, InvalidSandboxId> {
        let text = text.into();
        let fits = (1..=Self::MAX_LEN).contains(&text.len());
        if fits && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
            Ok(Self(text))
        } else {
            Err(InvalidSandboxId)
        }
    }

    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SandboxId {
    type Error = InvalidSandboxId;

    fn try_from(text: String) -> Result<Self, InvalidSandboxId> {
        Self::parse(text)
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> Self {
        id.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Counts a sandbox's placements and its deletion; the scheduler makes it grow, the host only compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_short_and_plain() {
        assert_eq!(SandboxId::parse("sb-0a1b2c").unwrap().as_str(), "sb-0a1b2c");
        for bad in ["", "sb/..", "SB-1", "sb 1", "sb-\0", "sb-é", &"x".repeat(65)] {
            assert_eq!(SandboxId::parse(bad), Err(InvalidSandboxId), "{bad:?}");
        }
    }
}

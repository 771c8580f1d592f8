//! Tokens that requests to a sandbox's ports must show. Only their SHA-256 is stored, as of API keys; with the entropy that
//! ours have a slow hash would add nothing, and whoever brings a token of their own is asked for 16 characters.

use std::fmt;

use oc_proto::v1::PreviewAuth;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{refusal::Refusal, validate::Invalid};

/// The only way of asking for a token.
pub const SCHEME: &str = "bearer";
/// What tokens begin with that are made here.
const PREFIX: &str = "ocp_";
/// Lengths of tokens that callers bring.
const LENGTHS: std::ops::RangeInclusive<usize> = 16..=256;

/// A token in clear. Shows nothing of itself in logs.
#[derive(Clone)]
pub struct Token(Zeroizing<String>);

impl Token {
    /// The token that is asked for: a given one, or a new one.
    ///
    /// # Errors
    ///
    /// [`Invalid::PreviewScheme`], [`Invalid::PreviewToken`]; no randomness can be had.
    pub fn asked(auth: &PreviewAuth) -> Result<Self, Refusal> {
        if !auth.scheme.is_empty() && auth.scheme != SCHEME {
            return Err(Invalid::PreviewScheme(auth.scheme.clone()).into());
        }
        match auth.token.as_str() {
            "" | "auto" => Self::generate(),
            token if LENGTHS.contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Ok(Self(Zeroizing::new(token.to_owned())))
            }
            _ => Err(Invalid::PreviewToken.into()),
        }
    }

    /// A new token.
    ///
    /// # Errors
    ///
    /// No randomness can be had.
    pub fn generate() -> Result<Self, Refusal> {
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(bytes.as_mut()).map_err(|error| Refusal::Internal(error.to_string()))?;
        Ok(Self(Zeroizing::new(format!("{PREFIX}{}", hex::encode(*bytes)))))
    }

    /// What is stored of it.
    pub fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.0.as_bytes()))
    }

    /// The token itself, to hand out once.
    pub fn into_text(self) -> String {
        self.0.to_string()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(scheme: &str, token: &str) -> Result<Token, Refusal> {
        Token::asked(&PreviewAuth { scheme: scheme.into(), token: token.into() })
    }

    #[test]
    fn a_token_is_made_or_brought_and_long_enough() {
        let made = asked("bearer", "auto").unwrap();
        assert_ne!(made.hash(), asked("", "").unwrap().hash());
        assert!(!format!("{made:?}").contains("ocp_"));
        assert_eq!(made.hash().len(), 64);
        assert_eq!(asked("", "0123456789abcdef").unwrap().into_text(), "0123456789abcdef");
        let long = "x".repeat(257);
        for wrong in ["0123456789abcde", "0123456789 abcdef", "0123456789abcdef\n", long.as_str()] {
            assert!(asked("bearer", wrong).is_err(), "{wrong}");
        }
        assert!(asked("basic", "auto").is_err());
    }
}

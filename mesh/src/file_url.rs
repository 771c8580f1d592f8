//! URLs that are good for one file without a credential: what is signed of them, and how it is written.
//!
//! They are signed with the key that signs tokens (see [`token`](crate::token)) and never mistaken for one: what is signed
//! begins as no token does. The signature binds what the URL does not say, too: whom the sandbox belongs to.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use oc_proto::mesh::TokenVerifyingKey;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::{
    store::SharedStore,
    token::{self, TokenError, TokenVerifier},
    view::View,
};

/// What every signed text begins with. A token's is base64, and has no line ends.
const PURPOSE: &str = "oc-file-url-v1";
/// Clocks of scheduler and gateway may differ by this much.
const LEEWAY: Duration = Duration::from_secs(5);
/// What stays readable in a query.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// What a URL lets its holder do with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
}

/// What a URL is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant<'a> {
    /// Reading or writing.
    pub access: Access,
    /// The tenant whom the sandbox belongs to.
    pub tenant: &'a str,
    /// The sandbox.
    pub sandbox_id: &'a str,
    /// The file, as the URL names it.
    pub path: &'a str,
    /// When it expires, seconds since 1970.
    pub expires: u64,
}

impl Grant<'_> {
    /// What is signed. Only the path, which comes last, may have any character in it.
    fn text(&self) -> String {
        let Self { tenant, sandbox_id, path, expires, .. } = self;
        let access = match self.access {
            Access::Read => "read",
            Access::Write => "write",
        };
        format!("{PURPOSE}\n{access}\n{tenant}\n{sandbox_id}\n{expires}\n{path}")
    }
}

/// Signs URLs.
#[derive(Debug)]
pub struct FileUrlSigner(Ed25519KeyPair);

impl FileUrlSigner {
    /// Signs with the newest key in the store; makes the first one if there is none.
    ///
    /// # Errors
    ///
    /// The keys cannot be had, or used.
    pub async fn ensure(store: &SharedStore) -> Result<Self, TokenError> {
        let key = token::newest_key(store).await?;
        let pair = Ed25519KeyPair::from_pkcs8(&key.private_key)
            .map_err(|error| TokenError::Signing(error.to_string()))?;
        Ok(Self(pair))
    }

    /// The query of a URL that is good for this.
    #[must_use]
    pub fn query(&self, grant: &Grant<'_>) -> String {
        let signature = BASE64_URL_SAFE_NO_PAD.encode(self.0.sign(grant.text().as_bytes()));
        let path = utf8_percent_encode(grant.path, PLAIN);
        format!("path={path}&expires={}&signature={signature}", grant.expires)
    }
}

/// Verifies what URLs say.
#[derive(Clone, Debug)]
pub struct FileUrlVerifier(View<TokenVerifyingKey>);

impl FileUrlVerifier {
    /// Verifies with the keys that tokens are verified with.
    #[must_use]
    pub fn new(tokens: &TokenVerifier) -> Self {
        Self(tokens.keys().clone())
    }

    /// Whether `signature` is ours and stands for `grant`, and `grant` is still good.
    ///
    /// # Errors
    ///
    /// [`TokenError::Invalid`]; [`TokenError::Expired`] of what was good once.
    pub fn verify(&self, grant: &Grant<'_>, signature: &str, now: SystemTime) -> Result<(), TokenError> {
        let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Invalid)?;
        let text = grant.text();
        // It does not say which key: there are one or two.
        let is_ours = self.0.all().iter().any(|(_, key)| {
            UnparsedPublicKey::new(&ED25519, &key.public_key).verify(text.as_bytes(), &signature).is_ok()
        });
        if !is_ours {
            return Err(TokenError::Invalid);
        }
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let until = Duration::from_secs(grant.expires).saturating_add(LEEWAY);
        if now >= until { Err(TokenError::Expired) } else { Ok(()) }
    }
}

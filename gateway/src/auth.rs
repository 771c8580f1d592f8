//! Who is calling.
//!
//! A credential is an API key (`osb_` and 64 hex digits) or a sandbox's token (a JWT, told by its two dots). The
//! published clients put either in any place, so every place takes both: `X-API-Key`, `Authorization: Bearer`,
//! `?api_key=` and `?token=`. Pages cannot set headers of a WebSocket, and what stands in a query is easily logged on the
//! way, so there is one more place for them: the subprotocol `oc.bearer.CREDENTIAL`, offered beside the one that is
//! wanted. The first of these that is there decides; a wrong one is not made good by another.
//!
//! | | answer |
//! | --- | --- |
//! | no credential | 401 `UNAUTHENTICATED` |
//! | unknown key, malformed or forged token | 403 `INVALID_CREDENTIALS` |
//! | expired token | 401 `TOKEN_EXPIRED` |
//! | token where a key is needed | 403 `INVALID_CREDENTIALS` |
//! | token of another sandbox | 403 `WRONG_SANDBOX` |
//! | key without administration where that is needed | 403 `NOT_ADMIN` |
//!
//! Credentials are never logged, and neither is the query of a request, which may hold one.

pub mod file_url;
pub mod keys;

use std::sync::Arc;

use http::{
    HeaderMap,
    header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
};
use oc_mesh::{
    clock::Clock,
    error::{Reason, status},
    token::{TokenError, TokenVerifier},
};
use tonic::Status;

use crate::{
    auth::keys::ApiKeys,
    rest::request::unescape,
    sandboxes::{could_be_an_id, not_found},
    surface::{Access, Rpc},
};

/// Longest credential that is looked at.
const MAX_CREDENTIAL: usize = 4096;

/// Begins a subprotocol that is a credential.
const BEARER_PROTOCOL: &str = "oc.bearer.";

/// A caller whose credential was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// Holds an API key.
    Key {
        /// Whom the key belongs to.
        tenant: String,
        /// Whether it may manage keys and see the hosts.
        admin: bool,
    },
    /// Holds a token for one sandbox.
    Sandbox {
        /// Whom the sandbox belongs to.
        tenant: String,
        /// The only sandbox that the token is for.
        sandbox_id: String,
    },
}

impl Identity {
    /// On whose behalf the caller acts.
    #[must_use]
    pub fn tenant(&self) -> &str {
        match self {
            Self::Key { tenant, .. } | Self::Sandbox { tenant, .. } => tenant,
        }
    }

    /// Whether the caller may call this RPC at all.
    ///
    /// # Errors
    /// `NOT_ADMIN` or `INVALID_CREDENTIALS`.
    pub fn may_call(&self, rpc: &Rpc) -> Result<(), Status> {
        match (self, rpc.access) {
            (Self::Key { admin: true, .. }, _)
            | (Self::Key { .. }, Access::Tenant | Access::Sandbox)
            | (Self::Sandbox { .. }, Access::Sandbox) => Ok(()),
            (Self::Key { .. }, Access::Admin) => {
                Err(status(Reason::NotAdmin, "this call needs an administrator's API key"))
            }
            (Self::Sandbox { .. }, Access::Tenant | Access::Admin) => Err(status(
                Reason::InvalidCredentials,
                "this call needs an API key; a sandbox's token is not enough",
            )),
        }
    }

    /// Whether the caller may name this sandbox. Whose it is, is checked where its record is read.
    ///
    /// # Errors
    /// `WRONG_SANDBOX`; `SANDBOX_NOT_FOUND` for what names none.
    pub fn may_name(&self, sandbox: &str) -> Result<(), Status> {
        match self {
            Self::Sandbox { sandbox_id, .. } if sandbox_id != sandbox => {
                Err(status(Reason::WrongSandbox, "the token is for another sandbox"))
            }
            _ if !could_be_an_id(sandbox) => Err(not_found()),
            _ => Ok(()),
        }
    }
}

/// Verifies credentials.
#[derive(Debug)]
pub struct Authenticator {
    keys: ApiKeys,
    tokens: TokenVerifier,
    clock: Arc<dyn Clock>,
}

impl Authenticator {
    /// Verifies API keys by `keys` and tokens by `tokens`, at the time that `clock` tells.
    #[must_use]
    pub fn new(keys: ApiKeys, tokens: TokenVerifier, clock: Arc<dyn Clock>) -> Self {
        Self { keys, tokens, clock }
    }

    /// Says who sent a request with these headers and this query.
    ///
    /// # Errors
    /// `UNAUTHENTICATED`, `INVALID_CREDENTIALS`, `TOKEN_EXPIRED`; `HOST_UNAVAILABLE` or `OVERLOADED` if a key
    /// cannot be looked up now.
    pub async fn identify(&self, headers: &HeaderMap, query: Option<&str>) -> Result<Identity, Status> {
        let credential = credential(headers, query)?
            .ok_or_else(|| status(Reason::Unauthenticated, "an API key or a sandbox's token is needed"))?;
        if credential.len() > MAX_CREDENTIAL {
            return Err(invalid());
        }
        if credential.bytes().filter(|byte| *byte == b'.').count() == 2 {
            return self.by_token(&credential);
        }
        let record = self.keys.find(&credential).await?.ok_or_else(invalid)?;
        Ok(Identity::Key { tenant: record.tenant.clone(), admin: record.admin })
    }

    fn by_token(&self, token: &str) -> Result<Identity, Status> {
        match self.tokens.verify(token, self.clock.now()) {
            Ok(claims) => Ok(Identity::Sandbox { tenant: claims.sub, sandbox_id: claims.sandbox_id }),
            Err(TokenError::Expired) => Err(status(Reason::TokenExpired, "the token has expired")),
            Err(_) => Err(invalid()),
        }
    }
}

fn invalid() -> Status {
    status(Reason::InvalidCredentials, "the API key or token is not valid")
}

/// The credential of a request, from the first place that has one.
///
/// # Errors
/// `INVALID_CREDENTIALS` if it is not text.
fn credential(headers: &HeaderMap, query: Option<&str>) -> Result<Option<String>, Status> {
    if let Some(value) = headers.get("x-api-key").filter(|value| !value.is_empty()) {
        return value.to_str().map(|text| Some(text.trim().to_owned())).map_err(|_| invalid());
    }
    if let Some(value) = headers.get(AUTHORIZATION) {
        let text = value.to_str().map_err(|_| invalid())?.trim();
        return match text.split_once(' ') {
            Some((scheme, credential)) if scheme.eq_ignore_ascii_case("bearer") => {
                Ok(Some(credential.trim().to_owned()))
            }
            _ => Err(invalid()),
        };
    }
    let pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    for (name, value) in pairs {
        if matches!(name, "api_key" | "token") && !value.is_empty() {
            return unescape(value).map(Some).ok_or_else(invalid);
        }
    }
    for value in headers.get_all(SEC_WEBSOCKET_PROTOCOL) {
        let offered = value.to_str().map_err(|_| invalid())?.split(',');
        if let Some(credential) = offered.filter_map(|one| one.trim().strip_prefix(BEARER_PROTOCOL)).next() {
            return Ok(Some(credential.to_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn found(headers: &[(&'static str, &'static str)], query: &str) -> Result<Option<String>, Status> {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
            .collect();
        credential(&headers, Some(query))
    }

    #[test]
    fn every_place_is_looked_at_in_order() {
        let all = [("x-api-key", "a"), ("authorization", "Bearer b")];
        assert_eq!(found(&all, "api_key=c").unwrap().as_deref(), Some("a"));
        assert_eq!(found(&all[1..], "api_key=c").unwrap().as_deref(), Some("b"));
        assert_eq!(found(&[("authorization", "bearer  b ")], "").unwrap().as_deref(), Some("b"));
        assert_eq!(found(&[], "path=/x&token=t.t.t&api_key=c").unwrap().as_deref(), Some("t.t.t"));
        assert_eq!(found(&[("x-api-key", "")], "api_key=c%2B").unwrap().as_deref(), Some("c+"));
        assert_eq!(found(&[], "path=/x&api_key=").unwrap(), None);
        let offered = [("sec-websocket-protocol", "oc.v1.exec, oc.bearer.t.t.t")];
        assert_eq!(found(&offered, "").unwrap().as_deref(), Some("t.t.t"));
        assert_eq!(found(&offered, "token=q").unwrap().as_deref(), Some("q"));
        assert_eq!(found(&[("sec-websocket-protocol", "oc.raw")], "").unwrap(), None);
    }

    #[test]
    fn another_scheme_is_a_wrong_credential_not_a_missing_one() {
        assert!(found(&[("authorization", "Basic Yjpi")], "").is_err());
        assert!(found(&[("authorization", "Bearer")], "").is_err());
        assert!(found(&[], "token=%ff").is_err());
    }
}

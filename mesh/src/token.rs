//! Sandbox tokens: JWTs signed with Ed25519, for one sandbox, for 15 minutes. The scheduler signs, every gateway
//! verifies; the key pair is in the store, the private half under a prefix of its own, so that an etcd role can keep
//! gateways from reading it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use oc_proto::mesh::{TokenSigningKey, TokenVerifyingKey};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::{
    keys, record,
    store::{Compare, SharedStore, StoreError, Txn, TxnOutcome},
    view::View,
};

/// How long a token is accepted.
pub const LIFETIME: Duration = Duration::from_secs(15 * 60);
/// Clocks of scheduler and gateway may differ by this much.
const LEEWAY: Duration = Duration::from_secs(5);
const ISSUER: &str = "opencomputer";
const AUDIENCE: &str = "sandbox";
/// Longest token that is looked at, bytes.
const MAX_TOKEN: usize = 4096;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Always `opencomputer`.
    pub iss: String,
    /// Always `sandbox`.
    pub aud: String,
    /// The tenant whom the sandbox belongs to.
    pub sub: String,
    /// The sandbox.
    pub sandbox_id: String,
    /// When it was signed, seconds since 1970.
    pub iat: u64,
    /// When it expires, seconds since 1970.
    pub exp: u64,
}

/// Why a token is not accepted.
#[derive(Debug, Error)]
pub enum TokenError {
    /// It was valid once.
    #[error("token has expired")]
    Expired,
    /// It is not one of ours.
    #[error("token is not valid")]
    Invalid,
    /// It could not be signed.
    #[error("token could not be signed: {0}")]
    Signing(String),
    /// The keys could not be had.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Signs tokens.
pub struct TokenSigner {
    key_id: String,
    key: EncodingKey,
}

impl std::fmt::Debug for TokenSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenSigner").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

impl TokenSigner {
    /// Signs with the newest key in the store; makes the first one if there is none.
    pub async fn ensure(store: &SharedStore) -> Result<Self, TokenError> {
        let key = newest_key(store).await?;
        Ok(Self { key_id: key.key_id, key: EncodingKey::from_ed_der(&key.private_key) })
    }

    /// A token for `sandbox_id` of `tenant`, and when it expires.
    pub fn sign(
        &self,
        tenant: &str,
        sandbox_id: &str,
        now: SystemTime,
    ) -> Result<(String, SystemTime), TokenError> {
        let expires = now + LIFETIME;
        let claims = Claims {
            iss: ISSUER.into(),
            aud: AUDIENCE.into(),
            sub: tenant.into(),
            sandbox_id: sandbox_id.into(),
            iat: seconds(now),
            exp: seconds(expires),
        };
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = Some(self.key_id.clone());
        let token = jsonwebtoken::encode(&header, &claims, &self.key)
            .map_err(|error| TokenError::Signing(error.to_string()))?;
        Ok((token, expires))
    }
}

/// The newest key in the store; makes the first one if there is none.
pub(crate) async fn newest_key(store: &SharedStore) -> Result<TokenSigningKey, TokenError> {
    loop {
        let (keys, _) = record::list::<TokenSigningKey>(store.as_ref(), keys::TOKEN_SIGNING).await?;
        let newest = keys.into_iter().map(|(_, key, _)| key).max_by_key(|key| {
            let created = key.created_at.unwrap_or_default();
            (created.seconds, created.nanos)
        });
        match newest {
            Some(key) => return Ok(key),
            None => make_key_pair(store).await?,
        }
    }
}

/// Makes the first key pair, unless another scheduler does so at the same moment: the key named `1` can be made once.
async fn make_key_pair(store: &SharedStore) -> Result<(), TokenError> {
    const FIRST: &str = "1";
    let broken = |_| TokenError::Signing("key pair could not be made".into());
    let pair = Ed25519KeyPair::generate().map_err(broken)?;
    let private_key = pair.to_pkcs8v1().map_err(broken)?.as_ref().to_vec();
    let signing = TokenSigningKey {
        key_id: FIRST.into(),
        private_key,
        created_at: Some(prost_types::Timestamp::from(SystemTime::now())),
    };
    let verify = TokenVerifyingKey { key_id: FIRST.into(), public_key: pair.public_key().as_ref().to_vec() };
    let txn = Txn {
        compare: vec![Compare::Absent(keys::token_signing(FIRST))],
        then: vec![
            record::put(keys::token_signing(FIRST), &signing),
            record::put(keys::token_verify(FIRST), &verify),
        ],
    };
    match store.txn(txn).await? {
        TxnOutcome::Committed(_) | TxnOutcome::Conflict => Ok(()),
    }
}

/// Verifies tokens.
#[derive(Clone, Debug)]
pub struct TokenVerifier {
    keys: View<TokenVerifyingKey>,
    validation: Arc<Validation>,
}

impl TokenVerifier {
    /// Follows the public keys in the store until `cancel`.
    pub async fn start(store: SharedStore, cancel: CancellationToken) -> Result<Self, TokenError> {
        let keys = View::start(store, keys::TOKEN_VERIFY, cancel).await?;
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[ISSUER]);
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["iss", "aud", "sub", "exp"]);
        // Compared below with the time that we are given.
        validation.validate_exp = false;
        Ok(Self { keys, validation: Arc::new(validation) })
    }

    /// The public keys.
    pub(crate) fn keys(&self) -> &View<TokenVerifyingKey> {
        &self.keys
    }

    /// What a valid token says.
    pub fn verify(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Invalid);
        }
        let invalid = |_| TokenError::Invalid;
        let key_id = jsonwebtoken::decode_header(token).map_err(invalid)?.kid.ok_or(TokenError::Invalid)?;
        let key = self.keys.get(&key_id).ok_or(TokenError::Invalid)?;
        let key = DecodingKey::from_ed_der(&key.public_key);
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &self.validation).map_err(invalid)?.claims;
        if seconds(now) >= claims.exp.saturating_add(LEEWAY.as_secs()) {
            return Err(TokenError::Expired);
        }
        Ok(claims)
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

//! Sandbox tokens, and what is none.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use oc_mesh::{
    keys, record,
    store::{SharedStore, Txn},
    token::{Claims, LIFETIME, TokenError, TokenSigner, TokenVerifier},
};
use oc_proto::mesh::{TokenSigningKey, TokenVerifyingKey};
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{store, until};

/// `{"typ":"JWT","alg":"none","kid":"1"}`.
const HEADER_NONE: &str = "eyJ0eXAiOiJKV1QiLCJhbGciOiJub25lIiwia2lkIjoiMSJ9";

struct Mesh {
    store: SharedStore,
    signer: TokenSigner,
    verifier: TokenVerifier,
    _cancel: DropGuard,
    _directory: TempDir,
}

async fn mesh() -> Mesh {
    let (store, directory) = store().await;
    let signer = TokenSigner::ensure(&store).await.unwrap();
    let cancel = CancellationToken::new();
    let verifier = TokenVerifier::start(Arc::clone(&store), cancel.clone()).await.unwrap();
    Mesh { store, signer, verifier, _cancel: cancel.drop_guard(), _directory: directory }
}

/// A whole second, so that what is signed and what is compared are the same.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(2_000_000_000)
}

fn claims() -> Claims {
    let seconds = 2_000_000_000;
    Claims {
        iss: "opencomputer".into(),
        aud: "sandbox".into(),
        sub: "acme".into(),
        sandbox_id: "sb-1".into(),
        iat: seconds,
        exp: seconds + LIFETIME.as_secs(),
    }
}

fn header(algorithm: Algorithm, key_id: &str) -> Header {
    Header { kid: Some(key_id.into()), ..Header::new(algorithm) }
}

/// The key that the mesh signs with.
async fn signing_key(store: &SharedStore) -> EncodingKey {
    let (key, _) =
        record::get::<TokenSigningKey>(store.as_ref(), &keys::token_signing("1")).await.unwrap().unwrap();
    EncodingKey::from_ed_der(&key.private_key)
}

fn is_invalid(result: &Result<Claims, TokenError>) -> bool {
    matches!(result, Err(TokenError::Invalid))
}

#[tokio::test]
async fn a_token_is_valid_until_it_expires() {
    let mesh = mesh().await;
    let (token, expires) = mesh.signer.sign("acme", "sb-1", now()).unwrap();
    assert_eq!(expires, now() + LIFETIME);
    assert_eq!(mesh.verifier.verify(&token, now()).unwrap(), claims());
    assert!(mesh.verifier.verify(&token, expires - Duration::from_secs(1)).is_ok());
    let late = mesh.verifier.verify(&token, expires + Duration::from_secs(6));
    assert!(matches!(late, Err(TokenError::Expired)), "{late:?}");
    // The same key for whoever asks next, and for another scheduler at the same moment.
    let again = TokenSigner::ensure(&mesh.store).await.unwrap();
    let (token, _) = again.sign("acme", "sb-1", now()).unwrap();
    assert!(mesh.verifier.verify(&token, now()).is_ok());
}

#[tokio::test]
async fn schedulers_that_start_at_once_agree_on_one_key() {
    let (store, _directory) = store().await;
    let signers = futures_util::future::join_all((0..8).map(|_| TokenSigner::ensure(&store))).await;
    let verifier = TokenVerifier::start(Arc::clone(&store), CancellationToken::new()).await.unwrap();
    for signer in signers {
        let (token, _) = signer.unwrap().sign("acme", "sb-1", now()).unwrap();
        assert!(verifier.verify(&token, now()).is_ok());
    }
}

#[tokio::test]
async fn what_others_signed_is_invalid() {
    let (mesh, other) = (mesh().await, mesh().await);
    let (token, _) = other.signer.sign("acme", "sb-1", now()).unwrap();
    let verified = mesh.verifier.verify(&token, now());
    assert!(is_invalid(&verified), "another mesh's key of the same name: {verified:?}");
    let key = signing_key(&mesh.store).await;
    for key_id in ["2", "", "../keys/1", "1\0"] {
        let token = jsonwebtoken::encode(&header(Algorithm::EdDSA, key_id), &claims(), &key).unwrap();
        assert!(is_invalid(&mesh.verifier.verify(&token, now())), "{key_id:?}");
    }
    let token = jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims(), &key).unwrap();
    assert!(is_invalid(&mesh.verifier.verify(&token, now())), "no key named");
}

#[tokio::test]
async fn claims_for_something_else_are_invalid() {
    let mesh = mesh().await;
    let key = signing_key(&mesh.store).await;
    let sign = |claims: &serde_json::Value| {
        jsonwebtoken::encode(&header(Algorithm::EdDSA, "1"), claims, &key).unwrap()
    };
    let good = serde_json::to_value(claims()).unwrap();
    assert!(mesh.verifier.verify(&sign(&good), now()).is_ok());
    for (claim, value) in [("iss", "other"), ("aud", "gateway"), ("iss", ""), ("aud", "")] {
        let mut claims = good.clone();
        claims[claim] = value.into();
        assert!(is_invalid(&mesh.verifier.verify(&sign(&claims), now())), "{claim} {value:?}");
    }
    for claim in ["iss", "aud", "sub", "sandbox_id", "iat", "exp"] {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(claim);
        assert!(is_invalid(&mesh.verifier.verify(&sign(&claims), now())), "without {claim}");
    }
}

#[tokio::test]
async fn other_algorithms_are_invalid() {
    let mesh = mesh().await;
    let (token, _) = mesh.signer.sign("acme", "sb-1", now()).unwrap();
    let [_, claims_part, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("{token}") };
    for forged in [
        format!("{HEADER_NONE}.{claims_part}."),
        format!("{HEADER_NONE}.{claims_part}"),
        format!("{HEADER_NONE}.{claims_part}.{signature}"),
    ] {
        assert!(is_invalid(&mesh.verifier.verify(&forged, now())), "{forged}");
    }
    // The public key as the secret of a symmetric signature.
    let (public, _) = record::get::<TokenVerifyingKey>(mesh.store.as_ref(), &keys::token_verify("1"))
        .await
        .unwrap()
        .unwrap();
    let secret = EncodingKey::from_secret(&public.public_key);
    for algorithm in [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512] {
        let forged = jsonwebtoken::encode(&header(algorithm, "1"), &claims(), &secret).unwrap();
        assert!(is_invalid(&mesh.verifier.verify(&forged, now())), "{algorithm:?}");
    }
}

#[tokio::test]
async fn a_changed_token_is_invalid() {
    let mesh = mesh().await;
    let (token, _) = mesh.signer.sign("acme", "sb-1", now()).unwrap();
    for at in 0..token.len() {
        let mut bytes = token.clone().into_bytes();
        bytes[at] = match bytes[at] {
            b'A' => b'Q',
            b'.' => b'_',
            _ => b'A',
        };
        let changed = String::from_utf8(bytes).unwrap();
        let verified = mesh.verifier.verify(&changed, now());
        assert!(is_invalid(&verified), "byte {at}: {verified:?}");
    }
    for text in
        ["", ".", "..", "...", "a.b.c", "ü.ü.ü", &token[1..], &format!("{token}."), &"x".repeat(1 << 20)]
    {
        assert!(is_invalid(&mesh.verifier.verify(text, now())));
    }
}

#[tokio::test]
async fn keys_rotate() {
    let mesh = mesh().await;
    let (old, _) = mesh.signer.sign("acme", "sb-1", now()).unwrap();
    // A newer pair, as an operator writes it.
    let pair = Ed25519KeyPair::generate().unwrap();
    let signing = TokenSigningKey {
        key_id: "2".into(),
        private_key: pair.to_pkcs8v1().unwrap().as_ref().to_vec(),
        created_at: Some(prost_types::Timestamp::from(SystemTime::now() + Duration::from_secs(60))),
    };
    let verify = TokenVerifyingKey { key_id: "2".into(), public_key: pair.public_key().as_ref().to_vec() };
    let then =
        vec![record::put(keys::token_signing("2"), &signing), record::put(keys::token_verify("2"), &verify)];
    mesh.store.txn(Txn { compare: vec![], then }).await.unwrap();
    let (new, _) = TokenSigner::ensure(&mesh.store).await.unwrap().sign("acme", "sb-1", now()).unwrap();
    assert_eq!(jsonwebtoken::decode_header(&new).unwrap().kid.as_deref(), Some("2"));
    until("the new key to be accepted", async || mesh.verifier.verify(&new, now()).is_ok()).await;
    assert!(mesh.verifier.verify(&old, now()).is_ok(), "tokens of the old key are good until they expire");
    let then = vec![oc_mesh::store::Op::Delete { key: keys::token_verify("1") }];
    mesh.store.txn(Txn { compare: vec![], then }).await.unwrap();
    until("the old key to be refused", async || is_invalid(&mesh.verifier.verify(&old, now()))).await;
    assert!(mesh.verifier.verify(&new, now()).is_ok());
}

#[test]
fn a_signer_hides_its_key() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mesh = runtime.block_on(mesh());
    assert_eq!(format!("{:?}", mesh.signer), "TokenSigner { key_id: \"1\", .. }");
}

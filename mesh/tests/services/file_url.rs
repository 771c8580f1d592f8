//! Signed URLs of files, and what is none.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use oc_mesh::{
    file_url::{Access, FileUrlSigner, FileUrlVerifier, Grant},
    token::{TokenError, TokenSigner, TokenVerifier},
};
use tokio_util::sync::CancellationToken;

use crate::store;

const EXPIRES: u64 = 2_000_000_000;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn grant() -> Grant<'static> {
    Grant { access: Access::Read, tenant: "acme", sandbox_id: "sb-1", path: "/a b/c", expires: EXPIRES }
}

fn signature(query: &str) -> &str {
    query.rsplit_once("signature=").unwrap().1
}

#[tokio::test]
async fn a_url_is_good_for_what_was_signed_until_it_expires_and_for_nothing_else() {
    let (store, _directory) = store().await;
    let signer = FileUrlSigner::ensure(&store).await.unwrap();
    // The same key as tokens have, whoever came first.
    let tokens = TokenSigner::ensure(&store).await.unwrap();
    let verifier = TokenVerifier::start(Arc::clone(&store), CancellationToken::new()).await.unwrap();
    let verifier = FileUrlVerifier::new(&verifier);
    let query = signer.query(&grant());
    assert!(query.starts_with(&format!("path=/a%20b/c&expires={EXPIRES}&signature=")), "{query}");
    let signed = signature(&query);
    verifier.verify(&grant(), signed, at(EXPIRES - 1)).unwrap();
    let late = verifier.verify(&grant(), signed, at(EXPIRES + 6));
    assert!(matches!(late, Err(TokenError::Expired)), "{late:?}");

    let is_invalid = |grant: Grant<'_>, signature: &str| {
        // What is not ours is not said to have been.
        let verified = verifier.verify(&grant, signature, at(EXPIRES + 6));
        assert!(matches!(verified, Err(TokenError::Invalid)), "{grant:?} {signature}: {verified:?}");
    };
    for other in [
        Grant { access: Access::Write, ..grant() },
        Grant { tenant: "other", ..grant() },
        Grant { sandbox_id: "sb-2", ..grant() },
        Grant { path: "/a b/d", ..grant() },
        Grant { path: "/a b//c", ..grant() },
        Grant { expires: EXPIRES + 1, ..grant() },
        // The same text, cut elsewhere.
        Grant { sandbox_id: "sb-1\n2000000000\n/a b/c", ..grant() },
    ] {
        is_invalid(other, signed);
    }
    let token = tokens.sign("acme", "sb-1", at(EXPIRES)).unwrap().0;
    let (_, of_token) = token.rsplit_once('.').unwrap();
    let changed = format!("{}{}", if signed.starts_with('A') { 'B' } else { 'A' }, &signed[1..]);
    for other in ["", "AAAA", of_token, &signed[1..], &format!("{signed}="), &changed] {
        is_invalid(grant(), other);
    }
}

#[tokio::test]
async fn a_url_of_another_mesh_is_invalid() {
    let ((ours, _directory), (theirs, _other)) = (store().await, store().await);
    let query = FileUrlSigner::ensure(&theirs).await.unwrap().query(&grant());
    FileUrlSigner::ensure(&ours).await.unwrap();
    let verifier = TokenVerifier::start(Arc::clone(&ours), CancellationToken::new()).await.unwrap();
    let verified = FileUrlVerifier::new(&verifier).verify(&grant(), signature(&query), at(0));
    assert!(matches!(verified, Err(TokenError::Invalid)), "{verified:?}");
}

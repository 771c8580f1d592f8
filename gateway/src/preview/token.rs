//! The token that a sandbox's ports ask for.
//!
//! It comes as `X-OC-Preview-Token` or as `Authorization: Bearer`, and is compared by its hash in a time that does not depend on
//! where it differs. No token and a wrong one are answered alike. What was for us does not go on to the port: an
//! `Authorization` that is not our token is the port's own.

use http::{HeaderMap, HeaderName, header::AUTHORIZATION};
use oc_mesh::{
    api_key::hashes_equal,
    error::{Reason, status},
};
use sha2::{Digest as _, Sha256};
use tonic::Status;

/// The header that carries nothing else.
pub const TOKEN: HeaderName = HeaderName::from_static("x-oc-preview-token");
/// Longest token that is looked at; longer ones are not given.
const MAX_TOKEN: usize = 256;

/// Checks the token in `headers` against `hash`, lower-case hex, where an empty one asks for none. Takes out what was for us.
///
/// # Errors
/// `UNAUTHENTICATED`.
pub fn check(headers: &mut HeaderMap, hash: &str) -> Result<(), Status> {
    let given = headers.remove(TOKEN);
    if hash.is_empty() {
        return Ok(());
    }
    let is_right =
        |token: &[u8]| token.len() <= MAX_TOKEN && hashes_equal(&hex::encode(Sha256::digest(token)), hash);
    let is_given = given.is_some_and(|given| is_right(given.as_bytes()));
    // Looked at in any case: whoever gives it twice does not give it to the port.
    let is_bearer =
        headers.get(AUTHORIZATION).and_then(|value| bearer(value.as_bytes())).is_some_and(is_right);
    if is_bearer {
        headers.remove(AUTHORIZATION);
    }
    if is_given || is_bearer {
        return Ok(());
    }
    Err(status(
        Reason::Unauthenticated,
        "this preview needs its token, as `Authorization: Bearer` or as `X-OC-Preview-Token`",
    ))
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn the_right_token_opens_and_does_not_go_on() {
        let hash = hex::encode(Sha256::digest(b"0123456789abcdef"));
        let left = |pairs: &[_], hash: &str| {
            let mut headers = headers(pairs);
            check(&mut headers, hash).ok().map(|()| headers.keys().cloned().collect::<Vec<_>>())
        };
        assert_eq!(left(&[(TOKEN, "0123456789abcdef")], &hash), Some(vec![]));
        assert_eq!(left(&[(AUTHORIZATION, "Bearer 0123456789abcdef")], &hash), Some(vec![]));
        assert_eq!(left(&[(AUTHORIZATION, "bearer  0123456789abcdef")], &hash), Some(vec![]));
        let both = [(TOKEN, "0123456789abcdef"), (AUTHORIZATION, "Basic eDp5")];
        assert_eq!(left(&both, &hash), Some(vec![AUTHORIZATION]));
        let twice = [(TOKEN, "0123456789abcdef"), (AUTHORIZATION, "Bearer 0123456789abcdef")];
        assert_eq!(left(&twice, &hash), Some(vec![]));
        for wrong in [
            vec![],
            vec![(TOKEN, "0123456789abcdeg")],
            vec![(TOKEN, "")],
            vec![(AUTHORIZATION, "Basic 0123456789abcdef")],
            vec![(AUTHORIZATION, "Bearer")],
        ] {
            assert_eq!(left(&wrong, &hash), None, "{wrong:?}");
        }
        // Where none is asked for, the port's own credentials go on.
        assert_eq!(left(&both, ""), Some(vec![AUTHORIZATION]));
    }
}

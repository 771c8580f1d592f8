//! Who calls: verified once, by the gateway, and told to the parts behind it in metadata. Those parts listen where only
//! our own processes reach them, and the gateway strips these headers from what clients send.

use http::{HeaderMap, HeaderName, HeaderValue};
use thiserror::Error;

/// Names the sandbox of a data-plane call between gateway and agent.
pub const SANDBOX_ID_HEADER: &str = "oc-sandbox-id";
/// Names a request through all its hops.
pub const REQUEST_ID_HEADER: &str = "x-request-id";
/// Prefix of all headers that only our own parts may set.
pub const RESERVED_PREFIX: &str = "oc-";

const TENANT: HeaderName = HeaderName::from_static("oc-tenant");
const ADMIN: HeaderName = HeaderName::from_static("oc-admin");
const SANDBOX_TOKEN: HeaderName = HeaderName::from_static("oc-sandbox-token");
const PREVIEW_DOMAIN: HeaderName = HeaderName::from_static("oc-preview-domain");
const PUBLIC_URL: HeaderName = HeaderName::from_static("oc-public-url");
const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);

/// A verified caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Whom the call is for.
    pub tenant: String,
    /// Whether it came with an administrator's key.
    pub admin: bool,
    /// The sandbox whose token it came with; `None` for an API key.
    pub sandbox: Option<String>,
    /// URL by which the client reaches the gateway that it came through.
    pub public_url: String,
    /// Domain under which that gateway shows sandboxes' ports.
    pub preview_domain: String,
    /// Names the request.
    pub request_id: String,
}

/// The headers name no caller.
#[derive(Debug, Error)]
#[error("metadata {0} is missing or malformed: calls come through a gateway")]
pub struct CallerError(&'static str);

impl Caller {
    /// Writes the caller into request headers, in place of what stood there.
    ///
    /// What cannot stand in a header is left out, and then the call is refused where it arrives.
    pub fn apply(&self, headers: &mut HeaderMap) {
        let mut set = |name: HeaderName, value: &str| match HeaderValue::from_str(value) {
            Ok(value) => {
                headers.insert(name, value);
            }
            Err(_) => {
                headers.remove(name);
            }
        };
        set(TENANT, &self.tenant);
        set(PUBLIC_URL, &self.public_url);
        set(PREVIEW_DOMAIN, &self.preview_domain);
        set(REQUEST_ID, &self.request_id);
        set(ADMIN, if self.admin { "true" } else { "false" });
        match &self.sandbox {
            Some(sandbox) => set(SANDBOX_TOKEN, sandbox),
            None => {
                headers.remove(SANDBOX_TOKEN);
            }
        }
    }

    /// Reads the caller that [`apply`](Self::apply) wrote.
    pub fn from_headers(headers: &HeaderMap) -> Result<Self, CallerError> {
        let text =
            |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok()).map(String::from);
        Ok(Self {
            tenant: text(&TENANT).filter(|tenant| !tenant.is_empty()).ok_or(CallerError("oc-tenant"))?,
            admin: match text(&ADMIN).as_deref() {
                Some("true") => true,
                Some("false") => false,
                _ => return Err(CallerError("oc-admin")),
            },
            sandbox: text(&SANDBOX_TOKEN),
            public_url: text(&PUBLIC_URL).unwrap_or_default(),
            preview_domain: text(&PREVIEW_DOMAIN).unwrap_or_default(),
            request_id: text(&REQUEST_ID).unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_survives_the_headers() {
        let mut headers = HeaderMap::new();
        headers.insert("oc-sandbox-token", HeaderValue::from_static("sb-forged"));
        let caller = Caller {
            tenant: "acme".into(),
            admin: true,
            sandbox: None,
            public_url: "http://127.0.0.1:8080".into(),
            preview_domain: "preview.localhost".into(),
            request_id: "r-1".into(),
        };
        caller.apply(&mut headers);
        assert_eq!(Caller::from_headers(&headers).unwrap(), caller);
    }

    #[test]
    fn without_a_tenant_nobody_calls() {
        assert!(Caller::from_headers(&HeaderMap::new()).is_err());
    }
}

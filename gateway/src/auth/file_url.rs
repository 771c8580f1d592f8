//! URLs that are good for one file without a credential (`oc.v1.FileUrlService`).
//!
//! Two routes of the contract are theirs, and take nothing else; no other route takes them. What the query says is all
//! that is done: path, expiry and signature, each once; a parameter that was not signed changes nothing.
//!
//! A signature binds the sandbox's tenant, which its record knows. Looking for one that is not there costs the store a
//! read, and anybody may ask: so only few look at once.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::Method;
use oc_mesh::{
    clock::Clock,
    error::{Reason, status},
    file_url::{Access, FileUrlVerifier, Grant},
    token::TokenError,
};
use prost_reflect::{DynamicMessage, Value};
use tokio::sync::Semaphore;
use tonic::Status;

use crate::{
    auth::Identity,
    rest::{request::unescape, route::Route},
    sandboxes::Sandboxes,
};

/// The routes, as the contract has them.
const ROUTES: [(&str, Method, Access); 2] = [
    ("/api/sandboxes/{sandbox_id}/files/download", Method::GET, Access::Read),
    ("/api/sandboxes/{sandbox_id}/files/upload", Method::PUT, Access::Write),
];

/// Sandboxes that are looked for at the same time.
const MAX_LOOKUPS: usize = 8;

/// How long a look-up may take, its turn included.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(2);

/// What the holder of a URL may do on this route; none where URLs are not taken.
#[must_use]
pub fn access(method: &Method, route: &Route) -> Option<Access> {
    let found = ROUTES.iter().find(|(template, of, _)| *template == route.template && of == method);
    found.map(|(.., access)| *access)
}

/// Verifies URLs.
#[derive(Debug)]
pub struct FileUrls {
    verifier: FileUrlVerifier,
    clock: Arc<dyn Clock>,
    lookups: Semaphore,
}

/// What a query says.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    path: String,
    expires: u64,
    signature: String,
}

impl FileUrls {
    /// Verifies URLs at the time that `clock` tells.
    #[must_use]
    pub fn new(verifier: FileUrlVerifier, clock: Arc<dyn Clock>) -> Self {
        Self { verifier, clock, lookups: Semaphore::new(MAX_LOOKUPS) }
    }

    /// Whom a request with this query acts for, and the message that it stands for.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, naming what is missing; `INVALID_CREDENTIALS`, `URL_EXPIRED`; `SANDBOX_NOT_FOUND`;
    /// `OVERLOADED` or `HOST_UNAVAILABLE` if the sandbox cannot be looked up now.
    pub async fn verify(
        &self,
        sandboxes: &Sandboxes,
        access: Access,
        sandbox_id: &str,
        query: Option<&str>,
        route: &Route,
    ) -> Result<(Identity, DynamicMessage), Status> {
        let said = Said::parse(query.unwrap_or_default())?;
        let tenant = self.tenant(sandboxes, sandbox_id).await?;
        let grant = Grant { access, tenant: &tenant, sandbox_id, path: &said.path, expires: said.expires };
        match self.verifier.verify(&grant, &said.signature, self.clock.now()) {
            Ok(()) => {}
            Err(TokenError::Expired) => return Err(status(Reason::UrlExpired, "the URL has expired")),
            Err(_) => return Err(status(Reason::InvalidCredentials, "the URL is not valid")),
        }
        let mut message = DynamicMessage::new(route.rpc.method.input());
        for (field, value) in [("sandbox_id", sandbox_id), ("path", said.path.as_str())] {
            message.try_set_field_by_name(field, Value::String(value.to_owned())).map_err(|error| {
                tracing::error!(%error, "a route of URLs leads to an RPC that has no such field");
                status(Reason::Internal, "the URL cannot be used")
            })?;
        }
        Ok((Identity::Sandbox { tenant, sandbox_id: sandbox_id.to_owned() }, message))
    }

    async fn tenant(&self, sandboxes: &Sandboxes, sandbox_id: &str) -> Result<String, Status> {
        if let Some(tenant) = sandboxes.copied_tenant(sandbox_id) {
            return Ok(tenant);
        }
        let look_up = async {
            // The semaphore is never closed.
            let _turn = self.lookups.acquire().await;
            sandboxes.stored_tenant(sandbox_id).await
        };
        tokio::time::timeout(LOOKUP_DEADLINE, look_up).await.unwrap_or_else(|_| {
            Err(status(Reason::Overloaded, "too many unknown sandboxes are being looked up"))
        })
    }
}

impl Said {
    fn parse(query: &str) -> Result<Self, Status> {
        let invalid = |name: &str, problem: &str| {
            status(Reason::InvalidArgument, format!("the URL's `{name}` {problem}"))
        };
        let mut said = HashMap::new();
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            if said.insert(name, value).is_some() && matches!(name, "path" | "expires" | "signature") {
                return Err(invalid(name, "is given twice"));
            }
        }
        let take = |name: &str| {
            let value = said.get(name).filter(|value| !value.is_empty());
            let value = value.ok_or_else(|| invalid(name, "is missing"))?;
            unescape(value).ok_or_else(|| invalid(name, "is not UTF-8"))
        };
        let expires = take("expires")?.parse().map_err(|_| invalid("expires", "is no time"))?;
        Ok(Self { path: take("path")?, expires, signature: take("signature")? })
    }
}

#[cfg(test)]
mod tests {
    use oc_mesh::error::reason_of;

    use super::*;
    use crate::{rest::route::Routes, surface::Surface};

    #[test]
    fn a_query_says_each_thing_once() {
        let said = Said::parse("junk=1&path=%2Fa%20b%26c&junk=2&expires=7&signature=x-_").unwrap();
        let expected = Said { path: "/a b&c".into(), expires: 7, signature: "x-_".into() };
        assert_eq!(said, expected);
        for query in [
            "",
            "path=/a&expires=7",
            "path=/a&signature=x",
            "expires=7&signature=x",
            "path=&expires=7&signature=x",
            "path=/a&expires=x&signature=x",
            "path=/a&expires=-1&signature=x",
            "path=%ff&expires=7&signature=x",
            "path=/a&path=/b&expires=7&signature=x",
            "path=/a&expires=7&signature=x&signature=x",
        ] {
            let refused = Said::parse(query).unwrap_err();
            assert_eq!(reason_of(&refused).as_deref(), Some("INVALID_ARGUMENT"), "{query}");
        }
    }

    #[test]
    fn every_route_of_urls_exists() {
        let routes = Routes::new(&Surface::load().unwrap()).unwrap();
        for (template, method, access) in ROUTES {
            let found = routes.all().iter().find(|route| route.template == template).unwrap();
            assert_eq!(found.method, method);
            let rpc = if access == Access::Read { "ReadFile" } else { "WriteFile" };
            assert_eq!(found.rpc.method.name(), rpc);
        }
    }
}

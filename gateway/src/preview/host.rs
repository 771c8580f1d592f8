//! Which port of which sandbox a request is for.
//!
//! A preview stands behind the same address as the API, so the host name alone decides. What names two hosts, or names its
//! host in the request's target, is refused: a proxy in front of us may have decided by the other one.
//!
//! A tenant may have a host name lead to a preview; never one of the mesh's own, by which its clients send their API keys.

use std::sync::Arc;

use http::{HeaderValue, Method, Request, Version, header::HOST};
use oc_mesh::{
    host_name::{LOCALHOST, is_at_or_below},
    view::View,
};
use oc_proto::mesh::PreviewDomain;

use crate::{tls::Certificates, ws::handshake};

/// What a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// This port of this sandbox, whose ID may be anybody's guess.
    Port {
        /// The sandbox.
        sandbox_id: String,
        /// The port.
        port: u16,
    },
    /// The preview of this sandbox that has this host name of its own.
    Own {
        /// The sandbox.
        sandbox_id: String,
        /// The host name.
        domain: String,
    },
    /// A host name of ours that is no port's.
    Nowhere,
}

/// A request that is for a preview, and could be read in two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It names no host, more than one, or more than a host and a port.
    #[error("a request to a preview names its host once, in Host or :authority, with a port at most")]
    Host,
    /// It is for a proxy.
    #[error("the target of a request to a preview is a path")]
    Target,
}

/// Host names that are the mesh's own, besides those that are so without being named.
#[derive(Debug, Clone, Default)]
pub struct OwnNames {
    /// Each for itself and every name below it, in lower case.
    pub named: Vec<String>,
    /// What the default one names in full, for itself alone.
    pub certificates: Option<Arc<Certificates>>,
}

impl OwnNames {
    fn has(&self, name: &str) -> bool {
        let is_shown = || self.certificates.as_ref().is_some_and(|pairs| pairs.names_by_default(name));
        self.named.iter().any(|own| is_at_or_below(name, own)) || is_shown()
    }
}

/// The host names that lead to previews.
#[derive(Debug)]
pub struct Hosts {
    domain: String,
    gateway: Option<String>,
    claims: View<PreviewDomain>,
    own_names: OwnNames,
}

impl Hosts {
    /// Names under `domain`, and those in `claims`, but for the mesh's own.
    #[must_use]
    pub fn new(domain: &str, public_url: &str, claims: View<PreviewDomain>, own_names: OwnNames) -> Self {
        let gateway = public_url.parse::<http::Uri>().ok();
        let gateway = gateway.and_then(|url| Some(name_of(url.host()?)?.to_ascii_lowercase()));
        Self { domain: domain.to_ascii_lowercase(), gateway, claims, own_names }
    }

    /// The domain of ports' host names.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// What a request is for, if that is a preview.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn place<B>(&self, request: &Request<B>) -> Option<Result<Place, Malformed>> {
        let named = || request.headers().get_all(HOST).iter().map(|value| value.to_str().unwrap_or_default());
        let target = request.uri().authority().map(http::uri::Authority::as_str);
        let place = target.into_iter().chain(named()).find_map(|name| self.look_up(name))?;
        let (hosts, path) = (named().count(), request.uri().path());
        let is_plain = target.into_iter().chain(named()).all(is_plain);
        let checked = if request.version() < Version::HTTP_2 {
            match () {
                () if target.is_some() || request.method() == Method::CONNECT || !path.starts_with('/') => {
                    Err(Malformed::Target)
                }
                () if hosts != 1 || !is_plain => Err(Malformed::Host),
                () => Ok(place),
            }
        } else {
            let agrees = hosts == 0 || hosts == 1 && (target.is_none() || named().next() == target);
            let connects = request.method() == Method::CONNECT && handshake::asks(request).is_none();
            match () {
                () if connects || !path.starts_with('/') => Err(Malformed::Target),
                () if !agrees || !is_plain => Err(Malformed::Host),
                () => Ok(place),
            }
        };
        Some(checked)
    }

    /// Whether a host name stands beside those of other sandboxes: under a domain that is nobody's alone.
    #[must_use]
    pub fn is_among_others(&self, authority: &HeaderValue) -> bool {
        authority.to_str().is_ok_and(|name| matches!(self.look_up(name), Some(Place::Port { .. })))
    }

    /// Whose names are whose.
    #[must_use]
    pub fn claims(&self) -> &View<PreviewDomain> {
        &self.claims
    }

    /// What a host name leads to, if that is a preview.
    fn look_up(&self, authority: &str) -> Option<Place> {
        let mut name = name_of(authority)?.to_ascii_lowercase();
        if self.gateway.as_deref() == Some(name.as_str()) {
            return None;
        }
        if let Some(label) = name.strip_suffix(&self.domain) {
            if label.is_empty() {
                return Some(Place::Nowhere);
            }
            if let Some(label) = label.strip_suffix('.') {
                let Some((sandbox_id, port)) = port_of(label) else { return Some(Place::Nowhere) };
                name.truncate(sandbox_id.len());
                return Some(Place::Port { sandbox_id: name, port });
            }
        }
        let claim = self.claims.get(&name)?;
        // It may be older than the option, or a scheduler's that was told otherwise.
        (!self.is_own(&name)).then(|| Place::Own { sandbox_id: claim.sandbox_id.clone(), domain: name })
    }

    /// Whether a name is the mesh's own, if it is not the preview domain or below it.
    fn is_own(&self, name: &str) -> bool {
        let mut always = std::iter::once(LOCALHOST).chain(self.gateway.as_deref());
        always.any(|own| is_at_or_below(name, own)) || self.own_names.has(name)
    }
}

/// The host of `host`, `host:port`, `user@host`: without what does not name it.
fn name_of(authority: &str) -> Option<&str> {
    let host = authority.rsplit('@').next().unwrap_or_default();
    // An IPv6 address is none of ours.
    let host = host.split(':').next()?;
    let host = host.strip_suffix('.').unwrap_or(host);
    (!host.is_empty()).then_some(host)
}

/// Whether it is no more than `host` or `host:port`.
fn is_plain(authority: &str) -> bool {
    let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
    !host.contains('@') && port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit())
}

/// `{sandboxID}-p{port}`.
fn port_of(label: &str) -> Option<(&str, u16)> {
    let (sandbox_id, port) = label.rsplit_once("-p")?;
    let is_number =
        !port.is_empty() && !port.starts_with('0') && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| is_number)?;
    let is_label = !sandbox_id.is_empty() && !sandbox_id.contains('.');
    is_label.then_some((sandbox_id, port))
}

#[cfg(test)]
mod tests {
    use hyper::ext::Protocol;
    use oc_mesh::{
        keys, record,
        store::{self, Txn},
    };
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::tls::Files;

    // All are claimed: those that are nobody else's, and the mesh's own, always, by `--own-names`, and by its certificate.
    const TENANTS: [&str; 6] = [
        "app.example",
        "xgate.example",
        "xapi.example",
        "api.example.org",
        "below.shown.example",
        "below.wild.example",
    ];
    const ALWAYS_OWN: [&str; 4] = ["gate.example", "a.b.gate.example", "localhost", "below.localhost"];
    const NAMED: [&str; 2] = ["api.example", "a.b.api.example"];
    const SHOWN: [&str; 1] = ["shown.example"];

    async fn hosts() -> Hosts {
        hosts_but(OwnNames::default()).await
    }

    async fn hosts_but(own_names: OwnNames) -> Hosts {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().join("store.db").display());
        let store = store::open(&url).await.unwrap();
        let claim = PreviewDomain { sandbox_id: "sb-own".into(), claimed_at: None };
        let names = TENANTS.into_iter().chain(ALWAYS_OWN).chain(NAMED).chain(SHOWN);
        let then = names.map(|name| record::put(keys::preview_domain(name), &claim)).collect();
        store.txn(Txn { compare: vec![], then }).await.unwrap();
        let claims = View::start(Arc::clone(&store), keys::PREVIEW_DOMAINS, CancellationToken::new());
        Hosts::new("preview.localhost", "https://Gate.example.:8443/x", claims.await.unwrap(), own_names)
    }

    /// A default certificate for `shown.example`.
    fn certificates() -> Arc<Certificates> {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let names = ["Shown.example", "*.wild.example"].map(str::to_owned);
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        std::fs::write(path("server.crt"), made.cert.pem()).unwrap();
        std::fs::write(path("server.key"), made.signing_key.serialize_pem()).unwrap();
        let files = Files { certificate: path("server.crt"), key: path("server.key"), directory: None };
        Certificates::load(files).unwrap()
    }

    fn request(version: Version, target: &str, hosts: &[&str]) -> Request<()> {
        let mut request = Request::builder().version(version).uri(target);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        request.body(()).unwrap()
    }

    #[tokio::test]
    async fn host_names_lead_to_ports() {
        let hosts = hosts().await;
        let at = |host: &str| hosts.place(&request(Version::HTTP_11, "/", &[host])).map(Result::unwrap);
        let port = |port| Some(Place::Port { sandbox_id: "sb-1".into(), port });
        assert_eq!(at("sb-1-p80.preview.localhost"), port(80));
        assert_eq!(at("SB-1-P65535.Preview.LocalHost.:8080"), port(65_535));
        assert_eq!(
            at("sb-p1-p80.preview.localhost"),
            Some(Place::Port { sandbox_id: "sb-p1".into(), port: 80 })
        );
        for nowhere in [
            "preview.localhost",
            "x.preview.localhost",
            "sb-1-p0.preview.localhost",
            "sb-1-p65536.preview.localhost",
            "sb-1-p080.preview.localhost",
            "sb-1-p+80.preview.localhost",
            "sb-1-p.preview.localhost",
            "-p80.preview.localhost",
            "a.sb-1-p80.preview.localhost",
        ] {
            assert_eq!(at(nowhere), Some(Place::Nowhere), "{nowhere}");
        }
        let own = Place::Own { sandbox_id: "sb-own".into(), domain: "app.example".into() };
        assert_eq!(at("App.example:443"), Some(own));
        for api in ["localhost:8080", "127.0.0.1", "[::1]:8080", "gate.example", "xpreview.localhost", ""] {
            assert_eq!(at(api), None, "{api}");
        }
    }

    #[tokio::test]
    async fn the_meshs_own_names_lead_to_no_sandbox_whatever_is_claimed() {
        let leads = |hosts: &Hosts, name: &str| match hosts.place(&request(Version::HTTP_11, "/", &[name])) {
            None => false,
            Some(Ok(Place::Own { domain, .. })) if domain == name.to_ascii_lowercase() => true,
            other => panic!("{name}: {other:?}"),
        };
        let open = hosts().await;
        for name in TENANTS.into_iter().chain(NAMED).chain(SHOWN) {
            assert!(leads(&open, name), "{name}");
        }
        let named = vec!["api.example".into()];
        let hosts = hosts_but(OwnNames { named, certificates: Some(certificates()) }).await;
        for name in TENANTS {
            assert!(leads(&hosts, name), "{name}");
        }
        for name in ALWAYS_OWN.into_iter().chain(NAMED).chain(SHOWN) {
            for name in [name.to_owned(), name.to_ascii_uppercase(), format!("{name}.:443")] {
                assert!(!leads(&hosts, &name), "{name}");
            }
        }
        // Ports are reached below the preview domain all the same.
        let hosts = hosts_but(OwnNames { named: vec!["localhost".into()], certificates: None }).await;
        let port = hosts.place(&request(Version::HTTP_11, "/", &["sb-1-p80.preview.localhost"]));
        assert_eq!(port, Some(Ok(Place::Port { sandbox_id: "sb-1".into(), port: 80 })));
    }

    #[tokio::test]
    async fn what_could_be_read_in_two_ways_is_refused() {
        let hosts = hosts().await;
        let (own, other) = ("sb-1-p80.preview.localhost", "gate.example");
        let place = |version, target: &str, names: &[&str]| hosts.place(&request(version, target, names));
        let (h1, h2) = (Version::HTTP_11, Version::HTTP_2);
        let absolute = format!("http://{own}/");
        assert_eq!(place(h1, &absolute, &[own]), Some(Err(Malformed::Target)));
        assert_eq!(place(h1, &absolute, &[other]), Some(Err(Malformed::Target)));
        assert_eq!(place(h1, &format!("http://{other}/"), &[own]), Some(Err(Malformed::Target)));
        assert_eq!(place(h1, "*", &[own]), Some(Err(Malformed::Target)));
        assert_eq!(place(h1, "/", &[own, own]), Some(Err(Malformed::Host)));
        assert_eq!(place(h1, "/", &[other, own]), Some(Err(Malformed::Host)));
        for more in [":evil", ":80:80", ":123456"] {
            assert_eq!(place(h1, "/", &[&format!("{own}{more}")]), Some(Err(Malformed::Host)), "{more}");
        }
        assert_eq!(place(h1, "/", &[&format!("user@{own}")]), Some(Err(Malformed::Host)));
        let connect =
            Request::builder().method(Method::CONNECT).uri(format!("{own}:80")).header(HOST, own).body(());
        assert_eq!(hosts.place(&connect.unwrap()), Some(Err(Malformed::Target)));
        assert!(matches!(place(h2, &absolute, &[]), Some(Ok(Place::Port { .. }))));
        assert!(matches!(place(h2, &absolute, &[own]), Some(Ok(Place::Port { .. }))));
        let connect = |protocol: Option<&'static str>| {
            let mut connect = request(h2, &absolute, &[]);
            *connect.method_mut() = Method::CONNECT;
            if let Some(protocol) = protocol {
                connect.extensions_mut().insert(Protocol::from_static(protocol));
            }
            hosts.place(&connect).unwrap()
        };
        assert!(matches!(connect(Some("websocket")), Ok(Place::Port { .. })));
        assert_eq!(
            (connect(None), connect(Some("connect-udp"))),
            (Err(Malformed::Target), Err(Malformed::Target))
        );
        assert_eq!(place(h2, &absolute, &[other]), Some(Err(Malformed::Host)));
        assert_eq!(place(h2, &format!("http://{other}/"), &[own]), Some(Err(Malformed::Host)));
    }
}

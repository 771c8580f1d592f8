//! The gateway itself: what it is made of, and which part of it answers a request.

use std::{net::IpAddr, sync::Arc, time::Duration};

use http::{
    HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER},
};
use hyper::body::{Body as _, Incoming};
use ipnet::IpNet;
use oc_mesh::{
    caller::Caller,
    clock::Clock,
    error::{Reason, status},
    file_url::FileUrlVerifier,
    keys,
    store::SharedStore,
    token::TokenVerifier,
    view::View,
};
use oc_proto::mesh::{HostRecord, KeyRecord, SandboxRecord, SchedulerRecord};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

use crate::{
    auth::{Authenticator, Identity, file_url::FileUrls, keys::ApiKeys},
    budget::Budget,
    cors::{self, AllowedOrigins},
    exchange::{Ending, Exchange, Followed},
    grpc::{self, local::Local},
    listener::{
        head::{Problem, Refused},
        leftover,
    },
    preview::{self, Peer, Previews, host::OwnNames},
    rest::{self, Rest, answer},
    sandboxes::Sandboxes,
    surface::{Rpc, Surface},
    upstream::Upstreams,
    ws::{self, WebSockets},
};

/// An answer of no more bytes than this is ready as a whole, unless it is a port's.
const SHORT: u64 = 64 << 10;

/// How long whoever has changed a preview waits for this gateway's copies to show it: they lag by milliseconds, unless the store is lost.
const CATCHES_UP_WITHIN: Duration = Duration::from_secs(5);

/// Everything that answers requests.
#[derive(Debug)]
pub struct App {
    pub(crate) surface: Surface,
    pub(crate) rest: Rest,
    pub(crate) auth: Authenticator,
    pub(crate) file_urls: FileUrls,
    pub(crate) upstreams: Upstreams,
    pub(crate) local: Local,
    pub(crate) budget: Budget,
    pub(crate) websockets: WebSockets,
    pub(crate) previews: Previews,
    pub(crate) linger: Duration,
    trusted_proxies: Vec<IpNet>,
    origins: AllowedOrigins,
    readiness: Readiness,
    public_url: String,
    permits: Arc<Semaphore>,
}

/// How a gateway is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// URL that clients reach it by.
    pub public_url: String,
    /// Requests that are answered at the same time.
    pub max_requests: usize,
    /// Limits of WebSockets, which are no requests any more once they were answered.
    pub websockets: ws::Limits,
    /// Domain under which ports of sandboxes are shown.
    pub preview_domain: String,
    /// Host names that are no preview's.
    pub own_names: OwnNames,
    /// Limits of previews.
    pub previews: preview::Limits,
    /// Origins whose pages may use it; `*` among them for any.
    pub allowed_origins: Vec<String>,
    /// Networks of proxies before it.
    pub trusted_proxies: Vec<IpNet>,
    /// How long what a client still sends is thrown away once its request was refused, as a rule
    /// [`LINGER`](crate::listener::LINGER).
    pub linger: Duration,
}

/// What must be known before calls can be answered.
#[derive(Debug)]
struct Readiness {
    keys: View<KeyRecord>,
    sandboxes: View<SandboxRecord>,
    hosts: View<HostRecord>,
    schedulers: View<SchedulerRecord>,
    draining: CancellationToken,
}

impl Readiness {
    /// What is missing; `None` when calls can be answered.
    fn missing(&self) -> Option<&'static str> {
        let current = self.keys.is_current()
            && self.sandboxes.is_current()
            && self.hosts.is_current()
            && self.schedulers.is_current();
        match () {
            () if self.draining.is_cancelled() => Some("draining"),
            () if !current => Some("the record store cannot be reached"),
            () if self.schedulers.all().is_empty() => Some("no scheduler"),
            () if self.hosts.all().is_empty() => Some("no host"),
            () => None,
        }
    }
}

impl App {
    /// Builds the gateway on a store. `draining` ends its readiness; it also ends the copies that it keeps of the
    /// store's records, once the last request has been answered and the app is dropped.
    ///
    /// # Errors
    /// The store cannot be read, or the contract cannot be served.
    pub async fn new(
        store: SharedStore,
        settings: Settings,
        clock: Arc<dyn Clock>,
        draining: CancellationToken,
        ended: CancellationToken,
    ) -> anyhow::Result<Arc<Self>> {
        let surface = Surface::load()?;
        let rest = Rest::new(&surface)?;
        let local = Local::new(&surface).await?;
        let keys = View::start(store.clone(), keys::API_KEYS, ended.clone()).await?;
        let records = View::start(store.clone(), keys::SANDBOXES, ended.clone()).await?;
        let hosts = View::start(store.clone(), keys::HOSTS, ended.clone()).await?;
        let schedulers = View::start(store.clone(), keys::SCHEDULERS, ended.clone()).await?;
        let domains = View::start(store.clone(), keys::PREVIEW_DOMAINS, ended.clone()).await?;
        let previews = Previews::new(
            &settings.preview_domain,
            &settings.public_url,
            domains,
            settings.own_names,
            settings.previews,
            ended.clone(),
        );
        let tokens = TokenVerifier::start(store.clone(), ended).await?;
        let readiness = Readiness {
            keys: keys.clone(),
            sandboxes: records.clone(),
            hosts: hosts.clone(),
            schedulers: schedulers.clone(),
            draining,
        };
        let file_urls = FileUrls::new(FileUrlVerifier::new(&tokens), Arc::clone(&clock));
        let auth = Authenticator::new(ApiKeys::new(store.clone(), keys), tokens, clock);
        let upstreams = Upstreams::new(schedulers, Sandboxes::new(store, records, hosts));
        let origins = AllowedOrigins::new(&settings.allowed_origins, &settings.public_url);
        let permits = Arc::new(Semaphore::new(settings.max_requests));
        Ok(Arc::new(Self {
            surface,
            rest,
            auth,
            file_urls,
            upstreams,
            local,
            budget: Budget::default(),
            websockets: WebSockets::new(settings.websockets),
            previews,
            linger: settings.linger,
            trusted_proxies: settings.trusted_proxies,
            origins,
            readiness,
            public_url: settings.public_url,
            permits,
        }))
    }

    /// Answers one request.
    pub async fn handle(self: Arc<Self>, request: Request<Incoming>, peer: Peer) -> Response<Followed> {
        let exchange = Exchange::begin(request.method(), request.headers());
        let ending = Ending::of(Arc::clone(&exchange));
        let is_http1 = request.version() < Version::HTTP_2;
        let origin = cors::origin(&request);
        let (request, leftover) = leftover::keep(request);

        // Every path of a preview is its port's own, our probes' too.
        let place = self.previews.hosts.place(&request);
        if place.is_none()
            && let Some(response) = self.probe(&exchange, &request)
        {
            return ending.follow(response, None);
        }
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            metrics::counter!("oc_gateway_shed_total").increment(1);
            let error = status(Reason::Overloaded, "the gateway is answering as many requests as it can");
            let response = if place.is_some() {
                preview::proxy::refuse(&exchange, &error, request.headers())
            } else if grpc::is_call(request.headers()) {
                error.into_http()
            } else {
                answer::error(&error)
            };
            return ending.follow(response, None);
        };
        let is_of_port = place.is_some();
        let response = if let Some(place) = place {
            let mut response = preview::proxy::serve(&self, &exchange, place, request, &peer).await;
            if is_http1 && response.status().is_client_error() | response.status().is_server_error() {
                if response.extensions().get::<preview::proxy::OfPort>().is_some() {
                    // The port may still be reading it.
                    leftover.discard_later(self.linger);
                } else {
                    leftover.discard(self.linger).await;
                    if response.status() == StatusCode::REQUEST_TIMEOUT {
                        // The rest may come yet, but for nobody.
                        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                    }
                }
            }
            response
        } else if grpc::is_call(request.headers()) {
            // Boxed, as the others: each request should carry its own weight alone.
            Box::pin(grpc::serve(&self, &exchange, request)).await
        } else if let Some(refused) = self.origins.refuse(&request) {
            refused
        } else if let Some(preflight) = cors::preflight(&request) {
            preflight
        } else if let Some(asked) = ws::asked(&request) {
            cors::allow(Box::pin(ws::serve(&self, &exchange, asked, request)).await, origin)
        } else {
            let response = Box::pin(rest::serve(&self, &exchange, request)).await;
            if is_http1 && !response.status().is_success() {
                leftover.discard(self.linger).await;
            }
            cors::allow(response, origin)
        };
        // Who does not take what is ready, as by HTTP/2 without a window, keeps nobody else from being answered.
        let is_ready = !is_of_port && response.body().size_hint().exact().is_some_and(|bytes| bytes <= SHORT);
        ending.follow(response, (!is_ready).then_some(permit))
    }

    /// Answers what is no request.
    pub fn refuse(&self, refused: &Refused, peer: &Peer) -> Response<Followed> {
        let Refused { problem, request } = refused;
        let exchange = Exchange::begin(request.method(), request.headers());
        let ending = Ending::of(Arc::clone(&exchange));
        tracing::info!(%problem, peer = %peer.address, request_id = exchange.request_id(), "what came is no request");
        let error = status(problem.reason(), problem.to_string());
        let response = if *problem == Problem::WithoutTls {
            // For whoever wrote `http` into a URL.
            text(StatusCode::BAD_REQUEST, format!("{problem}\n"))
        } else if self.previews.hosts.place(request).is_some() {
            preview::proxy::refuse(&exchange, &error, request.headers())
        } else {
            cors::allow(answer::error(&error), cors::origin(request))
        };
        ending.follow(response, None)
    }

    /// What is passed on about a caller.
    pub(crate) fn caller(&self, identity: &Identity, exchange: &Exchange) -> Caller {
        let (admin, sandbox) = match identity {
            Identity::Key { admin, .. } => (*admin, None),
            Identity::Sandbox { sandbox_id, .. } => (false, Some(sandbox_id.clone())),
        };
        Caller {
            tenant: identity.tenant().to_owned(),
            admin,
            sandbox,
            public_url: self.public_url.clone(),
            preview_domain: self.previews.domain().to_owned(),
            request_id: exchange.request_id().to_owned(),
        }
    }

    /// Waits until requests to a sandbox's ports go by what this call has changed, and its caller may be told so. Other gateways learn it
    /// as fast, but nobody waits for them.
    pub(crate) async fn catch_up(&self, rpc: &Rpc, sandbox_id: Option<&str>) {
        let Some(sandbox_id) = sandbox_id.filter(|_| rpc.changes_previews) else { return };
        let caught_up = self.upstreams.sandboxes().caught_up(sandbox_id, self.previews.hosts.claims());
        if !matches!(timeout(CATCHES_UP_WITHIN, caught_up).await, Ok(Ok(()))) {
            tracing::warn!(sandbox_id, "a preview has changed, and requests do not go by it yet");
        }
    }

    /// Whoever connects from this address.
    pub(crate) fn peer(&self, address: IpAddr, is_tls: bool) -> Peer {
        // An address of IPv4 may come dressed as one of IPv6.
        let address = address.to_canonical();
        let is_trusted = self.trusted_proxies.iter().any(|network| network.contains(&address));
        Peer::new(address, is_tls, is_trusted)
    }

    /// Cancelled when the gateway goes down.
    pub(crate) fn draining(&self) -> CancellationToken {
        self.readiness.draining.clone()
    }

    /// Tells watchers of health that no new calls are to be sent.
    pub async fn drain(&self) {
        self.local.drain().await;
    }

    /// Probes are answered without a credential, and while the gateway is overloaded, too.
    fn probe<B>(&self, exchange: &Exchange, request: &Request<B>) -> Option<Response<Body>> {
        if request.method() != Method::GET {
            return None;
        }
        let (route, response) = match request.uri().path() {
            "/healthz" => ("/healthz", text(StatusCode::OK, "ok\n".to_owned())),
            "/readyz" => ("/readyz", self.is_ready()),
            "/metrics" => ("/metrics", text(StatusCode::OK, oc_mesh::telemetry::render_metrics())),
            _ => return None,
        };
        exchange.set_route(route);
        exchange.set_quiet();
        Some(response)
    }

    fn is_ready(&self) -> Response<Body> {
        let Some(missing) = self.readiness.missing() else {
            return text(StatusCode::OK, "ready\n".to_owned());
        };
        let mut response = text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n"));
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        response
    }
}

fn text(code: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Body::new(http_body_util::Full::new(bytes::Bytes::from(text))));
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    response
}

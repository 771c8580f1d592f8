//! Previews: ports of sandboxes, reached by host name.
//!
//! In reading order: [`host`] says whether a request is for a port, and refuses those that two parsers could read in two ways;
//! [`token`] asks for what the sandbox's owner wants to see; [`proxy`] passes the request on, with its [`headers`] put right,
//! over a [`connection`] to the port, a [`line`], that the [`pool`] has kept or that is made; a [`websocket`] becomes a [`tunnel`]. What fails is
//! said in a [`page`]. Bodies are [`streamed`] both ways, each held back by its own reader.
//!
//! docs/previews.md describes all of it to users.

pub mod connection;
pub mod headers;
pub mod host;
pub mod line;
pub mod page;
pub mod pool;
pub mod proxy;
pub mod streamed;
pub mod token;
pub mod tunnel;
mod watched;
pub mod websocket;

use std::{net::IpAddr, time::Duration};

use http::HeaderValue;
use oc_mesh::view::View;
use oc_proto::mesh::PreviewDomain;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    host::{Hosts, OwnNames},
    pool::Pool,
};

/// The domain of who names none: browsers resolve it to the loopback (RFC 6761, 6.3).
pub const DEFAULT_DOMAIN: &str = "preview.localhost";

/// Limits of previews.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests and WebSockets to one sandbox at the same time; more wait.
    pub per_sandbox: usize,
    /// How long they wait.
    pub place: Duration,
    /// How long a port may take to accept a connection, once its sandbox is awake.
    pub connect: Duration,
    /// How long a port may take to answer, once it has been sent all there is so far; and a client to send more of a request that is not all
    /// there.
    pub answer: Duration,
    /// How long an answer that has begun, or a WebSocket, may be silent in both directions.
    pub silence: Duration,
    /// How long a connection to a port is kept for the next request: it keeps the sandbox awake, and many a server ends its side
    /// after five seconds.
    pub kept: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_sandbox: 128,
            place: Duration::from_secs(10),
            connect: Duration::from_secs(15),
            answer: Duration::from_secs(60),
            silence: Duration::from_secs(3600),
            kept: Duration::from_secs(4),
        }
    }
}

/// Whom a request came from, as the listener knows it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// Whether it came by TLS.
    pub is_tls: bool,
    /// Whether it is a proxy of ours, that says whom it asks for.
    pub is_trusted: bool,
    /// Its address as ports are told it.
    told: HeaderValue,
}

impl Peer {
    /// Whoever connects from this address.
    #[must_use]
    pub fn new(address: IpAddr, is_tls: bool, is_trusted: bool) -> Self {
        let told = HeaderValue::try_from(address.to_string());
        // Digits, dots and colons are always a value.
        Self { address, is_tls, is_trusted, told: told.unwrap_or(HeaderValue::from_static("unknown")) }
    }
}

/// The previews of all sandboxes.
#[derive(Debug)]
pub struct Previews {
    pub(crate) hosts: Hosts,
    pub(crate) pool: Pool,
    pub(crate) limits: Limits,
    pub(crate) tasks: TaskTracker,
}

impl Previews {
    /// Previews under `domain`, and under the names in `claims` but for the mesh's own. Connections that nobody uses are ended until `ended`.
    #[must_use]
    pub fn new(
        domain: &str,
        public_url: &str,
        claims: View<PreviewDomain>,
        own_names: OwnNames,
        limits: Limits,
        ended: CancellationToken,
    ) -> Self {
        let (pool, tasks) = (Pool::new(limits), TaskTracker::new());
        // Ends with the token, and holds nothing that anybody must wait for.
        tokio::spawn(pool.clone().sweep(ended));
        Self { hosts: Hosts::new(domain, public_url, claims, own_names), pool, limits, tasks }
    }

    /// Waits until all WebSockets and connections have ended; they do by themselves once the gateway is told to stop.
    pub async fn ended(&self) {
        self.pool.clear();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The domain of ports' host names.
    #[must_use]
    pub fn domain(&self) -> &str {
        self.hosts.domain()
    }
}

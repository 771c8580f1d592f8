//! What calls to a guest come to: the guest, or its host where that knows better.

use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use oc_mesh::error::{Reason, status};
use oc_proto::v1::{
    EgressPolicy, GetNetworkRequest, GetNetworkResponse, Network,
    network_service_server::{NetworkService, NetworkServiceServer},
};
use tonic::{Request, Response, Status, body::Body, server::NamedService};
use tower::Service;
use tracing::warn;

use super::{
    guest_link::GuestLink,
    home::Home,
    interfaces::Interfaces,
    ports::{self, Ports},
};
use crate::network::{
    Egress,
    plan::{DNS, GATEWAY, GATEWAY6, GUEST, GUEST_MAC, GUEST6},
};

/// The way to a guest, past what its host answers.
#[derive(Clone, Debug)]
pub struct Outlet {
    link: GuestLink,
    ports: Option<Ports>,
    network: NetworkServiceServer<Connected>,
}

impl Outlet {
    /// To the guest of the VM in `home`, by `link`; to its `ports` by its network, if it has one.
    pub fn new(link: GuestLink, ports: Option<Ports>, home: Home, interfaces: Interfaces) -> Self {
        Self { link, ports, network: NetworkServiceServer::new(Connected { home, interfaces }) }
    }
}

/// Whether a request is for the service `S`.
fn is_for<S: NamedService>(request: &http::Request<Body>) -> bool {
    let path = request.uri().path();
    path.strip_prefix('/')
        .and_then(|path| path.strip_prefix(S::NAME))
        .is_some_and(|rest| rest.starts_with('/'))
}

impl Service<http::Request<Body>> for Outlet {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.link.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if is_for::<NetworkServiceServer<Connected>>(&request) {
            let mut network = self.network.clone();
            return Box::pin(async move { network.call(request).await.map_err(|never| match never {}) });
        }
        match &self.ports {
            Some(ports) if ports::is_for(&request) => {
                let (ports, link) = (ports.clone(), self.link.clone());
                Box::pin(async move { ports.call(request, link.way().await?).await })
            }
            _ => self.link.call(request),
        }
    }
}

/// How one VM is connected.
#[derive(Clone, Debug)]
struct Connected {
    home: Home,
    interfaces: Interfaces,
}

#[tonic::async_trait]
impl NetworkService for Connected {
    async fn get_network(
        &self,
        _: Request<GetNetworkRequest>,
    ) -> Result<Response<GetNetworkResponse>, Status> {
        let failed = |error: std::io::Error| {
            warn!(vm = self.home.vm(), %error, "cannot look at a VM's network");
            status(Reason::Internal, "the sandbox's network cannot be looked at")
        };
        let egress = match self.home.egress().map_err(failed)? {
            Egress::Open => EgressPolicy::Open,
            Egress::Nothing => EgressPolicy::None,
        };
        let mut network = Network { egress: egress.into(), ..Network::default() };
        if let Some((usage, limits)) = self.interfaces.usage(&self.home).await.map_err(failed)? {
            network = Network {
                is_connected: true,
                addresses: vec![GUEST.to_string(), GUEST6.to_string()],
                gateways: vec![GATEWAY.to_string(), GATEWAY6.to_string()],
                name_server: DNS.to_string(),
                mac: GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":"),
                connections: signed(usage.connections),
                max_connections: limits.connections.into(),
                max_mbit: limits.mbit.into(),
                sent_bytes: signed(usage.sent_bytes),
                received_bytes: signed(usage.received_bytes),
                ..network
            };
        }
        Ok(Response::new(GetNetworkResponse { network: Some(network) }))
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

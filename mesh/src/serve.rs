//! Serving gRPC to our own parts: routes, health, reflection and the layer stack on one endpoint.

use std::{io, time::Duration};

use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    channel::{CONNECTION_WINDOW, MAX_FRAME, STREAM_WINDOW},
    endpoint::Endpoint,
    layers::server_stack,
};

pub(crate) mod listen;

use listen::{Listener, tcp_connections, unix_connections};

/// How long calls may go on after a stop was asked for.
const GRACE: Duration = Duration::from_secs(10);
/// How often a silent peer is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Streams that one connection may have open: a gateway has one to a host, for all that its callers attach to there. One that
/// is idle costs a few KiB on either side, windows are only filled by those that are not read.
const MAX_STREAMS: u32 = 16_384;

/// What is served, and how.
#[derive(Debug)]
pub struct Serve {
    /// Where to listen.
    pub listen: Endpoint,
    /// The services.
    pub routes: Routes,
    /// Calls answered at once; more are refused with `OVERLOADED`.
    pub max_concurrent: usize,
    /// Longest time to the beginning of an answer.
    pub max_deadline: Duration,
    /// Stops serving: no new calls, [`GRACE`] for those that run.
    pub shutdown: CancellationToken,
}

/// Why serving ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The endpoint cannot be listened on.
    #[error("cannot listen on {endpoint}: {error}")]
    Listen {
        /// The endpoint.
        endpoint: Endpoint,
        /// What the system said.
        error: io::Error,
    },
    /// The contract's descriptors cannot be served.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server broke.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
}

/// A bound endpoint that is not served yet.
#[derive(Debug)]
pub struct Bound {
    serve: Serve,
    listener: Listener,
    health: HealthReporter,
}

impl Serve {
    /// Binds the endpoint and adds health and reflection. A Unix socket is for our own user alone, and never taken from
    /// a process that lives.
    pub async fn bind(mut self) -> Result<Bound, ServeError> {
        let refused = |error| ServeError::Listen { endpoint: self.listen.clone(), error };
        let listener = Listener::bind(&self.listen).await.map_err(refused)?;
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status("", ServingStatus::Serving).await;
        let (v1, v1alpha) = reflection(None)?;
        self.routes = self.routes.add_service(health_service).add_service(v1).add_service(v1alpha);
        Ok(Bound { serve: self, listener, health })
    }
}

/// The reflection services, in both versions that clients ask for. With `only`, they show the services of that package.
pub fn reflection(
    only: Option<&str>,
) -> Result<
    (
        tonic_reflection::server::v1::ServerReflectionServer<
            impl tonic_reflection::server::v1::ServerReflection,
        >,
        tonic_reflection::server::v1alpha::ServerReflectionServer<
            impl tonic_reflection::server::v1alpha::ServerReflection,
        >,
    ),
    tonic_reflection::server::Error,
> {
    let builder = || {
        let mut builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(oc_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        if let Some(package) = only {
            builder = builder.with_service_name("grpc.health.v1.Health");
            for service in services_of(package) {
                builder = builder.with_service_name(service);
            }
        }
        builder
    };
    Ok((builder().build_v1()?, builder().build_v1alpha()?))
}

fn services_of(package: &str) -> Vec<String> {
    use prost::Message as _;
    let descriptors = prost_types::FileDescriptorSet::decode(oc_proto::DESCRIPTORS).unwrap_or_default();
    let files = descriptors.file.iter().filter(|file| file.package() == package);
    files
        .flat_map(|file| file.service.iter().map(|service| format!("{package}.{}", service.name())))
        .collect()
}

impl Bound {
    /// Reports health to callers of `grpc.health.v1.Health`.
    pub fn health(&self) -> HealthReporter {
        self.health.clone()
    }

    /// Where it listens; the port that the system chose where port 0 was asked for.
    pub fn endpoint(&self) -> Endpoint {
        match &self.listener {
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => Endpoint::Tcp(address.to_string()),
                Err(_) => self.serve.listen.clone(),
            },
            Listener::Unix(_) => self.serve.listen.clone(),
        }
    }

    /// Serves until the shutdown token is cancelled and the calls have ended or their grace is over.
    pub async fn run(self) -> Result<(), ServeError> {
        let Serve { routes, max_concurrent, max_deadline, shutdown, .. } = self.serve;
        // The peer of a Unix socket cannot vanish silently.
        let keepalive = matches!(self.listener, Listener::Tcp(_)).then_some(KEEPALIVE);
        let router = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_concurrent_streams(MAX_STREAMS)
            // Against strangers, the connection is broken where many streams are opened and given up at once, or sent to after
            // they were refused. Here all callers share it, and each may give up what it likes.
            .http2_max_pending_accept_reset_streams(Some(MAX_STREAMS as usize))
            .http2_max_local_error_reset_streams(None)
            .http2_keepalive_interval(keepalive)
            .layer(server_stack(max_concurrent, max_deadline))
            .add_routes(routes);
        let stop = shutdown.clone();
        let stopped = async move { stop.cancelled().await };
        let late = async move {
            shutdown.cancelled().await;
            tokio::time::sleep(GRACE).await;
        };
        let serving = async {
            match self.listener {
                Listener::Unix(socket) => {
                    router.serve_with_incoming_shutdown(unix_connections(socket), stopped).await
                }
                Listener::Tcp(listener) => {
                    router.serve_with_incoming_shutdown(tcp_connections(listener), stopped).await
                }
            }
        };
        tokio::select! {
            result = serving => Ok(result?),
            () = late => {
                tracing::warn!("calls were still running when their grace was over");
                Ok(())
            }
        }
    }
}

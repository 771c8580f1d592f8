//! A gateway from its first line to its last: store, listener, membership, drain.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use oc_mesh::{clock::SystemClock, keys, membership::Registration, store};
use oc_proto::mesh::GatewayRecord;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    app::{App, Settings},
    config::Config,
    listener::{self, Limits, workers::Workers},
    preview::{self, host::OwnNames},
    tls::Certificates,
    ws,
};

/// A gateway that has not renewed its membership for this long is gone.
const LEASE: Duration = Duration::from_secs(10);

/// Runs a gateway until `stop`.
///
/// # Errors
/// It could not be started.
pub async fn run(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let store = store::open(&config.store).await.context("the record store could not be opened")?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let certificates = config.tls_files().map(Certificates::load).transpose().context("no TLS")?;
    let tls = certificates.as_ref().map(Certificates::server).transpose().context("no TLS")?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let public_url = config.public_url.unwrap_or_else(|| format!("{scheme}://{address}"));
    let id = config.id.unwrap_or_else(|| format!("gateway-{}", uuid::Uuid::now_v7()));

    let ended = CancellationToken::new();
    let _end = ended.clone().drop_guard();
    let workers = Workers::start().context("no threads")?;
    let clock = Arc::new(SystemClock);
    let settings = Settings {
        public_url: public_url.clone(),
        max_requests: config.max_requests,
        websockets: ws::Limits { max: config.max_websockets, ..ws::Limits::default() },
        preview_domain: config.preview_domain,
        own_names: OwnNames { named: config.own_names, certificates: certificates.clone() },
        previews: preview::Limits::default(),
        allowed_origins: config.allowed_origins,
        trusted_proxies: config.trusted_proxies,
        linger: listener::LINGER,
    };
    let app = App::new(store.clone(), settings, clock, stop.clone(), ended).await?;
    let record = GatewayRecord {
        gateway_id: id.clone(),
        public_url: public_url.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let registration =
        Registration::start(store, keys::gateway(&id), record.encode_to_vec().into(), LEASE).await?;

    let limits = Limits { max_connections: config.max_connections, ..Limits::default() };
    tracing::info!(%address, public_url, gateway = id, "ready");
    let follow = async {
        if let Some(certificates) = certificates {
            certificates.follow(stop.clone()).await;
        }
    };
    let leave = async {
        stop.cancelled().await;
        // Out of the list first, so that nobody is sent here any more.
        registration.leave().await;
        app.drain().await;
    };
    let serve = listener::serve(listener, tls, Arc::clone(&app), limits, workers, stop.clone());
    tokio::join!(serve, follow, leave);
    tracing::info!("stopped");
    Ok(())
}

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
    listener::{self, Limits},
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
    let public_url = config.public_url.unwrap_or_else(|| format!("http://{address}"));
    let id = config.id.unwrap_or_else(|| format!("gateway-{}", uuid::Uuid::now_v7()));

    let ended = CancellationToken::new();
    let _end = ended.clone().drop_guard();
    let clock = Arc::new(SystemClock);
    let settings = Settings {
        public_url: public_url.clone(),
        max_requests: config.max_requests,
        websockets: ws::Limits { max: config.max_websockets, ..ws::Limits::default() },
        allowed_origins: config.allowed_origins,
    };
    let app = App::new(store.clone(), settings, clock, stop.clone(), ended).await?;
    let record = GatewayRecord {
        gateway_id: id.clone(),
        public_url: public_url.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let registration =
        Registration::start(store, keys::gateway(&id), record.encode_to_vec().into(), LEASE).await?;

    tracing::info!(%address, public_url, gateway = id, "ready");
    let leave = async {
        stop.cancelled().await;
        // Out of the list first, so that nobody is sent here any more.
        registration.leave().await;
        app.drain().await;
    };
    tokio::join!(listener::serve(listener, Arc::clone(&app), Limits::default(), stop.clone()), leave);
    tracing::info!("stopped");
    Ok(())
}

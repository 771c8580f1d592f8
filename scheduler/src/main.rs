//! The `oc-scheduler` binary.

use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use oc_mesh::{clock::SystemClock, fail::arm, limits, shutdown, store, telemetry};
use oc_scheduler::{app::App, config::Config, fail, reconcile::Pace};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    let _logs = telemetry::init("oc-scheduler");
    arm(fail::ALL, fail::ACTIONS)?;
    limits::raise_open_files()?;
    let stop = shutdown::on_signal()?;
    let store = store::open(&config.store).await.context("the record store could not be opened")?;
    let app = App::start(&config, store, Arc::new(SystemClock), Pace::default(), stop).await?;
    app.run().await?;
    Ok(())
}

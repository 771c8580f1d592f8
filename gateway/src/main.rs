//! The `oc-gateway` binary.

use clap::Parser as _;
use oc_gateway::{allocator, config::Config, run};
use oc_mesh::{limits, shutdown, telemetry};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    let _logs = telemetry::init("oc-gateway");
    limits::raise_open_files()?;
    allocator::keep_buffers();
    run::run(config, shutdown::on_signal()?).await
}

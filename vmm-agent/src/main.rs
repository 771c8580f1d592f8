//! The `oc-vmm-agent` binary.

use std::{
    io::{self, Write as _},
    sync::Arc,
};

use anyhow::Context as _;
use clap::{CommandFactory as _, FromArgMatches as _};
use oc_mesh::{fail::arm, limits, shutdown, telemetry};
use oc_vmm_agent::{
    app, cleanup,
    config::{self, Args, Config},
    data_image,
    doctor::{self, host::Host, subject::Subject},
    driver::Driver,
    fail,
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let (mut program, doctor) = (Args::command(), Subject::command().name(doctor::COMMAND));
    program = program.subcommand(doctor).subcommand_negates_reqs(true).args_conflicts_with_subcommands(true);
    let matches = program.get_matches();
    if let Some((_, asked)) = matches.subcommand() {
        let subject = Subject::from_arg_matches(asked).unwrap_or_else(|error| error.exit());
        let report = doctor::examine(&Host::here(), &subject).await;
        return Ok(writeln!(io::stdout(), "{}", doctor::to_json(&report))?);
    }
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let _logs = telemetry::init("oc-vmm-agent");
    if args.cleanup {
        let host_id = config::checked_host_id(&args.host_id)?;
        let data_dir = config::absolute("--data-dir", &args.data_dir)?;
        let driver = Driver::for_removal(&host_id, &data_dir).context("cannot look for VMs")?;
        return Ok(cleanup::clean_up(Arc::new(driver), &data_dir).await?);
    }
    arm(fail::ALL, fail::ACTIONS)?;
    limits::raise_open_files().context("cannot open more files")?;
    let config = Config::new(args)?;
    let shutdown = shutdown::on_signal()?;
    match config.data_image_mb {
        Some(size_mb) => data_image::mount(&config.data_dir, size_mb)?,
        None => data_image::refuse_unmounted(&config.data_dir)?,
    }
    // Before anything is touched: another agent may be at work here.
    let _lock = app::claim(&config.data_dir)?;
    let driver = Arc::new(Driver::open(&config).await.context("this host cannot run microVMs")?);
    let served = app::run(config, driver.clone(), shutdown).await;
    driver.close().await;
    Ok(served?)
}

//! `/init` of a microVM.

use std::{process::ExitCode, time::Duration};

use nix::sys::reboot::{RebootMode, reboot};

fn main() -> ExitCode {
    let Err(error) = run();
    // The console's last lines are what the host's agent reports.
    eprintln!("oc-guest: {error}");
    nix::unistd::sync();
    if std::process::id() == 1 {
        let _ = reboot(RebootMode::RB_POWER_OFF);
    }
    ExitCode::FAILURE
}

fn run() -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    if std::process::id() != 1 {
        return Err("it is PID 1 of a microVM, or nothing".into());
    }
    let disk = oc_guest::boot::boot()?;
    if let Err(error) = oc_guest::network::configure() {
        // It is of use without one, too.
        eprintln!("oc-guest: no network: {error}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // A clone finds its snapshot's threads waiting: making one costs an emulated guest milliseconds.
        .thread_keep_alive(Duration::MAX)
        .build()?;
    runtime.block_on(async {
        oc_guest::children::reap_forever()?;
        if oc_guest::vsock::is_wanted()? {
            return oc_guest::serve::serve(oc_guest::vsock::sessions()?, disk).await;
        }
        let port = oc_guest::port::Port::open().await?;
        oc_guest::serve::serve(oc_guest::serve::sessions_on(port), disk).await
    })
}

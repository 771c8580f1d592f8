//! `oc up`: a whole mesh on this machine, and the supervisor that keeps it running.
//!
//! ```text
//!   oc up ── holds the lock on the state directory
//!     ├── oc-scheduler   \
//!     ├── oc-vmm-agent    > each in a session of its own, journaled in run/NAME.PID.pid before it starts
//!     └── oc-gateway     /        └── microVMs: belong to no session, no parent; the agent's journal knows them
//! ```
//!
//! A service that ends is started again. A supervisor that is killed takes nothing with it: the services run on,
//! and the next `oc up` finds their journals, ends them, and starts its own; the new agent adopts the microVMs.
//! A clean stop (Ctrl-C, SIGTERM, `oc down`) deletes this machine's sandboxes through the API, ends gateway,
//! scheduler and agent in that order, lets the agent's `--cleanup` end whatever is left, and removes `run/`.
//!
//! - [`plan`]: what to run, checked before anything is started.
//! - [`layout`]: the state directory; [`key`]: the API key in it; [`log`]: the log files.
//! - [`certificates`]: what `--tls` makes.
//! - [`identity`]: processes that cannot be mistaken for others; [`shim`]: how a service is started.
//! - [`supervisor`]: keeps one service running; [`run`]: the mesh from start to stop.
//! - [`readiness`]: when it may be used; [`report`]: what is said about it.
//! - [`stop`]: the end, of what we started and of what a dead supervisor left; [`detach`]: in the background.

pub mod certificates;
pub mod detach;
pub mod identity;
pub mod key;
pub mod layout;
pub mod log;
pub mod plan;
pub mod readiness;
pub mod report;
pub mod run;
pub mod shim;
pub mod stop;
pub mod supervisor;

use std::path::Path;

use crate::{
    arguments::{DownArguments, Global, UpArguments},
    config::Target,
    failure::Failure,
    output::Output,
};

use layout::Layout;
use plan::Plan;
use report::Reporter;

/// `oc up`.
pub async fn up(global: &Global, arguments: UpArguments, output: Output) -> Result<(), Failure> {
    let plan = Plan::new(&global.state_dir, &arguments)?;
    if arguments.detached {
        detach::become_daemon()?;
        let mut reporter = Reporter::parent();
        let result = Box::pin(run::run(&plan, &mut reporter)).await;
        if let Err(failure) = &result {
            reporter.failed(failure);
        }
        return result;
    }
    if arguments.detach {
        return detach::start(&plan, output).await;
    }
    let mut reporter = Reporter::terminal(output, false);
    Box::pin(run::run(&plan, &mut reporter)).await
}

/// `oc down`.
pub async fn down(global: &Global, arguments: &DownArguments, output: Output) -> Result<(), Failure> {
    let layout = Layout::new(&global.state_dir)?;
    stop::down(&layout, arguments.bin_dir.as_deref(), output).await
}

/// The mesh that runs on this machine, if we may know its key.
pub fn local_mesh(state_dir: &Path) -> Option<Target> {
    let layout = Layout::new(state_dir).ok()?;
    let mesh = layout.read_mesh().ok().flatten()?;
    let alive = mesh.supervisor.is_alive() || layout.is_alive(plan::GATEWAY);
    let key = alive.then(|| key::read(&layout.api_key()).ok().flatten()).flatten()?;
    let ca_file = layout.ca_of(&mesh.url);
    Some(Target { url: mesh.url, key: key.expose().to_owned(), ca_file })
}

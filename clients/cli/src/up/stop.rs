//! The end of a mesh: of the one we run, and of what a supervisor left that was killed.

use std::{fs, path::Path, process::Stdio, time::Duration};

use serde_json::json;
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

use crate::{
    commands::nodes,
    config::Target,
    connection::Connection,
    failure::Failure,
    output::{self, Output},
    progress,
};

use super::{
    identity::Process,
    key,
    layout::{Layout, Lock},
    log,
    plan::{AGENT, GATEWAY, STOP_ORDER, STOP_PATIENCE, program},
    report::Reporter,
};

/// For deleting this machine's sandboxes. What is not deleted by then goes with its microVM, and its record is
/// put right at the next start.
const DELETE_PATIENCE: Duration = Duration::from_secs(20);
/// For `oc-vmm-agent --cleanup`.
const CLEAN_UP_PATIENCE: Duration = Duration::from_secs(60);
/// For a supervisor to stop its mesh: all of the above, thrice the patience for a service and for its end by SIGKILL,
/// and some.
const SUPERVISOR_PATIENCE: Duration = Duration::from_secs(220);
/// Between its end and that of its lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Ends the services that a dead supervisor left. Its microVMs stay for the next agent.
pub async fn leftovers(layout: &Layout, reporter: &mut Reporter) -> Result<(), Failure> {
    for service in STOP_ORDER {
        for identity in layout.journaled(service) {
            let pid = identity.pid();
            let failed = |error| Failure::local(format!("cannot stop {service} (process {pid})"), error);
            if let Some(process) = Process::open(&identity).map_err(failed)? {
                reporter.note(&format!("stopping {service} of a supervisor that was killed (process {pid})"));
                process.terminate(STOP_PATIENCE).await.map_err(failed)?;
            }
            // Its shim may have removed it.
            let _ = fs::remove_file(layout.journal(service, pid));
        }
        let _ = fs::remove_file(layout.socket(service));
    }
    Ok(())
}

/// Deletes the sandboxes on this machine through the API, whoever's they are, as far as the mesh still can.
pub async fn delete_sandboxes(target: &Target, host_id: &str) {
    let deleting = async {
        let connection = Connection::open(target).await?;
        nodes::clear(&connection, host_id, DELETE_PATIENCE).await
    };
    // Best effort: cleaning up ends every microVM.
    let _ = timeout(DELETE_PATIENCE, deleting).await;
}

/// Lets the agent end every microVM of this machine and remove what belonged to it.
pub async fn clean_up(layout: &Layout, bin_dir: &Path, host_id: &str) -> Result<(), Failure> {
    let program = program(bin_dir, AGENT);
    let failed = |error| Failure::local(format!("cannot run {} --cleanup", program.display()), error);
    let path = layout.log(AGENT);
    let log = log::open(&path).map_err(failed)?;
    let mut command = Command::new(&program);
    command
        .arg("--cleanup")
        .arg("--data-dir")
        .arg(layout.agent())
        .args(["--host-id", host_id])
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        .kill_on_drop(true);
    let status = match timeout(CLEAN_UP_PATIENCE, command.status()).await {
        Ok(status) => status.map_err(failed)?,
        Err(_) => return Err(failed(std::io::ErrorKind::TimedOut.into())),
    };
    if status.success() {
        return Ok(());
    }
    Err(Failure::Unfit(format!(
        "{} --cleanup failed ({status}): microVMs may be left; {} says:\n{}",
        program.display(),
        path.display(),
        log::tail(&path, 5)
    )))
}

/// `oc down`.
pub async fn down(layout: &Layout, bin_dir: Option<&Path>, output: Output) -> Result<(), Failure> {
    let unreadable = |error| Failure::local(format!("cannot read {}/run", layout.root().display()), error);
    if !layout.root().is_dir() {
        return say(false, layout, output);
    }
    let mut ran = false;
    if let Some(mesh) = layout.read_mesh().map_err(unreadable)? {
        ran = true;
        let failed =
            |error| Failure::local(format!("cannot stop oc up (process {})", mesh.supervisor.pid()), error);
        if let Some(supervisor) = Process::open(&mesh.supervisor).map_err(failed)? {
            progress::during("stopping the mesh", supervisor.terminate(SUPERVISOR_PATIENCE))
                .await
                .map_err(failed)?;
        }
    }
    let _lock = lock(layout).await?;
    // Gone, unless the supervisor was killed, now or long ago.
    if let Some(mesh) = layout.read_mesh().map_err(unreadable)? {
        let mut reporter = Reporter::terminal(output, false);
        if layout.is_alive(GATEWAY)
            && let Some(key) = key::read(&layout.api_key())?
        {
            let target = Target {
                url: mesh.url.clone(),
                key: key.expose().to_owned(),
                ca_file: layout.ca_of(&mesh.url),
            };
            progress::during("deleting sandboxes", delete_sandboxes(&target, &mesh.host_id)).await;
        }
        leftovers(layout, &mut reporter).await?;
        let cleaning = clean_up(layout, bin_dir.unwrap_or(&mesh.bin_dir), &mesh.host_id);
        progress::during("cleaning up", cleaning).await?;
        layout.remove_run()?;
    }
    say(ran, layout, output)
}

async fn lock(layout: &Layout) -> Result<Lock, Failure> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        if let Some(lock) = layout.lock()? {
            return Ok(lock);
        }
        if Instant::now() > deadline {
            let message = format!("a mesh is being started in {}: try again", layout.root().display());
            return Err(Failure::Conflict(message));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

fn say(ran: bool, layout: &Layout, output: Output) -> Result<(), Failure> {
    if !output.is_json() {
        let directory = layout.root().display();
        let text = if ran { "stopped the mesh in" } else { "no mesh runs in" };
        output::note(format_args!("{text} {directory}"));
    }
    output.show(|| json!({ "stopped": ran }), String::new)
}

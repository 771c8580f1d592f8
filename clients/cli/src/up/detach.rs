//! `oc up --detach`: the same supervisor, in the background. This process starts another of itself, shows what
//! that one reports, and leaves once the mesh is ready.

use std::{env, io, process::Stdio};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, chdir, setsid},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    signal::unix::{SignalKind, signal},
};

use crate::{failure::Failure, output::Output};

use super::{
    log,
    plan::Plan,
    report::{Line, Reporter},
};

/// Name of the supervisor's log.
const LOG: &str = "oc-up";

/// Leaves the session and the directory of whoever started us.
pub fn become_daemon() -> Result<(), Failure> {
    let failed = |errno| Failure::local("cannot start a session", io::Error::from(errno));
    setsid().map_err(failed)?;
    chdir("/").map_err(failed)
}

/// Starts the supervisor, and returns once the mesh is ready.
pub async fn start(plan: &Plan, output: Output) -> Result<(), Failure> {
    plan.layout.prepare()?;
    let failed = |error| Failure::local("cannot start the supervisor", error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let path = plan.layout.log(LOG);
    let log = log::open(&path).map_err(failed)?;
    log::bound(&path).map_err(failed)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("oc")
        .args(env::args_os().skip(1))
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(failed)?;
    let Some(stdout) = child.stdout.take() else { return Err(failed(io::ErrorKind::BrokenPipe.into())) };

    let mut reporter = Reporter::terminal(output, true);
    let mut reported = std::pin::pin!(follow(stdout, &mut reporter));
    let ended = loop {
        tokio::select! {
            ended = &mut reported => break ended,
            // Its report goes on until it has stopped what it had started.
            _ = interrupt.recv() => end(&child),
            _ = terminate.recv() => end(&child),
        }
    };
    match ended? {
        true => Ok(()),
        false => {
            let status = child.wait().await.map_err(failed)?;
            Err(Failure::NotReady(format!("the supervisor ended ({status}): {}", log::tail(&path, 3))))
        }
    }
}

/// Shows the reports; true once the mesh is ready, false if they end before.
async fn follow(stdout: ChildStdout, reporter: &mut Reporter) -> Result<bool, Failure> {
    let mut lines = BufReader::new(stdout).lines();
    loop {
        let line = lines
            .next_line()
            .await
            .map_err(|error| Failure::local("cannot read the supervisor's report", error))?;
        let Some(line) = line else { return Ok(false) };
        match serde_json::from_str(&line) {
            Ok(Line::Progress(stage)) => reporter.progress(&stage),
            Ok(Line::Note(text)) => reporter.note(&text),
            Ok(Line::Ready(ready)) => {
                reporter.ready(&ready)?;
                return Ok(true);
            }
            Ok(Line::Failed { message, code, exit }) => {
                return Err(Failure::Reported { message, code, exit });
            }
            // Not a report: nothing that anybody has to know.
            Err(_) => {}
        }
    }
}

fn end(child: &Child) {
    // Not waited for yet, so the ID is still its own.
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}

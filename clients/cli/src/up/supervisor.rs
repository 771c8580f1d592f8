//! Keeps one service running until it is told to stop.

use std::{io, process::ExitStatus, process::Stdio, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    sync::mpsc,
    task::JoinHandle,
    time::{self, Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    identity::Identity,
    layout::Layout,
    log,
    plan::{AGENT, STOP_ORDER, STOP_PATIENCE, Service},
    shim,
};

/// Pauses between attempts: twice as long every time, up to this.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A service that ran so long did start: its next end is a new trouble, not the same again.
const STEADY: Duration = Duration::from_secs(10);
/// For the kernel to end a process after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Secrets of our caller's; no service needs them.
const SECRETS: [&str; 2] = ["OC_API_KEY", "OPENCOMPUTER_API_KEY"];

/// And what only the vmm-agent needs.
const OBJECT_STORE_SECRETS: [&str; 2] = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];

/// A service has ended, or could not be started.
#[derive(Debug)]
pub struct Ended {
    /// Its name.
    pub service: &'static str,
    /// How it ended.
    pub how: String,
    /// How often in a row it ended soon.
    pub in_a_row: u32,
    /// Until it is started again.
    pub pause: Duration,
}

/// The services that are kept running.
#[derive(Debug)]
pub struct Supervision {
    running: Vec<Running>,
    events: mpsc::Receiver<Ended>,
    /// Cancelled: what still runs is killed without patience.
    force: CancellationToken,
}

#[derive(Debug)]
struct Running {
    name: &'static str,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Supervision {
    /// Starts the services.
    pub fn start(
        services: impl IntoIterator<Item = Service>,
        layout: &Layout,
        supervisor: &Identity,
    ) -> Self {
        let force = CancellationToken::new();
        // Bounded; if nobody listens, what does not fit is not missed.
        let (sender, events) = mpsc::channel(64);
        let running = services.into_iter().map(|service| {
            let stop = CancellationToken::new();
            let name = service.name;
            let keeper = Keeper {
                service,
                layout: layout.clone(),
                supervisor: supervisor.pid(),
                stop: stop.clone(),
                force: force.clone(),
                events: sender.clone(),
            };
            Running { name, stop, task: tokio::spawn(keeper.run()) }
        });
        Self { running: running.collect(), events, force }
    }

    /// The next end of a service.
    pub async fn ended(&mut self) -> Ended {
        match self.events.recv().await {
            Some(ended) => ended,
            // Every keeper has stopped.
            None => std::future::pending().await,
        }
    }

    /// Cancelled by whoever has no patience left.
    pub fn force(&self) -> CancellationToken {
        self.force.clone()
    }

    /// Stops the services, one after the other.
    pub async fn stop(self) {
        let mut running = self.running;
        for name in STOP_ORDER {
            for service in running.extract_if(.., |service| service.name == name) {
                service.stop.cancel();
                // It ends by itself within a bounded time; a panic in it has ended it too.
                let _ = service.task.await;
            }
        }
    }
}

struct Keeper {
    service: Service,
    layout: Layout,
    supervisor: i32,
    stop: CancellationToken,
    force: CancellationToken,
    events: mpsc::Sender<Ended>,
}

impl Keeper {
    async fn run(self) {
        let mut in_a_row = 0;
        while !self.stop.is_cancelled() {
            let since = Instant::now();
            let how = match self.spawn() {
                Ok(mut child) => {
                    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
                    let ended = tokio::select! {
                        ended = child.wait() => Some(ended),
                        () = self.stop.cancelled() => None,
                    };
                    let Some(ended) = ended else {
                        self.end(&mut child).await;
                        self.forget(pid);
                        return;
                    };
                    self.forget(pid);
                    describe(ended)
                }
                Err(error) => format!("could not be started: {error}"),
            };
            in_a_row = if since.elapsed() >= STEADY { 1 } else { in_a_row + 1 };
            let pause = pause_after(in_a_row);
            let _ = self.events.try_send(Ended { service: self.service.name, how, in_a_row, pause });
            tokio::select! {
                () = sleep(pause) => {}
                () = self.stop.cancelled() => return,
            }
        }
    }

    fn spawn(&self) -> io::Result<Child> {
        let name = self.service.name;
        let path = self.layout.log(name);
        let log = log::open(&path)?;
        log::bound(&path)?;
        // Not by its path: `oc` may have been replaced since it was started.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("oc")
            .arg(shim::COMMAND)
            .arg("--state-dir")
            .arg(self.layout.root())
            .args(["--service", name])
            .args(["--supervisor", &self.supervisor.to_string()])
            .args(self.service.private.then_some("--private"))
            .arg("--")
            .args(&self.service.command)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let others = if name == AGENT { &[][..] } else { &OBJECT_STORE_SECRETS };
        for secret in SECRETS.iter().chain(others) {
            command.env_remove(secret);
        }
        command.spawn()
    }

    /// Asks the service to end, and makes it end when patience is over.
    async fn end(&self, child: &mut Child) {
        // Not waited for yet, so the ID is still its own.
        if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let ended = tokio::select! {
            ended = time::timeout(STOP_PATIENCE, child.wait()) => ended.is_ok(),
            () = self.force.cancelled() => false,
        };
        if !ended {
            // It has ended by itself if this fails.
            let _ = child.start_kill();
            let _ = time::timeout(KILL_DEADLINE, child.wait()).await;
        }
    }

    /// The service is gone: so must be what names it.
    fn forget(&self, pid: i32) {
        for path in [self.layout.journal(self.service.name, pid), self.layout.socket(self.service.name)] {
            // The gateway has no socket, and a service may have removed its own.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn describe(ended: io::Result<ExitStatus>) -> String {
    match ended {
        Ok(status) => format!("ended ({status})"),
        Err(error) => format!("was lost: {error}"),
    }
}

fn pause_after(in_a_row: u32) -> Duration {
    let doublings = in_a_row.saturating_sub(1).min(16);
    FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let pauses: Vec<_> = [1, 2, 3, 4, 5, u32::MAX].map(|n| pause_after(n).as_millis()).into();
        assert_eq!(pauses, [200, 400, 800, 1600, 2000, 2000]);
    }
}

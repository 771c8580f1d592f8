//! The mesh, from start to stop.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{config::Target, failure::Failure};

use super::{
    identity::Identity,
    key,
    layout::{Layout, Mesh},
    log,
    plan::{AGENT, GATEWAY, Plan, SCHEDULER},
    readiness::{self, Expected, Stage},
    report::{Ready, Reporter},
    stop,
    supervisor::{Ended, Supervision},
};

/// How often what is waited for is shown.
const SHOW_INTERVAL: Duration = Duration::from_millis(200);
/// A service that ends so often in a row before the mesh is ready will not come up.
const HOPELESS: u32 = 5;

/// Said when a mesh that was taken over does not come up.
const VMS_ARE_KEPT: &str =
    "the sandboxes of the mesh before are kept: `oc up` takes them over, `oc down` ends them";

/// Runs the mesh until a signal ends it.
pub async fn run(plan: &Plan, reporter: &mut Reporter) -> Result<(), Failure> {
    let since = Instant::now();
    let mut signals = Signals::new()?;
    let layout = &plan.layout;
    layout.prepare()?;
    let Some(_lock) = layout.lock()? else { return Err(running_already(layout)) };
    stop::leftovers(layout, reporter).await?;

    // Only an older mesh's file says that there may be microVMs already. One that cannot be read says so too.
    let took_over = !layout.read_mesh().is_ok_and(|mesh| mesh.is_none());
    let prepared = prepare(plan);
    let (target, address, mut supervision) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => {
            if took_over {
                reporter.note(VMS_ARE_KEPT);
            } else {
                layout.remove_run()?;
            }
            return Err(failure);
        }
    };
    let mut is_ready = false;
    let served = tokio::select! {
        served = serve(plan, &target, address, since, &mut supervision, reporter, &mut is_ready) => served,
        () = signals.next() => Ok(()),
    };

    // What was taken over is somebody's sandboxes: they do not end because this attempt did, unasked.
    let keeps_vms = took_over && served.is_err();
    let force = supervision.force();
    reporter.progress("stopping");
    let stopping = async {
        if keeps_vms {
            supervision.stop().await;
            return Ok(());
        }
        if is_ready {
            tokio::select! {
                () = stop::delete_sandboxes(&target, &plan.host_id) => {}
                () = force.cancelled() => {}
            }
        }
        supervision.stop().await;
        stop::clean_up(layout, &plan.bin_dir, &plan.host_id).await?;
        layout.remove_run()
    };
    let mut stopping = std::pin::pin!(stopping);
    let stopped = loop {
        tokio::select! {
            stopped = &mut stopping => break stopped,
            // Whoever asks twice means at once. What the microVMs leave is cleaned up all the same.
            () = signals.next() => force.cancel(),
        }
    };
    reporter.quiet();
    if keeps_vms {
        reporter.note(VMS_ARE_KEPT);
    }
    // What went wrong first explains what went wrong next.
    served.and(stopped)
}

fn prepare(plan: &Plan) -> Result<(Target, SocketAddr, Supervision), Failure> {
    let layout = &plan.layout;
    let key = key::ensure(&layout.api_key(), &layout.new_api_key())?;
    if plan.own_store {
        layout.prepare_store()?;
    }
    let address = plan.free_address()?;
    plan.ensure_certificates(address)?;
    let url = plan.local_url(address);
    let target = Target { ca_file: layout.ca_of(&url), url, key: key.expose().to_owned() };
    let supervisor =
        Identity::current().map_err(|error| Failure::local("cannot read /proc of this process", error))?;
    layout.write_mesh(&Mesh {
        supervisor: supervisor.clone(),
        url: target.url.clone(),
        host_id: plan.host_id.clone(),
        bin_dir: plan.bin_dir.clone(),
    })?;
    let supervision = Supervision::start(plan.services(address, &key), layout, &supervisor);
    Ok((target, address, supervision))
}

/// Waits until the mesh is ready, says so, and watches over it; ends only with a failure.
async fn serve(
    plan: &Plan,
    target: &Target,
    address: SocketAddr,
    since: Instant,
    supervision: &mut Supervision,
    reporter: &mut Reporter,
    is_ready: &mut bool,
) -> Result<(), Failure> {
    let stage = Stage::default();
    let expected = Expected {
        address,
        target,
        host_id: &plan.host_id,
        pool: plan.fills_pool(),
        patience: plan.ready_timeout,
    };
    let mut waiting = std::pin::pin!(readiness::wait(&expected, &stage));
    let mut show = interval(SHOW_INTERVAL);
    let node = loop {
        tokio::select! {
            node = &mut waiting => break node.map_err(|failure| explain(failure, &plan.layout))?,
            ended = supervision.ended() => {
                if ended.in_a_row >= HOPELESS {
                    return Err(hopeless(&ended, &plan.layout));
                }
                reporter.note(&describe(&ended));
            }
            _ = show.tick() => reporter.progress(&stage.text()),
        }
    };
    *is_ready = true;
    if expected.pool && node.pool_ready == 0 {
        reporter.note("the pool is still empty: sandboxes start cold until it fills; see log/vmm-agent.log");
    }
    reporter.ready(&Ready {
        url: target.url.clone(),
        host_id: node.node_id,
        accelerator: node.accelerator,
        vmm: node.vmm,
        pool_ready: node.pool_ready,
        state_dir: plan.layout.root().to_owned(),
        pid: nix::unistd::getpid().as_raw(),
        took_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
    })?;

    let mut check = interval(log::CHECK_INTERVAL);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            ended = supervision.ended() => reporter.note(&describe(&ended)),
            _ = check.tick() => {
                for service in [SCHEDULER, AGENT, GATEWAY] {
                    if let Err(error) = log::bound(&plan.layout.log(service)) {
                        reporter.note(&format!("cannot shorten the log of {service}: {error}"));
                    }
                }
            }
        }
    }
}

fn describe(ended: &Ended) -> String {
    format!("{} {}; starting it again in {} ms", ended.service, ended.how, ended.pause.as_millis())
}

fn hopeless(ended: &Ended, layout: &Layout) -> Failure {
    let path = layout.log(ended.service);
    let message =
        format!("{} {}; {} says:\n{}", ended.service, ended.how, path.display(), log::tail(&path, 5));
    Failure::NotReady(message.trim_end().to_owned())
}

fn explain(failure: Failure, layout: &Layout) -> Failure {
    match failure {
        Failure::NotReady(message) => {
            Failure::NotReady(format!("{message}; logs are in {}", layout.root().join("log").display()))
        }
        other => other,
    }
}

fn running_already(layout: &Layout) -> Failure {
    let who = match layout.read_mesh() {
        Ok(Some(mesh)) => format!(" (process {}, {})", mesh.supervisor.pid(), mesh.url),
        _ => String::new(),
    };
    Failure::Conflict(format!("a mesh runs in {} already{who}: `oc down` stops it", layout.root().display()))
}

/// The signals that end a mesh. Listened to from the start: none may kill a supervisor that has services.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::local("cannot listen to signals", error));
        Ok(Self([
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

//! What the agent is made of, and the order in which it comes up and goes down.
//!
//! Up: lock, backend, recovery, socket, seclusion, membership, pool. Nothing is served before every VM of an earlier agent has
//! its task, and no scheduler sees the host before it can be called. Down: out of the membership, calls drained, clones
//! of the pool removed, VMs let go of. VMs of sandboxes run on.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::routing::get;
use oc_mesh::{serve::Serve, store};
use oc_proto::mesh::{HostRecord, agent_service_server::AgentServiceServer};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tracing::info;

use crate::{
    backend::Backend,
    config::Config,
    data_plane::{AgentSessionPlane, ExecPlane, FilePlane, NetworkPlane, PortPlane},
    host::Host,
    journal,
    lock::{Lock, LockError},
    membership::{self, Changing},
    microvm::MakeError,
    pool::Pool,
    rpc::AgentRpc,
    seclusion::Seclusion,
    telemetry,
    workshop::Workshop,
};

/// Calls that are answered at once: many sandboxes with hundreds of streams each, nearly all of them idle.
const MAX_CALLS: usize = 16_384;
/// A command without a timeout may take as long as a sandbox may be idle at most.
const MAX_DEADLINE: Duration = Duration::from_secs(31 * 24 * 3600);
/// How long starts and deletions may take when the agent ends.
const LEAVE_WITHIN: Duration = Duration::from_secs(15);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The data directory.
    #[error("cannot use the data directory {}", .0.display())]
    DataDir(PathBuf, #[source] io::Error),
    /// Another agent has it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What an earlier agent left cannot be found out.
    #[error("cannot take over what an earlier agent left")]
    Recovery(#[source] MakeError),
    /// The record store.
    #[error("cannot use the record store")]
    Store(#[from] store::StoreError),
    /// The host's packet filter.
    #[error("cannot keep guests from the parts of the mesh")]
    Seclusion(#[source] io::Error),
    /// The endpoint.
    #[error(transparent)]
    Serve(#[from] oc_mesh::serve::ServeError),
}

/// Makes the data directory, traversable for the users that VMMs run as, and locks it.
///
/// # Errors
///
/// [`AppError`] if it cannot be made or another agent works on it.
pub fn claim(data_dir: &Path) -> Result<Lock, AppError> {
    let failed = |error| AppError::DataDir(data_dir.to_owned(), error);
    DirBuilder::new().recursive(true).mode(0o711).create(data_dir).map_err(failed)?;
    std::fs::set_permissions(data_dir, std::fs::Permissions::from_mode(0o711)).map_err(failed)?;
    Ok(Lock::take(data_dir)?)
}

/// Runs the agent until `shutdown`. The caller holds the [`Lock`] of the data directory.
///
/// # Errors
///
/// [`AppError`] if it cannot come up, or serving breaks.
pub async fn run(
    config: Config,
    backend: Arc<dyn Backend>,
    shutdown: CancellationToken,
) -> Result<(), AppError> {
    telemetry::describe();
    let failed = |error| AppError::DataDir(config.data_dir.clone(), error);
    let boot_id = journal::boot_id().map_err(failed)?;
    let workshop = Arc::new(Workshop::open(backend.clone(), &config.data_dir, boot_id).map_err(failed)?);
    let pool = Pool::new(workshop.clone(), config.pool.clone());
    let host = Host::open(workshop, pool.clone(), config.limits, config.paused).map_err(failed)?;
    host.recover().await.map_err(AppError::Recovery)?;

    // What ends first: the membership with the signal, the pool after the last call.
    let (tasks, calls_done) = (TaskTracker::new(), CancellationToken::new());
    let bound = Serve {
        listen: config.listen.clone(),
        routes: routes(&host, backend.accelerator(), &shutdown),
        max_concurrent: MAX_CALLS,
        max_deadline: MAX_DEADLINE,
        shutdown: shutdown.clone(),
    }
    .bind()
    .await?;
    let endpoint = bound.endpoint();
    let store = store::open(&config.store).await?;
    let seclusion = Seclusion::begin(backend.clone(), store.clone(), &config.store, &shutdown).await?;
    let member = membership::keep(
        store,
        host_record(&config, endpoint.to_string(), backend.as_ref()),
        config.data_dir.clone(),
        Changing { pool_ready: pool.ready(), object_store_id: backend.object_store_id() },
        shutdown.clone(),
    )
    .await?;
    tasks.spawn(member);
    tasks.spawn(seclusion.keep(shutdown.clone()));
    tasks.spawn(pool.run(calls_done.clone()));
    tasks.spawn(host.clone().relieve(calls_done.clone()));
    tasks.close();
    info!(%endpoint, host_id = config.host_id, accelerator = backend.accelerator(), vmm = backend.vmm(), "ready");

    let served = bound.run().await;
    // Also when serving broke by itself.
    shutdown.cancel();
    calls_done.cancel();
    host.leave(LEAVE_WITHIN).await;
    tasks.wait().await;
    Ok(served?)
}

fn routes(host: &Host, accelerator: &str, draining: &CancellationToken) -> Routes {
    let services = Routes::new(AgentServiceServer::new(AgentRpc::new(host.clone(), accelerator.to_owned())))
        .add_service(ExecPlane::new(host.clone(), draining.clone()))
        .add_service(FilePlane::new(host.clone(), draining.clone()))
        .add_service(NetworkPlane::new(host.clone(), draining.clone()))
        .add_service(PortPlane::new(host.clone(), draining.clone()))
        .add_service(AgentSessionPlane::new(host.clone(), draining.clone()));
    let metrics = get(|| async { oc_mesh::telemetry::render_metrics() });
    services.into_axum_router().route("/metrics", metrics).into()
}

fn host_record(config: &Config, endpoint: String, backend: &dyn Backend) -> HostRecord {
    let startable = backend.startable();
    HostRecord {
        host_id: config.host_id.clone(),
        endpoint,
        region: config.region.clone(),
        accelerator: backend.accelerator().to_owned(),
        vmm: backend.vmm(),
        version: oc_mesh::VERSION.to_owned(),
        templates: backend.templates(),
        snapshot_keys: startable.snapshot_keys,
        base_digests: startable.base_digests,
        max_sandboxes: i32::try_from(config.limits.max_sandboxes).unwrap_or(i32::MAX),
        memory_capacity_mb: i64::try_from(config.memory_capacity_mb).unwrap_or(i64::MAX),
        pool_ready: 0,
        disk_free_mb: 0,
        object_store_id: String::new(),
    }
}

//! What the scheduler is made of, and the order in which it comes up and goes down.
//!
//! Up: copies of the records, keys, ledger, socket, reconciliation, membership. No gateway sees it before it answers.
//! Down: out of the membership, watches ended, calls drained, flows finished, reconciliation stopped, ledger emptied.

use std::{sync::Arc, time::Duration};

use axum::routing::get;
use oc_mesh::{
    clock::SharedClock,
    endpoint::Endpoint,
    file_url::FileUrlSigner,
    keys,
    membership::{DEFAULT_TTL, Registration},
    serve::{Bound, Serve, ServeError},
    store::{SharedStore, StoreError},
    token::{TokenError, TokenSigner},
    view::View,
};
use oc_proto::{
    mesh::SchedulerRecord,
    v1::{
        checkpoint_service_server::CheckpointServiceServer, file_url_service_server::FileUrlServiceServer,
        key_service_server::KeyServiceServer, node_service_server::NodeServiceServer,
        preview_service_server::PreviewServiceServer, sandbox_service_server::SandboxServiceServer,
    },
};
use prost::Message as _;
use thiserror::Error;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use crate::{
    bootstrap,
    checkpoints::Checkpoints,
    config::Config,
    flows::Flows,
    previews::Previews,
    reconcile::{Pace, Reconciler},
    rpc::{
        checkpoints::CheckpointRpc,
        file_urls::FileUrlRpc,
        keys::KeyRpc,
        nodes::NodeRpc,
        present::Presenter,
        previews::PreviewRpc,
        sandboxes::{MAX_DEADLINE, SandboxRpc},
        watch::Watches,
    },
    sandboxes::Sandboxes,
    telemetry,
};

/// How long flows may go on after the last call.
const FLOW_GRACE: Duration = Duration::from_secs(10);
/// How long the ledger may take for what it still has to write. A store that does not answer must not keep a scheduler
/// that is told to stop; what is not written is as if the process had died, and is reconciled.
const LEDGER_GRACE: Duration = Duration::from_secs(5);

/// Why the scheduler cannot run.
#[derive(Debug, Error)]
pub enum AppError {
    /// The record store.
    #[error("cannot use the record store")]
    Store(#[from] StoreError),
    /// The keys that sign tokens.
    #[error("cannot sign tokens")]
    Token(#[from] TokenError),
    /// The endpoint.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// A scheduler that has bound its endpoint and is a member.
#[derive(Debug)]
pub struct App {
    bound: Bound,
    registration: Registration,
    flows: Flows,
    reconciling: CancellationToken,
    views: CancellationToken,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl App {
    /// Brings a scheduler up. It serves once [`run`](Self::run) is called, until `stop`.
    ///
    /// # Errors
    ///
    /// [`AppError`].
    pub async fn start(
        config: &Config,
        store: SharedStore,
        clock: SharedClock,
        pace: Pace,
        stop: CancellationToken,
    ) -> Result<Self, AppError> {
        telemetry::describe();
        let (views, reconciling, tasks) =
            (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
        // Ends the copies if anything below fails.
        let unfinished = views.clone().drop_guard();
        let hosts = View::start(store.clone(), keys::HOSTS, views.clone()).await?;
        let schedulers = View::start(store.clone(), keys::SCHEDULERS, views.clone()).await?;
        let signer = TokenSigner::ensure(&store).await?;
        if let Some(hash) = &config.bootstrap_key_hash {
            bootstrap::ensure_key(store.as_ref(), hash, &config.bootstrap_tenant, clock.now()).await?;
        }

        let opened =
            Sandboxes::open(store.clone(), hosts.clone(), config.quota(), clock.clone(), views.clone());
        let (sandboxes, writer) = opened.await?;
        tasks.spawn(writer);
        let (activity, flows) = (sandboxes.activity.clone(), sandboxes.flows.clone());
        let checkpoints = Checkpoints::new(sandboxes.clone(), store.clone(), views.clone()).await?;
        let previews = Previews::new(sandboxes.clone(), store.clone(), views.clone()).await?;
        let presenter = Arc::new(Presenter { signer, hosts: hosts.clone(), activity });
        let watches = Watches::new(store.clone(), sandboxes.clone(), presenter.clone(), stop.clone());
        let routes = routes(
            SandboxRpc::new(sandboxes.clone(), presenter.clone(), watches),
            CheckpointRpc::new(checkpoints.clone(), presenter),
            KeyRpc::new(store.clone(), clock),
            NodeRpc::new(store.clone(), hosts, sandboxes.clone()),
            PreviewRpc::new(previews.clone(), config.own_names.clone()),
            FileUrlRpc::new(sandboxes.clone(), FileUrlSigner::ensure(&store).await?),
        );
        let bound = Serve {
            listen: config.listen.clone(),
            routes,
            max_concurrent: config.max_calls,
            max_deadline: MAX_DEADLINE,
            shutdown: stop.clone(),
        }
        .bind()
        .await?;

        let scheduler_id = config.scheduler_id();
        let member = SchedulerRecord {
            scheduler_id: scheduler_id.clone(),
            endpoint: bound.endpoint().to_string(),
            version: oc_mesh::VERSION.into(),
        };
        let key = keys::scheduler(&scheduler_id);
        let registration =
            Registration::start(store.clone(), key, member.encode_to_vec().into(), DEFAULT_TTL).await?;
        let reconciler = Reconciler {
            sandboxes,
            checkpoints,
            previews,
            store,
            schedulers,
            scheduler_id: scheduler_id.clone(),
            pace,
        };
        tasks.spawn(reconciler.run(reconciling.clone()));
        tasks.close();
        unfinished.disarm();
        tracing::info!(scheduler_id, endpoint = member.endpoint, "ready");
        Ok(Self { bound, registration, flows, reconciling, views, tasks, stop })
    }

    /// Where it listens.
    pub fn endpoint(&self) -> Endpoint {
        self.bound.endpoint()
    }

    /// Serves until it is told to stop, then goes down in order.
    ///
    /// # Errors
    ///
    /// Serving broke.
    pub async fn run(self) -> Result<(), AppError> {
        let Self { bound, registration, flows, reconciling, views, tasks, stop } = self;
        let leaving = stop.clone();
        let leave = async move {
            leaving.cancelled().await;
            registration.leave().await;
        };
        let serve = async move {
            let served = bound.run().await;
            // Also when serving broke by itself.
            stop.cancel();
            served
        };
        let (served, ()) = tokio::join!(serve, leave);
        flows.finish(FLOW_GRACE).await;
        reconciling.cancel();
        if tokio::time::timeout(LEDGER_GRACE, tasks.wait()).await.is_err() {
            tracing::warn!(tasks = tasks.len(), "the ledger did not end in time and is cut off");
        }
        views.cancel();
        tracing::info!("stopped");
        Ok(served?)
    }
}

fn routes(
    sandboxes: SandboxRpc,
    checkpoints: CheckpointRpc,
    keys: KeyRpc,
    nodes: NodeRpc,
    previews: PreviewRpc,
    file_urls: FileUrlRpc,
) -> Routes {
    let services = Routes::new(SandboxServiceServer::new(sandboxes))
        .add_service(CheckpointServiceServer::new(checkpoints))
        .add_service(KeyServiceServer::new(keys))
        .add_service(NodeServiceServer::new(nodes))
        .add_service(PreviewServiceServer::new(previews))
        .add_service(FileUrlServiceServer::new(file_urls));
    let metrics = get(|| async { oc_mesh::telemetry::render_metrics() });
    services.into_axum_router().route("/metrics", metrics).into()
}

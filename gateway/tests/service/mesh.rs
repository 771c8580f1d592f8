//! A gateway with everything around it.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use oc_gateway::{
    app::{App, Settings},
    listener::{self, Limits, workers::Workers},
    preview, ws,
};
use oc_mesh::{
    api_key::ApiKey,
    clock::SystemClock,
    endpoint::Endpoint,
    file_url::FileUrlSigner,
    handoff::{self, Handoffs},
    keys, record,
    store::{self, SharedStore, Txn, TxnOutcome},
    token::TokenSigner,
};
use oc_proto::{
    mesh::{HostRecord, KeyRecord, SandboxRecord, SandboxTransition, SchedulerRecord},
    v1::{
        SandboxState, agent_session_service_server::AgentSessionServiceServer,
        checkpoint_service_server::CheckpointServiceServer, exec_service_server::ExecServiceServer,
        file_service_server::FileServiceServer, file_url_service_server::FileUrlServiceServer,
        key_service_server::KeyServiceServer, network_service_server::NetworkServiceServer,
        node_service_server::NodeServiceServer, port_service_server::PortServiceServer,
        preview_service_server::PreviewServiceServer, sandbox_service_server::SandboxServiceServer,
    },
};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, UnixListener},
    task::JoinSet,
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{agent::FakeAgent, scheduler::FakeScheduler};

/// The tenant `ours`' running sandbox.
pub const SANDBOX: &str = "sb-00000000000000000001";
/// The tenant `theirs`' running sandbox.
pub const FOREIGN: &str = "sb-00000000000000000002";
/// `ours`, in other states.
pub const DELETED: &str = "sb-00000000000000000003";
pub const FAILED: &str = "sb-00000000000000000004";
pub const CREATING: &str = "sb-00000000000000000005";
/// `ours`, on a host that is not a member.
pub const STRANDED: &str = "sb-00000000000000000006";
/// `ours`, hibernated.
pub const HIBERNATED: &str = "sb-00000000000000000007";
/// `ours`, hibernated, and no host has room for it.
pub const UNWAKABLE: &str = "sb-00000000000000000009";
/// `ours`, being put back to a checkpoint.
pub const RESTORING: &str = "sb-00000000000000000008";

pub struct Mesh {
    pub address: SocketAddr,
    pub agent: FakeAgent,
    pub scheduler: FakeScheduler,
    pub store: SharedStore,
    /// An administrator of `ours`.
    pub admin: String,
    /// A key of `ours` without administration.
    pub key: String,
    /// A key of `theirs`.
    pub foreign_key: String,
    signer: TokenSigner,
    pub urls: FileUrlSigner,
    pub app: Arc<App>,
    pub stop: CancellationToken,
    pub tasks: JoinSet<()>,
    pub directory: TempDir,
}

impl Mesh {
    pub async fn start() -> Self {
        Self::with_limits(Limits::default(), 4096).await
    }

    pub async fn with_limits(limits: Limits, max_requests: usize) -> Self {
        Self::with(limits, |settings| settings.max_requests = max_requests).await
    }

    /// A mesh whose gateway's settings are changed first.
    pub async fn with(limits: Limits, change: impl FnOnce(&mut Settings)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().join("store.db").display());
        let store = store::open(&url).await.unwrap();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();

        let agent = FakeAgent::default();
        let files = FileServiceServer::new(agent.clone()).max_decoding_message_size(64 << 20);
        let routes = Routes::new(ExecServiceServer::new(agent.clone()))
            .add_service(files)
            .add_service(PortServiceServer::new(agent.clone()))
            .add_service(NetworkServiceServer::new(agent.clone()))
            .add_service(AgentSessionServiceServer::new(agent.clone()));
        let socket = directory.path().join("agent.sock");
        let handoffs = handoff::socket_of(&Endpoint::Unix(socket.clone())).unwrap();
        *agent.0.handoffs.lock() = Some(Handoffs::open(&handoffs).await.unwrap());
        serve(&mut tasks, &stop, &socket, routes);
        let scheduler = FakeScheduler::default();
        scheduler.2.set(Arc::clone(&store)).unwrap();
        let routes = Routes::new(SandboxServiceServer::new(scheduler.clone()))
            .add_service(CheckpointServiceServer::new(scheduler.clone()))
            .add_service(KeyServiceServer::new(scheduler.clone()))
            .add_service(NodeServiceServer::new(scheduler.clone()))
            .add_service(PreviewServiceServer::new(scheduler.clone()))
            .add_service(FileUrlServiceServer::new(scheduler.clone()));
        serve(&mut tasks, &stop, &directory.path().join("scheduler.sock"), routes);

        let endpoint = |name: &str| format!("unix://{}", directory.path().join(name).display());
        let host =
            HostRecord { host_id: "host-a".into(), endpoint: endpoint("agent.sock"), ..Default::default() };
        put(&store, &keys::host("host-a"), &host).await;
        let record = SchedulerRecord {
            scheduler_id: "s".into(),
            endpoint: endpoint("scheduler.sock"),
            ..Default::default()
        };
        put(&store, &keys::scheduler("s"), &record).await;
        for (id, tenant, state, host) in [
            (SANDBOX, "ours", SandboxState::Running, "host-a"),
            (FOREIGN, "theirs", SandboxState::Running, "host-a"),
            (DELETED, "ours", SandboxState::Deleted, "host-a"),
            (FAILED, "ours", SandboxState::Failed, "host-a"),
            (CREATING, "ours", SandboxState::Creating, "host-a"),
            (STRANDED, "ours", SandboxState::Running, "host-gone"),
            (HIBERNATED, "ours", SandboxState::Hibernated, "host-a"),
            (UNWAKABLE, "ours", SandboxState::Hibernated, "host-a"),
        ] {
            put(&store, &keys::sandbox(id), &sandbox_record(id, tenant, state, host)).await;
        }
        let restoring = SandboxRecord {
            transition: SandboxTransition::Restoring.into(),
            ..sandbox_record(RESTORING, "ours", SandboxState::Running, "host-a")
        };
        put(&store, &keys::sandbox(RESTORING), &restoring).await;
        let admin = put_key(&store, "ours", true).await;
        let key = put_key(&store, "ours", false).await;
        let foreign_key = put_key(&store, "theirs", false).await;
        let signer = TokenSigner::ensure(&store).await.unwrap();
        let urls = FileUrlSigner::ensure(&store).await.unwrap();

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut settings = Settings {
            public_url: format!("http://{address}"),
            max_requests: 4096,
            websockets: ws::Limits::default(),
            preview_domain: preview::DEFAULT_DOMAIN.into(),
            own_names: preview::host::OwnNames::default(),
            previews: preview::Limits::default(),
            allowed_origins: vec!["*".into()],
            trusted_proxies: vec![],
            linger: listener::LINGER,
        };
        change(&mut settings);
        let app = App::new(store.clone(), settings, Arc::new(SystemClock), stop.clone(), stop.clone())
            .await
            .unwrap();
        let workers = Workers::here();
        tasks.spawn(listener::serve(listener, None, Arc::clone(&app), limits, workers, stop.clone()));
        Self {
            address,
            agent,
            scheduler,
            store,
            admin,
            key,
            foreign_key,
            signer,
            urls,
            app,
            stop,
            tasks,
            directory,
        }
    }

    /// A token that is valid now.
    pub fn token(&self, sandbox: &str) -> String {
        self.signer.sign("ours", sandbox, SystemTime::now()).unwrap().0
    }

    /// A token that was valid an hour ago.
    pub fn expired_token(&self, sandbox: &str) -> String {
        self.signer.sign("ours", sandbox, SystemTime::now() - Duration::from_secs(3600)).unwrap().0
    }

    /// A token whose signature is another's.
    pub fn forged_token(&self) -> String {
        let token = self.token(SANDBOX);
        let other = self.token(FOREIGN);
        let (claims, _) = token.rsplit_once('.').unwrap();
        let (_, signature) = other.rsplit_once('.').unwrap();
        format!("{claims}.{signature}")
    }
}

pub fn sandbox_record(id: &str, tenant: &str, state: SandboxState, host: &str) -> SandboxRecord {
    SandboxRecord {
        sandbox_id: id.into(),
        tenant: tenant.into(),
        state: state.into(),
        host_id: host.into(),
        ..Default::default()
    }
}

pub async fn put<M: prost::Message>(store: &SharedStore, key: &str, message: &M) {
    let txn = Txn { compare: vec![], then: vec![record::put(key, message)] };
    assert!(matches!(store.txn(txn).await.unwrap(), TxnOutcome::Committed(_)));
}

pub async fn put_key(store: &SharedStore, tenant: &str, admin: bool) -> String {
    let key = ApiKey::generate().unwrap();
    let record = KeyRecord { tenant: tenant.into(), admin, ..Default::default() };
    put(store, &keys::api_key(&key.hash()), &record).await;
    key.expose().to_owned()
}

fn serve(tasks: &mut JoinSet<()>, stop: &CancellationToken, path: &Path, routes: Routes) {
    let listener = UnixListener::bind(path).unwrap();
    let stop = stop.clone();
    tasks.spawn(async move {
        tonic::transport::Server::builder()
            .add_routes(routes)
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
            .await
            .unwrap();
    });
}

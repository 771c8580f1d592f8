//! A mesh without microVMs: the public services over maps, on a port of the loopback.

pub mod agents;
pub mod checkpoints;
pub mod exec;
pub mod files;
pub mod ports;
pub mod previews;
pub mod sandboxes;
pub mod sessions;
pub mod shell;
pub mod watch;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use oc_proto::v1::{
    agent_session_service_server::AgentSessionServiceServer,
    checkpoint_service_server::CheckpointServiceServer, exec_service_server::ExecServiceServer,
    file_service_server::FileServiceServer, file_url_service_server::FileUrlServiceServer,
    key_service_server::KeyServiceServer, node_service_server::NodeServiceServer,
    port_service_server::PortServiceServer, preview_service_server::PreviewServiceServer,
    sandbox_service_server::SandboxServiceServer,
};
use tokio::{net::TcpListener, sync::oneshot};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Status, service::Routes, transport::Server};
use tonic_types::{ErrorDetails, StatusExt as _};

pub use sandboxes::State;
use sessions::Session;

/// An error as the mesh gives it.
pub fn refused(code: Code, reason: &str, message: &str) -> Status {
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, "oc", []))
}

/// Serves until the process ends. Without a key every key will do.
pub async fn serve(listener: TcpListener, key: Option<String>, state: Arc<Mutex<State>>) {
    let check = move |request: Request<()>| {
        let given = request.metadata().get("x-api-key").and_then(|value| value.to_str().ok());
        match (given, &key) {
            (None, _) => Err(refused(Code::Unauthenticated, "UNAUTHENTICATED", "no API key")),
            (Some(given), Some(key)) if given != key => {
                Err(refused(Code::PermissionDenied, "INVALID_CREDENTIALS", "wrong API key"))
            }
            _ => Ok(request),
        }
    };
    let router = Routes::new(SandboxServiceServer::with_interceptor(
        sandboxes::Sandboxes(Arc::clone(&state)),
        check.clone(),
    ))
    .add_service(KeyServiceServer::with_interceptor(sandboxes::Sandboxes(Arc::clone(&state)), check.clone()))
    .add_service(NodeServiceServer::with_interceptor(sandboxes::Sandboxes(Arc::clone(&state)), check.clone()))
    .add_service(CheckpointServiceServer::with_interceptor(
        checkpoints::Checkpoints(Arc::clone(&state)),
        check.clone(),
    ))
    .add_service(ExecServiceServer::with_interceptor(exec::Exec(Arc::clone(&state)), check.clone()))
    .add_service(AgentSessionServiceServer::with_interceptor(
        agents::Agents(Arc::clone(&state)),
        check.clone(),
    ))
    .add_service(PortServiceServer::with_interceptor(ports::Ports(Arc::clone(&state)), check.clone()))
    .add_service(PreviewServiceServer::with_interceptor(
        previews::Previews(Arc::clone(&state)),
        check.clone(),
    ))
    .add_service(FileUrlServiceServer::with_interceptor(files::Files(Arc::clone(&state)), check.clone()))
    .add_service(FileServiceServer::with_interceptor(files::Files(state), check))
    .into_axum_router()
    .route("/readyz", axum::routing::get(async || "ready"));
    Server::builder()
        .accept_http1(true)
        .add_routes(Routes::from(router))
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await
        .unwrap();
}

/// A mesh in this process.
pub struct Fake {
    pub address: SocketAddr,
    pub state: Arc<Mutex<State>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Fake {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, address) = std::sync::mpsc::channel();
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                tokio::select! {
                    () = serve(listener, Some(KEY.to_owned()), shared) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address: address.recv().unwrap(), state, stop: Some(stop), thread: Some(thread) }
    }
}

impl Fake {
    /// Looks at a session, or does something to it.
    pub fn session<T>(&self, id: &str, look: impl FnOnce(&mut Session) -> T) -> T {
        exec::change_sessions(&self.state, |sessions| look(sessions.find(id).unwrap()))
    }

    /// Waits until something is true of all that happened.
    pub fn until(&self, what: &str, mut condition: impl FnMut(&State) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition(&self.state.lock().unwrap()) {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// The key that a fake mesh takes.
pub const KEY: &str = "osb_0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

//! A server, nginx before it, and a gateway before it.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
    pin::Pin,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use bytes::BytesMut;
use futures_util::{Stream, StreamExt as _, stream};
use oc_integration::{mesh::eventually, prepared};
use oc_mesh::{
    endpoint::Endpoint,
    handoff::{self, Handoffs},
    keys, record,
    store::{self, Txn},
};
use oc_proto::{
    mesh::{HostRecord, SandboxRecord},
    v1::{
        ForwardPortRequest, ForwardPortResponse, SandboxState,
        port_service_server::{PortService, PortServiceServer},
    },
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixListener},
    process::{Child, Command},
    task::JoinSet,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// A sandbox on a host that shares a machine with the gateway, and one whose host does not.
const SANDBOXES: [(&str, &str); 2] =
    [("near", "sb-00000000000000000000"), ("far", "sb-00000000000000000001")];

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// Address of the proxy.
    pub address: SocketAddr,
    /// Host that they name.
    pub host: String,
}

/// All of it.
pub struct Bed {
    /// nginx.
    pub nginx: Proxy,
    /// The gateway, to a host on its machine.
    pub near: Proxy,
    /// The gateway, to a host that cannot hand connections over.
    pub far: Proxy,
    /// Its process.
    pub gateway_pid: i32,
    children: Vec<Child>,
    agents: JoinSet<()>,
    _directory: tempfile::TempDir,
}

impl Bed {
    /// Starts everything; the server's large answer has so many MiB.
    pub async fn start(bulk_mib: usize) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path();
        fs::create_dir(path.join("www"))?;
        fs::write(path.join("www/big"), vec![0; bulk_mib << 20])?;
        fs::write(path.join("www/small"), "hello")?;
        let (server, proxy) = (free_port()?, free_port()?);
        fs::write(path.join("nginx.conf"), config(path, server, proxy))?;
        let nginx = Command::new(prepared::tool("nginx/usr/sbin/nginx")?)
            .arg("-p")
            .arg(path)
            .args(["-c", "nginx.conf", "-e", "error.log"])
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;

        let url = format!("file://{}", path.join("store.db").display());
        let (records, mut agents) = (store::open(&url).await?, JoinSet::new());
        for (name, sandbox_id) in SANDBOXES {
            let endpoint = Endpoint::Unix(path.join(name));
            let handoffs = handoff::socket_of(&endpoint).filter(|_| name == "near");
            agents.spawn(agent(&path.join(name), handoffs.as_deref()).await?);
            let host =
                HostRecord { host_id: name.into(), endpoint: endpoint.to_string(), ..Default::default() };
            let sandbox = SandboxRecord {
                sandbox_id: sandbox_id.into(),
                tenant: "bench".into(),
                state: SandboxState::Running.into(),
                host_id: name.into(),
                ..Default::default()
            };
            let then =
                vec![record::put(keys::host(name), &host), record::put(keys::sandbox(sandbox_id), &sandbox)];
            records.txn(Txn { compare: vec![], then }).await?;
        }
        let log = path.join("gateway.log");
        let gateway = Command::new(prepared::binaries()?.join("oc-gateway"))
            .args(["--store", &url, "--listen", "127.0.0.1:0"])
            .stderr(fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()?;
        let address = eventually("the gateway", async || {
            let text = fs::read_to_string(&log)?;
            let ready = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let ready = ready.into_iter().find(|line| line["message"] == "ready").context("not ready")?;
            Ok(ready["address"].as_str().context("no address")?.parse()?)
        })
        .await?;
        let gateway_pid = i32::try_from(gateway.id().context("it ended")?)?;
        let [near, far] =
            SANDBOXES.map(|(_, id)| Proxy { address, host: format!("{id}-p{server}.preview.localhost") });
        let bed = Self {
            nginx: Proxy { address: SocketAddr::from(([127, 0, 0, 1], proxy)), host: "localhost".into() },
            near,
            far,
            gateway_pid,
            children: vec![nginx, gateway],
            agents,
            _directory: directory,
        };
        for proxy in [&bed.nginx, &bed.near, &bed.far] {
            eventually("a proxy", async || super::load::hold(proxy, 1).await).await?;
        }
        Ok(bed)
    }

    /// Ends everything.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.agents.shutdown().await;
        for child in &mut self.children {
            // nginx's workers end with their master only if that is asked to.
            let pid = child.id().context("it ended by itself")?.to_string();
            ensure!(Command::new("kill").args(["-TERM", &pid]).status().await?.success(), "kill {pid}");
            tokio::time::timeout(Duration::from_secs(20), child.wait()).await??;
        }
        Ok(())
    }
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// As Debian's, but for what a proxy with kept connections needs.
fn config(path: &Path, server: u16, proxy: u16) -> String {
    let path = path.display();
    format!(
        "user root; daemon off; worker_processes 2; pid {path}/nginx.pid;\n\
         events {{ worker_connections 16384; }}\n\
         http {{\n\
         client_body_temp_path {path}/t1; proxy_temp_path {path}/t2; fastcgi_temp_path {path}/t3;\n\
         uwsgi_temp_path {path}/t4; scgi_temp_path {path}/t5;\n\
         sendfile on; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 300;\n\
         upstream up {{ server 127.0.0.1:{server}; keepalive 128; keepalive_requests 100000000; }}\n\
         server {{ listen 127.0.0.1:{server} backlog=4096; access_log off; root {path}/www; }}\n\
         server {{ listen 127.0.0.1:{proxy} backlog=4096; access_log {path}/access.log;\n\
         location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection \"\";\n\
         proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr; proxy_max_temp_file_size 0; }} }}\n\
         }}\n"
    )
}

/// An agent that has ports of this machine for ports of sandboxes.
#[derive(Clone, Debug)]
struct Agent {
    handoffs: Option<Handoffs>,
}

async fn agent(path: &Path, handoffs: Option<&Path>) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let handoffs = match handoffs {
        Some(path) => Some(Handoffs::open(path).await?),
        None => None,
    };
    let listener = UnixListener::bind(path)?;
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(2 << 20)
        .initial_connection_window_size(1 << 30)
        .max_frame_size(512 << 10)
        .add_service(PortServiceServer::new(Agent { handoffs }))
        .serve_with_incoming(UnixListenerStream::new(listener));
    Ok(async move {
        if let Err(error) = server.await {
            eprintln!("an agent: {error}");
        }
    })
}

type Answers = Pin<Box<dyn Stream<Item = Result<ForwardPortResponse, Status>> + Send>>;

#[tonic::async_trait]
impl PortService for Agent {
    type ForwardPortStream = Answers;

    async fn forward_port(
        &self,
        request: Request<Streaming<ForwardPortRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let mut parts = request.into_inner();
        let first = parts.message().await?.ok_or_else(|| Status::invalid_argument("nothing"))?;
        let port = u16::try_from(first.port).map_err(|_| Status::invalid_argument("no port"))?;
        let broken = |error: std::io::Error| Status::aborted(error.to_string());
        let socket = TcpStream::connect(("127.0.0.1", port)).await.map_err(broken)?;
        socket.set_nodelay(true).map_err(broken)?;
        if let Some(handoffs) = &self.handoffs {
            let socket = socket.into_std().map_err(broken)?;
            let offer = handoffs.offer(&first.handoff_key, socket.into());
            let offer = offer.ok_or_else(|| Status::invalid_argument("no key"))?;
            let said = stream::iter([Ok(ForwardPortResponse { is_handed_over: true, ..Default::default() })]);
            let held = stream::once(offer.held_for(parts)).filter_map(async |held| held.err().map(Err));
            return Ok(Response::new(Box::pin(said.chain(held))));
        }
        let (read, mut write) = socket.into_split();
        tokio::spawn(async move {
            while let Ok(Some(part)) = parts.message().await {
                if write.write_all(&part.data).await.is_err() {
                    return;
                }
            }
        });
        let rest = stream::unfold(Some((read, BytesMut::new())), async |state| {
            let (mut read, mut buffer) = state?;
            buffer.reserve(256 << 10);
            match read.read_buf(&mut buffer).await {
                Ok(0) => Some((Ok(ForwardPortResponse::default()), None)),
                Ok(_) => {
                    let data = buffer.split().freeze();
                    let said = ForwardPortResponse { data, ..Default::default() };
                    Some((Ok(said), Some((read, buffer))))
                }
                Err(error) => Some((Err(Status::aborted(error.to_string())), None)),
            }
        });
        let open = stream::iter([Ok(ForwardPortResponse::default())]);
        Ok(Response::new(Box::pin(open.chain(rest))))
    }
}

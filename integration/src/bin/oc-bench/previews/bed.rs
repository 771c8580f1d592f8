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
use oc_integration::{mesh::eventually, prepared, processes};
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
    /// Its processes, as far as what they take is of interest.
    pub pids: Vec<i32>,
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
        let root = path.join("www").display().to_string();
        let serves =
            format!("server {{ listen 127.0.0.1:{server} backlog=4096; access_log off; root {root}; }}");
        // A process of its own each, as a server and what stands before it are.
        let nginxes =
            [nginx(&path.join("server"), &serves)?, nginx(&path.join("proxy"), &proxies(server, proxy))?];

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
        let nginx_pid = i32::try_from(nginxes[1].id().context("it ended")?)?;
        let [near, far] = SANDBOXES.map(|(_, id)| {
            let host = format!("{id}-p{server}.preview.localhost");
            Proxy { address, host, pids: vec![gateway_pid] }
        });
        let address = SocketAddr::from(([127, 0, 0, 1], proxy));
        let mut bed = Self {
            nginx: Proxy { address, host: "localhost".into(), pids: vec![] },
            near,
            far,
            gateway_pid,
            children: nginxes.into_iter().chain([gateway]).collect(),
            agents,
            _directory: directory,
        };
        for proxy in [&bed.nginx, &bed.near, &bed.far] {
            eventually("a proxy", async || super::load::hold(proxy, 1).await).await?;
        }
        bed.nginx.pids = processes::children(nginx_pid)?;
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

/// An nginx in a directory of its own, as Debian's is set up, but for connections that are kept.
fn nginx(directory: &Path, serves: &str) -> anyhow::Result<Child> {
    fs::create_dir(directory)?;
    let config = format!(
        "user root; daemon off; worker_processes auto; pid nginx.pid;\n\
         events {{ worker_connections 16384; }}\n\
         http {{\n\
         client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;\n\
         sendfile on; tcp_nopush on; keepalive_requests 100000000; keepalive_timeout 300;\n\
         {serves}\n\
         }}\n"
    );
    fs::write(directory.join("nginx.conf"), config)?;
    let nginx = Command::new(prepared::tool("nginx/usr/sbin/nginx")?)
        .arg("-p")
        .arg(directory)
        .args(["-c", "nginx.conf", "-e", "error.log"])
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    Ok(nginx)
}

/// A proxy that does what the gateway does for a request: it tells the server and the client as much, and writes a line with as many
/// facts, together with others a moment later.
fn proxies(server: u16, proxy: u16) -> String {
    let line = [
        ("timestamp", "$time_iso8601"),
        ("method", "$request_method"),
        ("route", "$server_name"),
        ("status", "$status"),
        ("complete", "$request_completion"),
        ("bytes", "$body_bytes_sent"),
        ("ms", "$request_time"),
        ("request_id", "$request_id"),
        ("tenant", "$server_port"),
        ("sandbox", "$host"),
    ];
    let line: String = line.map(|(name, value)| format!("\"{name}\":\"{value}\",")).concat();
    let headers = [
        ("Connection", "\"\""),
        ("Host", "$http_host"),
        ("X-Request-ID", "$request_id"),
        ("X-Forwarded-For", "$remote_addr"),
        ("X-Forwarded-Proto", "$scheme"),
        ("X-Forwarded-Host", "$http_host"),
        ("X-Forwarded-Port", "$server_port"),
    ];
    let headers = headers.map(|(name, value)| format!("proxy_set_header {name} {value};\n")).concat();
    format!(
        "upstream up {{ server 127.0.0.1:{server}; keepalive 128; keepalive_requests 100000000; }}\n\
         log_format line escape=json '{{{line}}}';\n\
         server {{ listen 127.0.0.1:{proxy} backlog=4096; access_log access.log line buffer=256k flush=10ms;\n\
         location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_max_temp_file_size 0;\n\
         add_header X-Request-ID $request_id;\n\
         {headers} }} }}"
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

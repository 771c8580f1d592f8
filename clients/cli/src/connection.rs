//! The channel to a gateway: gRPC over HTTP/2, with TLS or without, the API key in the metadata of every call.

use std::{fmt, io, time::Duration};

use hyper::Uri;
use hyper_util::rt::TokioIo;

use oc_proto::v1::{
    agent_session_service_client::AgentSessionServiceClient,
    checkpoint_service_client::CheckpointServiceClient, exec_service_client::ExecServiceClient,
    file_service_client::FileServiceClient, file_url_service_client::FileUrlServiceClient,
    key_service_client::KeyServiceClient, network_service_client::NetworkServiceClient,
    node_service_client::NodeServiceClient, port_service_client::PortServiceClient,
    preview_service_client::PreviewServiceClient, sandbox_service_client::SandboxServiceClient,
};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use tower::service_fn;

use crate::{config::Target, failure::Failure, tls::Connector};

/// For a connection to a gateway to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For calls that only read or write records.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A gateway that does not answer pings this long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Flow control windows: a stream must hold several 512 KiB file messages in flight to fill the link.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// The biggest answers: both outputs of a command at 4 MiB, a directory of 100,000 entries.
const MESSAGE_BYTES: usize = 64 << 20;

/// A client of some service.
type Authenticated = InterceptedService<Channel, ApiKey>;

/// A connected gateway.
#[derive(Clone)]
pub struct Connection {
    channel: Channel,
    key: ApiKey,
}

impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to the gateway that `target` names.
    pub async fn open(target: &Target) -> Result<Self, Failure> {
        let url = target.url.as_str();
        let is_tls = url.starts_with("https://");
        if !is_tls && !url.starts_with("http://") {
            return Err(Failure::Usage(format!(
                "{url:?} is no URL that oc speaks: give http(s)://HOST:PORT"
            )));
        }
        let key = ApiKey::new(&target.key)?;
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|_| Failure::Usage(format!("{url:?} is no URL: give http://HOST:PORT")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        let connected = if is_tls {
            let connector = Connector::new("h2", target.ca_file.as_deref())?;
            endpoint.connect_with_connector(service_fn(move |uri: Uri| secured(connector.clone(), uri))).await
        } else {
            endpoint.connect().await
        };
        let channel = connected
            .map_err(|error| Failure::Unreachable { url: url.to_owned(), reason: innermost(&error) })?;
        Ok(Self { channel, key })
    }

    fn authenticated(&self) -> Authenticated {
        InterceptedService::new(self.channel.clone(), self.key.clone())
    }

    /// Sandboxes.
    pub fn sandboxes(&self) -> SandboxServiceClient<Authenticated> {
        SandboxServiceClient::new(self.authenticated()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Checkpoints, and what is made of them.
    pub fn checkpoints(&self) -> CheckpointServiceClient<Authenticated> {
        CheckpointServiceClient::new(self.authenticated()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Commands.
    pub fn exec(&self) -> ExecServiceClient<Authenticated> {
        ExecServiceClient::new(self.authenticated()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Files.
    pub fn files(&self) -> FileServiceClient<Authenticated> {
        FileServiceClient::new(self.authenticated()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// How sandboxes are connected.
    pub fn networks(&self) -> NetworkServiceClient<Authenticated> {
        NetworkServiceClient::new(self.authenticated())
    }

    /// URLs of files.
    pub fn file_urls(&self) -> FileUrlServiceClient<Authenticated> {
        FileUrlServiceClient::new(self.authenticated())
    }

    /// Ports in sandboxes.
    pub fn ports(&self) -> PortServiceClient<Authenticated> {
        PortServiceClient::new(self.authenticated())
    }

    /// Ports that others are meant to find.
    pub fn previews(&self) -> PreviewServiceClient<Authenticated> {
        PreviewServiceClient::new(self.authenticated())
    }

    /// Agents.
    pub fn agents(&self) -> AgentSessionServiceClient<Authenticated> {
        AgentSessionServiceClient::new(self.authenticated()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// API keys.
    pub fn keys(&self) -> KeyServiceClient<Authenticated> {
        KeyServiceClient::new(self.authenticated())
    }

    /// Hosts.
    pub fn nodes(&self) -> NodeServiceClient<Authenticated> {
        NodeServiceClient::new(self.authenticated())
    }
}

/// A connection that is safe.
async fn secured(connector: Connector, uri: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = uri.host().unwrap_or_default();
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let stream = TcpStream::connect((bare, uri.port_u16().unwrap_or(443))).await?;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(connector.connect(host, stream).await?))
}

/// A request that must be answered within `deadline`; the mesh is told so too.
pub fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Puts the API key into every request.
#[derive(Clone)]
pub struct ApiKey(MetadataValue<Ascii>);

impl fmt::Debug for ApiKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    fn new(key: &str) -> Result<Self, Failure> {
        let mut value = MetadataValue::try_from(key)
            .map_err(|_| Failure::Usage("the API key holds characters that no key has".to_owned()))?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl Interceptor for ApiKey {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("x-api-key", self.0.clone());
        Ok(request)
    }
}

/// The cause that says most: transports wrap it several times over.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

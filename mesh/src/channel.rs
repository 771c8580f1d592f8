//! Calls to our own services: one HTTP/2 connection per endpoint, made when it is first needed and again when it broke.

use std::{collections::HashMap, str::FromStr as _, time::Duration};

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint as TonicEndpoint};
use tower::service_fn;

use crate::{
    endpoint::{Endpoint, EndpointError},
    layers::{ClientStack, client_stack},
};

/// HTTP/2 window of one stream, bytes: bounds what is in flight for one transfer.
pub const STREAM_WINDOW: u32 = 512 << 10;
/// HTTP/2 window of one connection, bytes: as large as there are (RFC 9113, 6.9.1). All tenants' calls share a connection,
/// and streams that nobody reads must not take the room of others; each stream is bounded by its own window.
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Largest HTTP/2 frame, bytes: bulk transfers come in few pieces.
pub const MAX_FRAME: u32 = 512 << 10;
/// Largest HTTP/2 frame of an answer, bytes. Each is a system call of who sends it, and holds up what other calls' answers have to
/// say: eight times the least that there is (RFC 9113, 4.2).
const ANSWER_FRAME: u32 = 128 << 10;
/// Largest gRPC message that our parts exchange, bytes.
pub const MAX_MESSAGE: usize = 16 << 20;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel with the client stack on it: the `T` of generated clients.
pub type ClientChannel = ClientStack<Channel>;

/// Channels by endpoint.
#[derive(Debug, Default)]
pub struct Channels(Mutex<HashMap<String, ClientChannel>>);

impl Channels {
    /// No channels yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The channel to an endpoint as [`Endpoint`] writes it. Does not wait for a connection.
    pub fn get(&self, endpoint: &str) -> Result<ClientChannel, EndpointError> {
        let mut channels = self.0.lock();
        if let Some(channel) = channels.get(endpoint) {
            return Ok(channel.clone());
        }
        let channel = client_stack(connect(&Endpoint::from_str(endpoint)?)?);
        channels.insert(endpoint.into(), channel.clone());
        Ok(channel)
    }

    /// Forgets the channels to all endpoints but these: members that have gone.
    pub fn retain(&self, is_member: impl Fn(&str) -> bool) {
        self.0.lock().retain(|endpoint, _| is_member(endpoint));
    }
}

fn connect(endpoint: &Endpoint) -> Result<Channel, EndpointError> {
    let windows = |builder: TonicEndpoint| {
        builder
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(ANSWER_FRAME)
            // What still comes for calls that were given up must not break the connection, which all callers share.
            .http2_max_local_error_reset_streams(None)
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
    };
    Ok(match endpoint {
        Endpoint::Unix(path) => {
            let path = path.clone();
            // The URI is only what `:authority` says: the connector knows the path.
            windows(TonicEndpoint::from_static("http://localhost")).connect_with_connector_lazy(service_fn(
                move |_| {
                    let path = path.clone();
                    async move {
                        Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?))
                    }
                },
            ))
        }
        Endpoint::Tcp(_) => {
            let builder = TonicEndpoint::from_shared(endpoint.to_string())
                .map_err(|_| EndpointError::new(&endpoint.to_string()))?;
            windows(builder)
                .http2_keep_alive_interval(Duration::from_secs(10))
                .keep_alive_while_idle(true)
                .connect_lazy()
        }
    })
}

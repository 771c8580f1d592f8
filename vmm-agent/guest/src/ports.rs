//! `oc.v1.PortService`: TCP connections to what listens in the guest, where its host does not make them itself.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use oc_port::{Connection, MAX_CONNECTIONS};
use oc_proto::v1::{ForwardPortRequest, port_service_server::PortService};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming};

use crate::refusal::Refusal;

/// How long a listener may take to accept.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Where what listens in the guest is reached: in this order.
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// Connects to ports.
#[derive(Clone, Debug)]
pub struct Ports {
    room: Arc<Semaphore>,
}

impl Default for Ports {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }
}

#[tonic::async_trait]
impl PortService for Ports {
    type ForwardPortStream = Connection<OwnedSemaphorePermit>;

    async fn forward_port(
        &self,
        request: Request<Streaming<ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        let mut parts = request.into_inner();
        let Some(first) = parts.message().await? else {
            return Err(Refusal::InvalidArgument.status("the stream has no message"));
        };
        let Some(port) = oc_port::named(&first) else {
            return Err(Refusal::InvalidArgument.status(format!("{} is no port: 1 to 65535", first.port)));
        };
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            let text = format!("{MAX_CONNECTIONS} connections to ports are open already");
            return Err(Refusal::Overloaded.status(text));
        };
        let socket = connect(port).await?;
        Ok(Response::new(Connection::new(socket, first.data, parts, reset, room)?))
    }
}

async fn connect(port: u16) -> Result<TcpStream, Status> {
    let any = async {
        let mut refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        for address in ADDRESSES {
            match TcpStream::connect(SocketAddr::new(address, port)).await {
                Ok(socket) => return Ok(socket),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    };
    let refused = |text| Refusal::PortNotListening.status(format!("port {port}: {text}"));
    let connected = timeout(CONNECT_WITHIN, any).await;
    connected
        .map_err(|_| refused(format!("nobody accepts within {} s", CONNECT_WITHIN.as_secs())))?
        .map_err(|error| refused(error.to_string()))
}

fn reset(text: String) -> Status {
    Refusal::PortReset.status(text)
}

#[cfg(test)]
#[path = "ports_tests.rs"]
mod tests;

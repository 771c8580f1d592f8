//! `oc.v1.PortService`: TCP connections to what listens in the guest.
//!
//! Bytes from the port are read as fast as the answer's messages are taken, by whoever takes them; those to the port are
//! written by a task of their own, which ends with the answer. So each direction is held back by its own reader alone,
//! and nothing is kept between them but one read of each.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::Stream;
use nix::{
    errno::Errno,
    sys::socket::{Shutdown, shutdown},
};
use oc_proto::v1::{ForwardPortRequest, ForwardPortResponse, port_service_server::PortService};
use prost::bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming};

use crate::refusal::Refusal;

/// Connections at once. Each may hold a read of each direction.
const MAX_CONNECTIONS: usize = 256;
/// How long a listener may take to accept.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Where what listens in the guest is reached: in this order.
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
/// What the first read after a pause has room for, bytes.
const FIRST_READ: usize = 16 << 10;
/// What a read has room for at most, bytes: more at a time costs fewer messages.
const MAX_READ: usize = 256 << 10;

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
    type ForwardPortStream = Connection;

    async fn forward_port(
        &self,
        request: Request<Streaming<ForwardPortRequest>>,
    ) -> Result<Response<Connection>, Status> {
        let mut parts = request.into_inner();
        let Some(first) = parts.message().await? else {
            return Err(Refusal::InvalidArgument.status("the stream has no message"));
        };
        let port = u16::try_from(first.port).ok().filter(|port| *port != 0);
        let Some(port) = port else {
            return Err(Refusal::InvalidArgument.status(format!("{} is no port: 1 to 65535", first.port)));
        };
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            let text = format!("{MAX_CONNECTIONS} connections to ports are open already");
            return Err(Refusal::Overloaded.status(text));
        };
        let socket = Arc::new(connect(port).await?);
        let mut writer = JoinSet::new();
        writer.spawn(write(Arc::clone(&socket), first.data, parts));
        Ok(Response::new(Connection {
            socket,
            writer,
            buffer: BytesMut::new(),
            size: FIRST_READ,
            state: State::Open,
            _room: room,
        }))
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
    let socket = timeout(CONNECT_WITHIN, any)
        .await
        .map_err(|_| refused(format!("nobody accepts within {} s", CONNECT_WITHIN.as_secs())))?
        .map_err(|error| refused(error.to_string()))?;
    // What a client sends in small pieces is not held back to make larger ones.
    socket.set_nodelay(true).map_err(|error| broken(&error))?;
    Ok(socket)
}

fn broken(error: &io::Error) -> Status {
    Refusal::PortReset.status(format!("the connection broke: {error}"))
}

/// Writes what the client sends, and ends that direction when the client does.
async fn write(
    socket: Arc<TcpStream>,
    first: Bytes,
    mut parts: Streaming<ForwardPortRequest>,
) -> Result<(), Status> {
    let mut data = first;
    loop {
        while data.has_remaining() {
            socket.writable().await.map_err(|error| broken(&error))?;
            match socket.try_write(&data) {
                Ok(written) => data.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(broken(&error)),
            }
        }
        match parts.message().await? {
            Some(part) => data = part.data,
            None => break,
        }
    }
    match shutdown(socket.as_raw_fd(), Shutdown::Write) {
        // The other side has gone already: what it has still said is read, and then its end.
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(error) => Err(broken(&error.into())),
    }
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is open, which the client does not know yet.
    Open,
    /// The port may say more.
    Reading,
    /// The port has ended its side, the client may say more.
    Read,
    /// Both have ended.
    Done,
    /// It broke, which the client knows.
    Broken,
}

/// The answer's messages. Dropped before both sides have ended, it resets the connection: the other side must not take
/// what it got for all there was.
#[derive(Debug)]
pub struct Connection {
    socket: Arc<TcpStream>,
    /// The task that writes; none when it has ended.
    writer: JoinSet<Result<(), Status>>,
    buffer: BytesMut,
    /// What the next read has room for.
    size: usize,
    state: State,
    _room: OwnedSemaphorePermit,
}

impl Connection {
    /// The next bytes; none at the end.
    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            ready!(self.socket.poll_read_ready(context))?;
            // Takes back the room of what has been sent since.
            self.buffer.reserve(self.size);
            match self.socket.try_read_buf(&mut (&mut self.buffer).limit(self.size)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Connections that are idle hold no memory.
                    (self.buffer, self.size) = (BytesMut::new(), FIRST_READ);
                }
                read => {
                    if read? >= self.size {
                        self.size = MAX_READ.min(2 * self.size);
                    }
                    return Poll::Ready(Ok(self.buffer.split().freeze()));
                }
            }
        }
    }

    /// Waits until the client has ended its side.
    fn poll_written(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        match ready!(self.writer.poll_join_next(context)) {
            None => Poll::Ready(Ok(())),
            Some(Ok(written)) => Poll::Ready(written),
            Some(Err(error)) => Poll::Ready(Err(Refusal::Internal.status(error.to_string()))),
        }
    }
}

impl Stream for Connection {
    type Item = Result<ForwardPortResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        match this.state {
            State::Open => {
                this.state = State::Reading;
                return Poll::Ready(Some(Ok(ForwardPortResponse::default())));
            }
            State::Reading => match this.poll_read(context) {
                Poll::Ready(Ok(data)) => {
                    if data.is_empty() {
                        this.state = State::Read;
                    }
                    // The last one is empty, which says so.
                    return Poll::Ready(Some(Ok(ForwardPortResponse { data })));
                }
                Poll::Ready(Err(error)) => {
                    this.state = State::Broken;
                    return Poll::Ready(Some(Err(broken(&error))));
                }
                Poll::Pending => {}
            },
            State::Read => {}
            State::Done | State::Broken => return Poll::Ready(None),
        }
        // A writer that failed is told after what the port has still said.
        if let Err(error) = ready!(this.poll_written(context)) {
            this.state = State::Broken;
            return Poll::Ready(Some(Err(error)));
        }
        if this.state != State::Read {
            return Poll::Pending;
        }
        this.state = State::Done;
        Poll::Ready(None)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.state != State::Done {
            let _ = self.socket.set_zero_linger();
        }
    }
}

#[cfg(test)]
#[path = "ports_tests.rs"]
mod tests;

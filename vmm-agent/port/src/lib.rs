//! A connection to a port of a guest, as the messages of a call of `oc.v1.PortService`: the part that a guest and its host, who
//! both answer such calls, have in common. How they connect is their own.
//!
//! Bytes from the port are read as fast as the answer's messages are taken, by whoever takes them; those to the port are
//! written by a task of their own, which ends with the answer. So each direction is held back by its own reader alone,
//! and nothing is kept between them but one read of each.

use std::{
    io,
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use nix::{
    errno::Errno,
    sys::socket::{Shutdown, shutdown},
};
use oc_proto::v1::{ForwardPortRequest, ForwardPortResponse};
use tokio::{net::TcpStream, task::JoinSet};
use tonic::{Status, Streaming};

/// Connections to the ports of one guest at once. Each may hold a read of each direction.
pub const MAX_CONNECTIONS: usize = 256;
/// A message that comes in, bytes: 1 MiB for the port, and what goes with it.
pub const MAX_MESSAGE: usize = 2 << 20;
/// What a read has room for at most, bytes: more at a time costs fewer messages.
pub const MAX_READ: usize = 256 << 10;
/// What the first read after a pause has room for, bytes.
const FIRST_READ: usize = 16 << 10;

/// The port that a call's first message names; `None` if that is none.
pub fn named(first: &ForwardPortRequest) -> Option<u16> {
    u16::try_from(first.port).ok().filter(|port| *port != 0)
}

/// Words why a connection broke, as its side words its errors.
pub type Reset = fn(String) -> Status;

fn broken(reset: Reset, error: &io::Error) -> Status {
    reset(format!("the connection broke: {error}"))
}

/// Writes what the client sends, and ends that direction when the client does.
async fn write(
    socket: Arc<TcpStream>,
    first: Bytes,
    mut parts: Streaming<ForwardPortRequest>,
    reset: Reset,
) -> Result<(), Status> {
    let broken = |error| broken(reset, &error);
    let mut data = first;
    loop {
        while data.has_remaining() {
            socket.writable().await.map_err(broken)?;
            match socket.try_write(&data) {
                Ok(written) => data.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(broken(error)),
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
        Err(error) => Err(broken(error.into())),
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
/// what it got for all there was. `R` is its room among others, which it keeps for as long.
#[derive(Debug)]
pub struct Connection<R> {
    socket: Arc<TcpStream>,
    /// The task that writes; none when it has ended.
    writer: JoinSet<Result<(), Status>>,
    buffer: BytesMut,
    /// What the next read has room for.
    size: usize,
    state: State,
    reset: Reset,
    _room: R,
}

impl<R> Connection<R> {
    /// Carries the bytes of `socket`, which is connected: `first` goes there, and then what `parts` bring.
    ///
    /// # Errors
    ///
    /// If it is broken already.
    pub fn new(
        socket: TcpStream,
        first: Bytes,
        parts: Streaming<ForwardPortRequest>,
        reset: Reset,
        room: R,
    ) -> Result<Self, Status> {
        // What a client sends in small pieces is not held back to make larger ones.
        socket.set_nodelay(true).map_err(|error| broken(reset, &error))?;
        let socket = Arc::new(socket);
        let mut writer = JoinSet::new();
        writer.spawn(write(Arc::clone(&socket), first, parts, reset));
        let (buffer, state) = (BytesMut::new(), State::Open);
        Ok(Self { socket, writer, buffer, size: FIRST_READ, state, reset, _room: room })
    }

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
            Some(Err(error)) => Poll::Ready(Err(Status::internal(error.to_string()))),
        }
    }
}

impl<R: Unpin> Stream for Connection<R> {
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
                    return Poll::Ready(Some(Ok(ForwardPortResponse { data, ..Default::default() })));
                }
                Poll::Ready(Err(error)) => {
                    this.state = State::Broken;
                    return Poll::Ready(Some(Err(broken(this.reset, &error))));
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

impl<R> Drop for Connection<R> {
    fn drop(&mut self) {
        if self.state != State::Done {
            let _ = self.socket.set_zero_linger();
        }
    }
}

//! Connections that one of our processes hands to another on the same machine (docs/decisions/0022).
//!
//! gRPC carries no descriptors, so they have a Unix socket of their own beside the one that calls come by ([`socket_of`]). Who
//! wants a connection makes a key, names it in a call, and shows it at that socket: only who can reach the one as
//! well as the other gets anything. Who gives it keeps hold of it, and [resets](reset) it when the call ends before its time.

use std::{
    collections::HashMap,
    fmt,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, connect_unspec, recvmsg, sendmsg,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::UnixStream,
    sync::Semaphore,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

use crate::{
    endpoint::Endpoint,
    error::{Reason, status},
    serve::listen::OwnSocket,
};

/// Length of a key. Nobody guesses 256 random bits.
pub const KEY_BYTES: usize = 32;

/// What a connection is asked for by.
type Key = [u8; KEY_BYTES];

/// How long who connects may take to show a key.
const SHOWN_WITHIN: Duration = Duration::from_secs(5);
/// Those that have not shown one yet. Others wait in the kernel's queue.
const MAX_PEERS: usize = 64;

/// Where the process that listens on `endpoint` hands connections over, if it is one on this machine: beside its socket, with
/// `fd` for an extension.
#[must_use]
pub fn socket_of(endpoint: &Endpoint) -> Option<PathBuf> {
    match endpoint {
        Endpoint::Unix(path) => Some(path.with_extension("fd")),
        Endpoint::Tcp(_) => None,
    }
}

/// Breaks off a TCP connection, whoever else holds its socket: all of them see `ECONNRESET`, and the peer a reset.
///
/// `connect(2)` to `AF_UNSPEC` is what does that on Linux (`tcp_disconnect`); `SO_LINGER` works for the last holder alone.
pub fn reset(socket: impl AsFd) {
    // One that has ended already cannot be broken off.
    let _ = connect_unspec(socket);
}

/// Connections that wait to be fetched. Clones are the same.
#[derive(Clone)]
pub struct Handoffs(Arc<Inner>);

struct Inner {
    offered: Arc<Offered>,
    _server: AbortOnDropHandle<()>,
}

type Offered = Mutex<HashMap<Key, Arc<OwnedFd>>>;

impl fmt::Debug for Handoffs {
    // Keys are secrets.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Handoffs")
            .field("offered", &self.0.offered.lock().len())
            .finish_non_exhaustive()
    }
}

impl Handoffs {
    /// Listens on `path`, for our own user alone, until the last clone is dropped.
    ///
    /// # Errors
    ///
    /// If it cannot be listened on.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let socket = OwnSocket::bind(path).await?;
        let offered = Arc::<Offered>::default();
        let server = tokio::spawn(serve(socket, Arc::clone(&offered)));
        Ok(Self(Arc::new(Inner { offered, _server: AbortOnDropHandle::new(server) })))
    }

    /// Has a TCP connection fetched by who knows the key. `None` if that is no key, or names another one.
    #[must_use]
    pub fn offer(&self, key: &[u8], socket: OwnedFd) -> Option<Offer> {
        let key = Key::try_from(key).ok()?;
        let socket = Arc::new(socket);
        let mut offered = self.0.offered.lock();
        if offered.contains_key(&key) {
            return None;
        }
        offered.insert(key, Arc::clone(&socket));
        Some(Offer { key, socket, offered: Arc::clone(&self.0.offered), is_over: false })
    }
}

/// A connection that is, or was, to be fetched. Dropped before it is [over](Offer::over), it is reset.
pub struct Offer {
    key: Key,
    socket: Arc<OwnedFd>,
    offered: Arc<Offered>,
    is_over: bool,
}

impl fmt::Debug for Offer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Offer").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Offer {
    /// Lets go of it: it is the only one's who has fetched it.
    pub fn over(mut self) {
        self.is_over = true;
    }

    /// Keeps hold of it for as long as the call goes on that it was asked for by, and is over with that.
    ///
    /// # Errors
    ///
    /// The call broke off, or said more: then it is reset.
    pub async fn held_for<T>(self, mut call: Streaming<T>) -> Result<(), Status> {
        if call.message().await?.is_some() {
            return Err(status(Reason::InvalidArgument, "the connection has been handed over"));
        }
        self.over();
        Ok(())
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.offered.lock().remove(&self.key);
        if !self.is_over {
            reset(&*self.socket);
        }
    }
}

async fn serve(socket: OwnSocket, offered: Arc<Offered>) {
    let room = Arc::new(Semaphore::new(MAX_PEERS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let peer = socket.accept().await;
        let offered = Arc::clone(&offered);
        // Ends by itself, soon.
        tokio::spawn(async move {
            match timeout(SHOWN_WITHIN, hand_over(peer, &offered)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a connection was not handed over"),
                Err(_) => tracing::debug!("who asks for a connection shows no key"),
            }
            drop(place);
        });
    }
}

/// Hands over what the peer's key names. One that names nothing is answered by the end.
async fn hand_over(mut peer: UnixStream, offered: &Offered) -> io::Result<()> {
    let mut key = Key::default();
    peer.read_exact(&mut key).await?;
    let found = offered.lock().get(&key).cloned();
    let Some(socket) = found else { return Ok(()) };
    peer.async_io(Interest::WRITABLE, || send(&peer, socket.as_fd())).await
}

fn send(peer: &UnixStream, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    // A descriptor goes with a byte at least (unix(7)).
    sendmsg(peer, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Who wants a connection.
pub struct Wanted<'a> {
    path: &'a Path,
    key: Key,
}

impl fmt::Debug for Wanted<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Wanted").field("path", &self.path).finish_non_exhaustive()
    }
}

impl<'a> Wanted<'a> {
    /// Makes a key for what is handed over at `path`. `None` if nothing is there.
    ///
    /// # Errors
    ///
    /// If there is no randomness.
    pub fn at(path: &'a Path) -> io::Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let mut key = Key::default();
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        Ok(Some(Self { path, key }))
    }

    /// What to ask for it by.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// Fetches it, once it is offered.
    ///
    /// # Errors
    ///
    /// `NotFound` if it is not; if nobody listens.
    pub async fn fetch(self) -> io::Result<OwnedFd> {
        let mut giver = UnixStream::connect(self.path).await?;
        giver.write_all(&self.key).await?;
        Ok(receive(&giver, &mut [0]).await?.1)
    }
}

/// Receives a descriptor, and the bytes that came with it: how many.
///
/// # Errors
///
/// `NotFound` if none came.
pub async fn receive(giver: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, OwnedFd)> {
    giver.async_io(Interest::READABLE, || try_receive(giver, bytes)).await
}

fn try_receive(giver: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, OwnedFd)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(giver, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptor = descriptors.flatten().next();
    let none = || io::Error::new(io::ErrorKind::NotFound, "no descriptor came");
    Ok((received.bytes, descriptor.ok_or_else(none)?))
}

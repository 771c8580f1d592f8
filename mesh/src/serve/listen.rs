//! Listening sockets.

use std::{
    fs::File,
    io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::Stream;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::stat::{Mode, fchmod},
};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixSocket, UnixStream};

use crate::endpoint::Endpoint;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;
/// Pause after a connection could not be accepted: for want of file descriptors, most likely, and then the next one
/// cannot be either.
const PAUSE: Duration = Duration::from_millis(100);

/// Where connections come in.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(OwnSocket),
    Tcp(TcpListener),
}

impl Listener {
    pub(super) async fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        Ok(match endpoint {
            Endpoint::Unix(path) => Self::Unix(OwnSocket::bind(path).await?),
            Endpoint::Tcp(authority) => Self::Tcp(TcpListener::bind(authority).await?),
        })
    }
}

/// A Unix socket and its file.
#[derive(Debug)]
pub(crate) struct OwnSocket {
    // Dropped first: while the socket still listens nobody takes the file for a dead one's and puts another there.
    _file: SocketFile,
    listener: UnixListener,
}

impl OwnSocket {
    /// Listens on a Unix socket that only our own user can connect to. The file that a dead process left is replaced;
    /// a socket that somebody listens on, and a file that is no socket, are not touched.
    pub(crate) async fn bind(path: &Path) -> io::Result<Self> {
        // Of several processes that start at once, one looks and binds at a time.
        let _lock = lock_directory(path).await?;
        remove_stale(path).await?;
        let socket = UnixSocket::new_stream()?;
        // Linux makes the file with the permissions of the descriptor: there is no moment with others.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        socket.bind(path)?;
        let file = SocketFile(path.to_owned());
        Ok(Self { _file: file, listener: socket.listen(BACKLOG)? })
    }

    /// The next connection.
    pub(crate) async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((connection, _)) => return connection,
                Err(error) => pause(&error).await,
            }
        }
    }
}

/// Held while a socket is made in the directory.
async fn lock_directory(path: &Path) -> io::Result<Flock<File>> {
    let directory = path.parent().unwrap_or_else(|| Path::new("/")).to_owned();
    let locked = tokio::task::spawn_blocking(move || {
        Flock::lock(File::open(directory)?, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io::Error::from(errno))
    });
    locked.await.map_err(io::Error::other)?
}

async fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        // Connected, or too many wait to be: it lives.
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
}

/// Removes the socket's file when dropped.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Connections of a Unix socket, for ever.
pub(super) fn unix_connections(socket: OwnSocket) -> impl Stream<Item = io::Result<UnixStream>> {
    async_stream::stream! {
        let socket = socket;
        loop {
            yield Ok(socket.accept().await);
        }
    }
}

/// Connections of a TCP socket, for ever. What is small goes out at once.
pub(super) fn tcp_connections(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    async_stream::stream! {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    if let Err(error) = connection.set_nodelay(true) {
                        tracing::debug!(%error, "TCP_NODELAY is refused");
                    }
                    yield Ok(connection);
                }
                Err(error) => pause(&error).await,
            }
        }
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "connection could not be accepted");
    tokio::time::sleep(PAUSE).await;
}

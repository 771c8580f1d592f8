//! The host's way in where the VMM has a vsock for it: a port that the guest listens on (vsock(7)).
//!
//! A VMM that is restored has lost its connections and kept what listens, so the host comes again, and each connection is a
//! session of its own.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt as _, stream};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen, socket,
};
use oc_guest_link::{GuestPort, GuestSession};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    time::{sleep, timeout},
};

/// What the kernel's command line has if the host comes this way.
const OPTION: &str = "oc.link=vsock";
/// The port (`vmm-agent/src/driver/firecracker.rs`).
const PORT: u32 = 1024;
/// A host that connects has its greeting ready.
const GREETS_WITHIN: Duration = Duration::from_secs(20);
/// Connections that have not greeted yet.
const GREETING_AT_ONCE: usize = 8;
/// After a connection that could not be accepted.
const RESTS: Duration = Duration::from_millis(10);

/// Whether the host comes this way: what its VMM told the kernel.
///
/// # Errors
///
/// If the kernel does not say.
pub fn is_wanted() -> io::Result<bool> {
    Ok(std::fs::read_to_string("/proc/cmdline")?.split_whitespace().any(|word| word == OPTION))
}

/// Listens, and begins a session with each host that comes.
///
/// # Errors
///
/// If there is no vsock.
pub fn sessions() -> io::Result<impl Stream<Item = io::Result<GuestSession<UnixStream>>> + Send + 'static> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, PORT))?;
    listen(&socket, Backlog::new(GREETING_AT_ONCE as i32)?)?;
    // SAFETY: the descriptor is owned, so it stays open and the same for as long as it is registered.
    #[allow(unsafe_code)]
    let socket = unsafe { AsyncFd::register(socket) }?;
    let connections = stream::unfold(socket, |socket| async move {
        let connection = accept(&socket).await;
        if connection.is_err() {
            sleep(RESTS).await;
        }
        Some((connection, socket))
    });
    let greeted = connections
        .map(|connection| async {
            let mut port = GuestPort::new(connection?);
            timeout(GREETS_WITHIN, port.accept()).await.map_err(|_| io::ErrorKind::TimedOut)?
        })
        .buffer_unordered(GREETING_AT_ONCE);
    // One that failed ends nothing but itself.
    Ok(greeted.filter_map(|session| async { session.ok().map(Ok) }))
}

/// The next connection of the host.
async fn accept(socket: &AsyncFd<OwnedFd>) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let accepted =
        socket.async_io(tokio::io::Interest::READABLE, |socket| Ok(accept4(socket.as_raw_fd(), flags)?));
    let accepted = accepted.await?;
    // SAFETY: the kernel has just made it, and nobody else has it.
    #[allow(unsafe_code)]
    let connection = unsafe { OwnedFd::from_raw_fd(accepted) };
    // A program in the guest is not to speak for the host.
    let peer: VsockAddr = getpeername(connection.as_raw_fd())?;
    if peer.cid() != libc::VMADDR_CID_HOST {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // A stream socket to be read and written, which is all that this type does with it.
    UnixStream::from_std(StdStream::from(connection))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_kernels_command_line_that_says() {
        assert!(!is_wanted().unwrap(), "no test runs in such a guest");
    }
}

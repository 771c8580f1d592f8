//! The guest's end of the virtio-serial port, as a byte stream for tokio.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io::{self, IoSlice},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd},
    time::{Instant, sleep},
};

/// The port's name, which the host's VMM gives it.
const NAME: &str = "oc.guest";
const PORTS: &str = "/sys/class/virtio-ports";
/// What the kernel's driver keeps of what the host sends, in one piece (drivers/char/virtio_console.c, `add_port`).
const PAGE: usize = 4096;
const APPEARS_WITHIN: Duration = Duration::from_secs(30);

/// The port.
///
/// The kernel wakes everybody who waits on a port for every change of it, and says "hung up" as long as no host is
/// connected, which a level-triggered wait would spin on. So the port is watched edge-triggered by an epoll of its own,
/// and tokio watches that one.
#[derive(Debug)]
pub struct Port {
    port: File,
    events: AsyncFd<OwnedFd>,
    /// Whether the reader was told that no host is connected.
    told: bool,
}

impl Port {
    /// Opens the port, once there is one.
    ///
    /// # Errors
    ///
    /// If there is none in time, or it cannot be opened.
    pub async fn open() -> io::Result<Self> {
        let begun = Instant::now();
        let path = loop {
            match find()? {
                Some(path) if path.exists() => break path,
                _ if begun.elapsed() > APPEARS_WITHIN => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no port {NAME} appears")));
                }
                _ => sleep(Duration::from_millis(1)).await,
            }
        };
        Self::new(
            File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(path)?,
        )
    }

    fn new(port: File) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wanted = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLHUP | EpollFlags::EPOLLET;
        epoll.add(port.as_fd(), EpollEvent::new(wanted, 0))?;
        // SAFETY: the descriptor is owned, so it stays open and the same for as long as it is registered.
        let events = unsafe { AsyncFd::register(epoll.0) }?;
        Ok(Self { port, events, told: true })
    }

    /// Waits until something about the port has changed since the call before.
    fn poll_change(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut guard = ready!(self.events.poll_read_ready(context))?;
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: the descriptor is an epoll's, and there is room for one event.
        let taken = unsafe { libc::epoll_wait(self.events.get_ref().as_raw_fd(), &raw mut event, 1, 0) };
        if taken < 0 {
            return Poll::Ready(Err(io::Error::last_os_error()));
        }
        guard.clear_ready();
        Poll::Ready(Ok(()))
    }
}

/// Where the port's device is.
fn find() -> io::Result<Option<PathBuf>> {
    let Ok(ports) = fs::read_dir(PORTS) else { return Ok(None) };
    for port in ports {
        let port = port?;
        if fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == NAME) {
            return Ok(Some(Path::new("/dev").join(port.file_name())));
        }
    }
    Ok(None)
}

/// Runs `attempt` until it does not say that it would block.
fn poll_io<T>(
    port: &Port,
    context: &mut Context<'_>,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> Poll<io::Result<T>> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(port.poll_change(context))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return Poll::Ready(done),
        }
    }
}

/// Reads once into the room that is left; how many bytes.
fn read_into(port: &File, buffer: &mut ReadBuf<'_>) -> io::Result<usize> {
    // SAFETY: no byte is made uninitialised: the kernel writes only.
    let room = unsafe { buffer.unfilled_mut() };
    // SAFETY: the descriptor is open, and the room is as long as is said.
    let read = unsafe { libc::read(port.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
    let Ok(read) = usize::try_from(read) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has written so many.
    unsafe { buffer.assume_init(read) };
    buffer.advance(read);
    Ok(read)
}

impl AsyncRead for Port {
    /// Reads all that is there, as far as there is room: the kernel gives no more than a page at once. A host that
    /// hangs up is told once, as the end; reading on waits for the next one.
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let told = this.told;
        let read = ready!(poll_io(this, context, || {
            match read_into(&this.port, buffer)? {
                0 if told => Err(io::ErrorKind::WouldBlock.into()),
                read => Ok(read),
            }
        }))?;
        this.told = read == 0;
        let mut last = read;
        while last == PAGE && buffer.remaining() > 0 {
            // What went wrong is met again by the next read.
            last = read_into(&this.port, buffer).unwrap_or_default();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        poll_io(&self, context, || io::Write::write(&mut &self.port, buffer))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // The driver knows no vectors: the first that is not empty.
        let buffer = buffers.iter().find(|buffer| !buffer.is_empty()).map_or(&[][..], |buffer| buffer);
        self.poll_write(context, buffer)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

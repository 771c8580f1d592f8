//! A pseudo-terminal: our end of it.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::OFlag,
    libc,
    pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt},
    sys::signal::{Signal, killpg},
    unistd::{Gid, Pid, Uid, chown},
};
use oc_proto::v1::TerminalSize;
use tokio::io::unix::AsyncFd;
use tonic::Status;

use crate::{refusal::Refusal, users::User};

/// Cells each way. Programs make tables of a terminal's size.
const MAX_CELLS: u32 = 4096;

/// tty_ioctl(4).
mod ioctl {
    #![allow(missing_docs, reason = "what the macros make has none")]
    use nix::libc;

    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
    nix::ioctl_read_bad!(get_foreground_group, libc::TIOCGPGRP, libc::pid_t);
}

/// A terminal's size that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    cols: u16,
    rows: u16,
}

impl Size {
    /// From a request.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT`.
    pub fn parse(size: TerminalSize) -> Result<Self, Status> {
        let cells = |cells: u32| u16::try_from(cells).ok().filter(|_| (1..=MAX_CELLS).contains(&cells));
        match (cells(size.cols), cells(size.rows)) {
            (Some(cols), Some(rows)) => Ok(Self { cols, rows }),
            _ => Err(Refusal::InvalidArgument.status(format!(
                "a terminal of {} columns and {} rows: 1 to {MAX_CELLS} are taken",
                size.cols, size.rows
            ))),
        }
    }
}

impl From<Size> for TerminalSize {
    fn from(size: Size) -> Self {
        Self { cols: size.cols.into(), rows: size.rows.into() }
    }
}

/// Our end.
#[derive(Debug)]
pub struct Terminal {
    master: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Terminal {
    /// Opens a new one, which belongs to `user`.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn open(size: Size, user: &User) -> io::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let master: PtyMaster = posix_openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(ptsname_r(&master)?);
        chown(&path, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
        // SAFETY: the descriptor is owned, so it stays open and the same for as long as it is registered.
        let master = unsafe { AsyncFd::register(OwnedFd::from(master)) }?;
        let terminal = Self { master, path };
        terminal.resize(size)?;
        Ok(terminal)
    }

    /// The other end's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it another size; who is in the foreground is told by `SIGWINCH`.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is a terminal's, and the kernel only reads the size.
        unsafe { ioctl::set_window_size(self.master.as_raw_fd(), &raw const size) }?;
        Ok(())
    }

    /// Sends a signal to the process group in the foreground, if there is one.
    pub fn signal_foreground(&self, signal: Signal) {
        let mut group = 0;
        // SAFETY: the descriptor is a terminal's, and there is room for the answer.
        let found = unsafe { ioctl::get_foreground_group(self.master.as_raw_fd(), &raw mut group) };
        if found.is_ok() && group > 1 {
            // It fails only if there is none left.
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }

    /// Reads what was written to the terminal, as much as there is and fits; 0 once nobody has its other end open.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.master.async_io(tokio::io::Interest::READABLE, |master| {
            nix::unistd::read(master, buffer).map_err(io::Error::from)
        });
        match read.await {
            // Nobody has the other end open (tty(4)).
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            done => done,
        }
    }

    /// Writes as if it was typed; how many bytes.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let write = self.master.async_io(tokio::io::Interest::WRITABLE, |master| {
            nix::unistd::write(master, bytes).map_err(io::Error::from)
        });
        write.await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> User {
        User {
            name: "me".into(),
            uid: Uid::effective().as_raw(),
            gid: Gid::effective().as_raw(),
            groups: Vec::new(),
            home: "/".into(),
            shell: "/bin/sh".into(),
        }
    }

    #[test]
    fn sizes_are_bounded() {
        let parse = |cols, rows| Size::parse(TerminalSize { cols, rows });
        assert_eq!(parse(80, 24).unwrap(), Size { cols: 80, rows: 24 });
        assert!(parse(4096, 1).is_ok());
        for (cols, rows) in [(0, 0), (0, 24), (80, 0), (4097, 24), (65535, 65535), (u32::MAX, 1)] {
            assert_eq!(parse(cols, rows).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
    }

    #[tokio::test]
    async fn what_is_typed_is_echoed_and_the_end_is_told() {
        let terminal = Terminal::open(Size { cols: 80, rows: 24 }, &me()).unwrap();
        let other = std::fs::File::options().read(true).write(true).open(terminal.path()).unwrap();
        assert_eq!(terminal.write(b"hi\n").await.unwrap(), 3);
        let mut buffer = [0; 64];
        let mut echoed = Vec::new();
        while echoed.len() < 4 {
            let read = terminal.read(&mut buffer).await.unwrap();
            echoed.extend_from_slice(&buffer[..read]);
        }
        assert_eq!(echoed, b"hi\r\n");
        drop(other);
        assert_eq!(terminal.read(&mut buffer).await.unwrap(), 0);
    }
}

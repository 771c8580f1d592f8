//! userfaultfd(2) in another process: asks the kernel to remember which pages are written, without anybody waiting for it; and fills
//! a memory whose pages are missing.
//!
//! With `UFFD_FEATURE_WP_ASYNC` (Linux 6.7) a write to a protected page lifts its protection and goes on; `PAGEMAP_SCAN` tells
//! where that was ([`super::pagemap_scan`]).
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use nix::errno::Errno;

use super::process::Process;

/// What `/proc/PID/fd` calls such a descriptor.
const NAME: &str = "anon_inode:[userfaultfd]";

// include/uapi/linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Debug)]
pub struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Debug)]
pub struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_range`: a part of the other process's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Its address there.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Debug)]
pub struct Copied {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

nix::ioctl_readwrite! {
    /// `UFFDIO_COPY`.
    uffdio_copy, 0xaa, 0x03, Copied
}
nix::ioctl_read! {
    /// `UFFDIO_UNREGISTER`.
    uffdio_unregister, 0xaa, 0x01, Range
}
nix::ioctl_readwrite! {
    /// `UFFDIO_API`.
    uffdio_api, 0xaa, 0x3f, Api
}
nix::ioctl_readwrite! {
    /// `UFFDIO_REGISTER`.
    uffdio_register, 0xaa, 0x00, Register
}

/// Whether this kernel remembers writes.
pub fn is_supported() -> bool {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: a system call on numbers alone; what it returns is a descriptor that nobody else has.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let Ok(made @ 0..) = i32::try_from(made) else { return false };
    // SAFETY: as above.
    let made = unsafe { OwnedFd::from_raw_fd(made) };
    enable(&made).is_ok()
}

/// Has the kernel remember writes to `bytes` from `address` on in the memory of `process`, which was started with a
/// userfaultfd of its own. Fine if it does already, whichever agent asked for it.
///
/// # Errors
///
/// If the process has no such descriptor, or the kernel does not do it.
pub fn register(process: &Process, address: u64, bytes: u64) -> io::Result<()> {
    let Some(descriptor) = process.copy_of_descriptor(NAME)? else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "its process has no userfaultfd"));
    };
    match enable(&descriptor) {
        // It was by an earlier call; a descriptor is told once.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut asked = Register { start: address, len: bytes, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the kernel reads and writes `asked`, which is what this call takes. It changes no page of any process.
    unsafe { uffdio_register(descriptor.as_raw_fd(), &mut asked) }?;
    Ok(())
}

/// Sees that it is one, whoever it came from.
///
/// # Errors
///
/// If it is something else.
pub fn check(descriptor: &OwnedFd) -> io::Result<()> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))?;
    match name == Path::new(NAME) {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "it is no userfaultfd")),
    }
}

/// Puts pages where there are none yet, and lets those go on that wait for them.
///
/// # Errors
///
/// If there are some, the process has ended, or no memory is left.
pub fn copy(descriptor: &OwnedFd, address: u64, pages: &[u8]) -> io::Result<()> {
    let mut asked =
        Copied { dst: address, src: pages.as_ptr().addr() as u64, len: pages.len() as u64, mode: 0, copy: 0 };
    loop {
        // SAFETY: the kernel reads `pages`, and reads and writes `asked`. What it writes of memory is the other process's, of which it
        // checks every page.
        match unsafe { uffdio_copy(descriptor.as_raw_fd(), &mut asked) } {
            Ok(_) => return Ok(()),
            // The process's memory was being changed; what is done is done.
            Err(Errno::EAGAIN) => {
                let done = u64::try_from(asked.copy).unwrap_or(0);
                (asked.dst, asked.src, asked.len) = (asked.dst + done, asked.src + done, asked.len - done);
                asked.copy = 0;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Has nobody asked for pages there any more: the kernel makes empty ones by itself.
///
/// # Errors
///
/// If the process has ended, or nobody was to be asked.
pub fn unregister(descriptor: &OwnedFd, mut range: Range) -> io::Result<()> {
    // SAFETY: the kernel reads `range`; it changes no page of any process.
    unsafe { uffdio_unregister(descriptor.as_raw_fd(), &mut range) }?;
    Ok(())
}

fn enable(descriptor: &OwnedFd) -> nix::Result<()> {
    let mut asked = Api { api: UFFD_API, features: UFFD_FEATURE_WP_ASYNC, ioctls: 0 };
    // SAFETY: the kernel reads and writes `asked`, which is what this call takes.
    unsafe { uffdio_api(descriptor.as_raw_fd(), &mut asked) }.map(drop)
}

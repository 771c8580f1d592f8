//! TAP devices (Documentation/networking/tuntap.rst).
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use fs_err::OpenOptions;

use self::calls::{set_interface, set_persistent};

mod calls {
    #![allow(missing_docs, reason = "TUNSETIFF and TUNSETPERSIST, as the macro writes them")]

    nix::ioctl_write_int!(set_interface, b'T', 202);
    nix::ioctl_write_int!(set_persistent, b'T', 203);
}

const DEVICE: &str = "/dev/net/tun";

/// Makes a TAP called `name` in the namespace of this thread, or opens it if it is there and nobody has it open. It stays when
/// it is closed. Whoever has the descriptor needs no privilege to use it.
///
/// # Errors
///
/// If the host does not permit.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new().read(true).write(true).open(DEVICE)?.into_parts().0;
    // SAFETY: zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    // Each packet has a header that lets sender and receiver leave checksums and segments to the other side.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, and the request is valid for the length of the call.
    unsafe {
        set_interface(file.as_raw_fd(), (&raw const request) as u64)?;
        set_persistent(file.as_raw_fd(), 1)?;
    }
    Ok(file.into())
}

//! Wall clock and entropy: what a restored clone has in common with every other until it is told better.
#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd as _};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

const NANOSECONDS: i64 = 1_000_000_000;
/// What the entropy of one request may be, bytes.
const MAX_ENTROPY: usize = 1024;

/// `struct rand_pool_info` (linux/random.h) with room for [`MAX_ENTROPY`] bytes.
#[repr(C)]
struct PoolInfo {
    /// Entropy that the bytes count for, bits.
    entropy_count: libc::c_int,
    /// Bytes used of the buffer.
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY],
}

mod calls {
    use super::PoolInfo;

    // The kernel's own numbers: the size in them is that of two integers, or of nothing (linux/random.h).
    const ADD_ENTROPY: libc::Ioctl = nix::request_code_write!(b'R', 3, 2 * size_of::<libc::c_int>());
    nix::ioctl_write_ptr_bad!(add_entropy, ADD_ENTROPY, PoolInfo);
    nix::ioctl_none!(reseed, b'R', 7);
}

/// Sets the wall clock, nanoseconds since 1970 UTC.
///
/// # Errors
///
/// If the kernel refuses.
pub fn set(unix_ns: i64) -> io::Result<()> {
    let time = TimeSpec::new(unix_ns.div_euclid(NANOSECONDS), unix_ns.rem_euclid(NANOSECONDS));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

/// Mixes `bytes` into the kernel's pool, counts them as entropy, and makes its generator start anew from the pool.
///
/// # Errors
///
/// If there are too many bytes, or the kernel refuses.
pub fn add_randomness(bytes: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo { entropy_count: 0, buf_size: 0, buf: [0; MAX_ENTROPY] };
    let Some(buf) = info.buf.get_mut(..bytes.len()) else { return Err(io::ErrorKind::InvalidInput.into()) };
    buf.copy_from_slice(bytes);
    // At most MAX_ENTROPY.
    info.buf_size = i32::try_from(bytes.len()).map_err(io::Error::other)?;
    info.entropy_count = info.buf_size * 8;
    let random = File::open("/dev/urandom")?;
    // SAFETY: the descriptor is open, and `info` has the layout and the length that the request reads.
    unsafe {
        calls::add_entropy(random.as_raw_fd(), &raw const info)?;
        calls::reseed(random.as_raw_fd())?;
    }
    Ok(())
}

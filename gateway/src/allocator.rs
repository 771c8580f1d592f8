//! How the C library's allocator keeps what this process has freed (mallopt(3)).
#![allow(unsafe_code)]

use libc::{M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, c_int, mallopt};

/// Larger than any buffer that bytes pass through.
const MAPPED_FROM: c_int = 1 << 20;
/// A few of those buffers.
const KEPT: c_int = 4 << 20;

/// Has it keep a few buffers for the next bytes. By itself it gives them back to the kernel and gets them anew, zeroed, for
/// each message of a bulk transfer: that was a third of the processor time of a download from a port (measured). Whether
/// it takes this or not, memory is memory.
pub fn keep_buffers() {
    // SAFETY: it takes two integers, and locks what it changes.
    unsafe {
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM);
        mallopt(M_TRIM_THRESHOLD, KEPT);
    }
}

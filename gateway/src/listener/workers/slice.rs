//! How long a thread of ours computes at a time while others want the processor, too.
#![allow(unsafe_code)]

use std::io;

/// What a thread asks for, nanoseconds: several requests' worth. The kernel's own is 0.7 to 2.8 ms.
const SLICE: u64 = 200_000;

/// `SCHED_FLAG_KEEP_POLICY` of include/uapi/linux/sched.h: who has started us may have set another.
const KEEP_POLICY: u64 = 0x08;

/// `struct sched_attr` of include/uapi/linux/sched/types.h, as long as it was at first.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for short slices: who asks for little gets it soon (EEVDF, Linux 6.12), and of what it gets in all nothing changes. A request waits
/// for the processor as often as it has steps, and the slowest hundredth are those that waited for others' slices. Kernels from before do not mind.
pub fn shorten() {
    if let Err(error) = set() {
        tracing::debug!(%error, "a thread cannot have short slices");
    }
}

fn set() -> io::Result<()> {
    // SAFETY: a system call on numbers alone.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let size = u32::try_from(size_of::<Attributes>()).map_err(io::Error::other)?;
    let attributes = Attributes { size, flags: KEEP_POLICY, nice, runtime: SLICE, ..Attributes::default() };
    // SAFETY: the kernel reads as many bytes as `size` says, which are those of `attributes`. Thread 0 is this one.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_ask() {
        std::thread::spawn(|| {
            set().unwrap();
            let mut now = Attributes::default();
            let size = u32::try_from(size_of::<Attributes>()).unwrap();
            // SAFETY: the kernel writes `size` bytes at most, which is what `now` has.
            let read = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut now, size, 0) };
            // SAFETY: a system call on numbers alone.
            let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
            assert_eq!((read, now.policy, now.nice), (0, 0, nice));
            // Older kernels say nothing of it.
            assert!([0, SLICE].contains(&now.runtime), "{}", now.runtime);
        })
        .join()
        .unwrap();
    }
}

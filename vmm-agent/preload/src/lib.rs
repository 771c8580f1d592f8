//! Loaded into a VMM's process before its program begins (ld.so(8), `LD_PRELOAD`): makes a userfaultfd there.
//!
//! A userfaultfd is about the memory of the process that makes it, and a process that is run by `execve` has new memory, so
//! nobody else can make it. The agent takes a copy of the descriptor when it first wants to know which pages of the guest's
//! memory are written (`vmm-agent/src/driver/writes.rs`), and until then it does nothing. The program itself never hears of
//! it. Where the kernel has none, there is none.
#![allow(unsafe_code)]

/// Faults of the kernel itself are not for it (ioctl_userfaultfd(2)): what an unprivileged user may ask for. Write
/// protection that the kernel lifts by itself, which is what the agent asks for, needs no more.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// What the dynamic linker calls when it has loaded this.
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

extern "C" fn begin() {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: a system call on numbers alone, and a change of the environment before there is a second thread.
    unsafe {
        libc::syscall(libc::SYS_userfaultfd, flags);
        // Of no concern to what this process might start.
        libc::unsetenv(c"LD_PRELOAD".as_ptr());
    }
}

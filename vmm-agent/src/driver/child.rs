//! What every VMM's process gives up before it is one. Async-signal-safe: between fork(2) and execve(2).

use std::{
    fs::File,
    io::{self, Write as _},
};

use nix::sys::{
    prctl,
    resource::{Resource, setrlimit},
};

/// Under memory pressure the kernel ends a VM before anything of ours.
const OOM_SCORE: &[u8] = b"500";

/// Joins the control group whose `entrances` these are, and is the first to go when memory is short.
///
/// # Errors
///
/// The kernel's.
pub fn join(entrances: &[File]) -> io::Result<()> {
    for mut entrance in entrances {
        entrance.write_all(b"0")?;
    }
    File::options().write(true).open("/proc/self/oom_score_adj")?.write_all(OOM_SCORE)
}

/// Leaves no dump of a guest's memory on the host's disk, and can gain no privilege that it has not got.
///
/// # Errors
///
/// The kernel's.
pub fn bound() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    prctl::set_no_new_privs()
}

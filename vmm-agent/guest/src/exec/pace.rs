//! In which steps output is moved. Large ones move more: each costs the program and us a turn. But while somebody types, what
//! a program floods with is all in front of the echo, at every hop; in small ones the program itself is what holds it up,
//! and nothing queues. (Measured under emulation: 174 MiB/s and 13 ms to an echo beside it with large steps, 106 MiB/s and 2 ms
//! with small ones.)

use std::{
    os::fd::AsFd,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use nix::fcntl::{FcntlArg, fcntl};

/// What a pipe holds and is read of it at once, bytes: as it is made (pipe(7)).
pub const SMALL: usize = 64 << 10;
/// The same for a program that writes a lot, while nobody types.
pub const LARGE: usize = 256 << 10;
/// Input of at most so many bytes at once is somebody who types.
const TYPED: usize = 256;
/// Somebody who has typed goes on to for so long, milliseconds.
const TYPES_FOR: u64 = 1000;

/// Until when somebody types, milliseconds since the first look at the clock.
static TYPES_UNTIL: AtomicU64 = AtomicU64::new(0);

fn now() -> u64 {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    u64::try_from(BEGUN.get_or_init(Instant::now).elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Input of so many bytes has come, for any session.
pub fn heard(bytes: usize) {
    if bytes <= TYPED {
        TYPES_UNTIL.store(now() + TYPES_FOR, Ordering::Relaxed);
    }
}

/// The step in which a program that writes a lot is read now, bytes.
fn step() -> usize {
    if now() < TYPES_UNTIL.load(Ordering::Relaxed) { SMALL } else { LARGE }
}

/// The pipe of an output.
#[derive(Debug)]
pub struct Pipe {
    holds: usize,
}

impl Pipe {
    /// One as it is made.
    pub fn new() -> Self {
        Self { holds: SMALL }
    }

    /// Has `pipe`, which was just emptied, hold what a program that writes a lot is given now; what may be read at once, bytes.
    pub fn adapt(&mut self, pipe: impl AsFd) -> usize {
        let step = step();
        if step != self.holds {
            let size = i32::try_from(step).unwrap_or(i32::MAX);
            // Refused while it holds more than that (next time, then), and where a user's pipes hold too much.
            if fcntl(pipe, FcntlArg::F_SETPIPE_SZ(size)).is_ok() {
                self.holds = step;
            }
        }
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_large_while_nobody_types() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let held = || usize::try_from(fcntl(&reader, FcntlArg::F_GETPIPE_SZ).unwrap()).unwrap();
        let mut pipe = Pipe::new();
        heard(1);
        assert_eq!((pipe.adapt(&reader), held()), (SMALL, SMALL));
        TYPES_UNTIL.store(0, Ordering::Relaxed);
        assert_eq!((pipe.adapt(&reader), held()), (LARGE, LARGE));
        heard(TYPED + 1);
        assert_eq!((pipe.adapt(&reader), held()), (LARGE, LARGE));
        heard(TYPED);
        assert_eq!((pipe.adapt(&reader), held()), (SMALL, SMALL));
    }
}

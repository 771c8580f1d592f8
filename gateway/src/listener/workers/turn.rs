//! Turns of a thread that never has to wait.
//!
//! Under load there is always another request. Whoever else wants the processor then gets it when the kernel next looks who has had how
//! much, which may be as rare as 250 times a second: that was what made a hundredth of requests slow. So the thread offers it by itself,
//! about as often as a [slice](super::slice) ends. Who waits gets it if it has had less; nobody gets more than before.

use std::{cell::Cell, thread};

/// Requests of a turn: a slice's worth of small ones.
const REQUESTS: u32 = 8;

thread_local! {
    static BEGUN: Cell<u32> = const { Cell::new(0) };
}

/// A turn begins: the thread had to wait.
pub fn begin() {
    BEGUN.set(0);
}

/// A request begins, maybe in the next turn.
pub fn request() {
    let begun = BEGUN.get() + 1;
    if begun >= REQUESTS {
        thread::yield_now();
        begin();
    } else {
        BEGUN.set(begun);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        hint::black_box,
        sync::atomic::{AtomicU32, Ordering},
    };

    use nix::{
        sched::{CpuSet, sched_getaffinity, sched_setaffinity},
        unistd::Pid,
    };

    use super::{super::slice, *};

    const TURNS: u32 = 400;
    const ATTEMPTS: u32 = 5;

    /// How many of a thread's turns another one has ended.
    fn serve(processor: &CpuSet, own: &AtomicU32, other: &AtomicU32) -> u32 {
        sched_setaffinity(Pid::from_raw(0), processor).unwrap();
        slice::shorten();
        own.store(1, Ordering::Relaxed);
        while other.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let mut given = 0;
        for _ in 0..TURNS {
            let before = other.load(Ordering::Relaxed);
            for _ in 0..REQUESTS {
                // Some 20 µs.
                for number in 0..20_000_u32 {
                    black_box(number.wrapping_mul(number));
                }
                request();
            }
            own.fetch_add(1, Ordering::Relaxed);
            given += u32::from(other.load(Ordering::Relaxed) != before);
        }
        given
    }

    /// The same of two threads that share it.
    fn share(processor: &CpuSet) -> u32 {
        let [left, right] = [AtomicU32::new(0), AtomicU32::new(0)];
        thread::scope(|scope| {
            let other = scope.spawn(|| serve(processor, &right, &left));
            let given = scope.spawn(|| serve(processor, &left, &right)).join().unwrap();
            other.join().unwrap();
            given
        })
    }

    #[test]
    fn threads_that_share_a_processor_need_no_clock_to_share_it() {
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let first = (0..CpuSet::count()).find(|number| allowed.is_set(*number).unwrap()).unwrap();
        let mut one = CpuSet::new();
        one.set(first).unwrap();
        // Where one of them stands still the other comes to its end alone. Without the yield 5 were seen.
        let mut given = (0..ATTEMPTS).map(|_| share(&one)).inspect(|given| println!("{given} of {TURNS}"));
        assert!(given.any(|given| given > TURNS / 5));
    }
}

//! Turns of a thread that never has to wait.
//!
//! Under load there is always another request. Whoever else wants the processor then gets it when the kernel next looks who has had how
//! much, which may be as rare as 250 times a second: too late for half of what makes a hundredth of requests slow. So the thread offers it by
//! itself, about as often as it asks for [slices](super::slice). Who waits gets it if it has had less; nobody gets more than before.

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

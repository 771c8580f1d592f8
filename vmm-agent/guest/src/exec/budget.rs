//! What the output of all commands together may take of the guest's memory, which commands want for themselves.

use std::sync::{
    OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use nix::sys::sysinfo::sysinfo;

/// All output may take this part of the memory, beside what each is granted for free.
const SHARE: u64 = 8;

/// What is taken beyond that.
static SPENT: AtomicUsize = AtomicUsize::new(0);

fn budget() -> usize {
    static BUDGET: OnceLock<usize> = OnceLock::new();
    *BUDGET.get_or_init(|| {
        let memory = sysinfo().map(|info| info.ram_total()).unwrap_or_default();
        usize::try_from(memory / SHARE).unwrap_or(usize::MAX)
    })
}

/// What one output may take, bytes.
#[derive(Debug)]
pub struct Room {
    free: usize,
    room: usize,
}

impl Room {
    /// As much as everybody has.
    pub fn new(free: usize) -> Self {
        Self { free, room: free }
    }

    /// Bytes.
    pub fn get(&self) -> usize {
        self.room
    }

    /// Takes as much again, if there is any: up to `most` in all. Whether it has.
    pub fn grow(&mut self, most: usize) -> bool {
        let more = self.room.min(most.saturating_sub(self.room));
        let take = |spent: usize| spent.checked_add(more).filter(|spent| *spent <= budget());
        let grown = more > 0 && SPENT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        if grown {
            self.room += more;
        }
        grown
    }

    /// Gives back all beyond `enough`, and keeps what is free.
    pub fn shrink(&mut self, enough: usize) {
        let enough = enough.clamp(self.free, self.room);
        SPENT.fetch_sub(self.room - enough, Ordering::Relaxed);
        self.room = enough;
    }

    /// What all have taken.
    #[cfg(test)]
    pub fn spent() -> usize {
        SPENT.load(Ordering::Relaxed)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

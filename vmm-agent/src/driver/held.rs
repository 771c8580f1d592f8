//! Changed pages that are held in the agent's own memory while their VM is paused, and written when it runs again: a disk
//! that is busy with what was written before must not hold up a guest.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicU64, Ordering},
};

use super::pages::{GuestMemory, Run};
use crate::capacity;

/// Bytes that all captures of this agent hold together at most. What there is beyond is written while the VM is paused.
const MAX: u64 = 1 << 30;
/// The part of the host's available memory that a capture may take: a fourth.
const PART: u64 = 4;
/// Bytes of a page of the host.
const PAGE: usize = 4096;

/// What all captures of this agent hold together.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// Room for pages, and those that are in it.
#[derive(Debug)]
pub struct Held {
    buffer: Vec<u8>,
    runs: Vec<Run>,
    /// What is taken of the room that all captures share.
    taken: u64,
    all_taken: &'static AtomicU64,
}

impl Held {
    /// Room for `bytes` and a fourth more, as far as there is room. Touched here, so that it need not be when the VM is
    /// paused.
    pub fn reserve(bytes: u64) -> Self {
        let available = capacity::memory_available_mb().unwrap_or_default() << 20;
        Self::reserve_of(bytes, available / PART, &TAKEN)
    }

    /// As [`Held::reserve`], with at most `bound`, of what those share that count together.
    fn reserve_of(bytes: u64, bound: u64, all_taken: &'static AtomicU64) -> Self {
        let wanted = (bytes + bytes / 4).min(bound);
        let mut taken = 0;
        let grant = |before: u64| {
            taken = wanted.min(MAX.saturating_sub(before));
            Some(before + taken)
        };
        // Never fails: there is always an answer.
        let _ = all_taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grant);
        // At most MAX.
        let mut buffer = vec![0; taken as usize];
        for page in buffer.chunks_mut(PAGE) {
            // The kernel gives a page when it is written to, and not before.
            std::hint::black_box(&mut page[0]).clone_from(&1);
        }
        Self { buffer, runs: Vec::new(), taken, all_taken }
    }

    /// Takes as many of the pages `runs` of `memory` as there is room for; returns those that are left.
    ///
    /// # Errors
    ///
    /// If the process has ended.
    pub fn take<'a>(&mut self, memory: &GuestMemory, runs: &'a [Run]) -> io::Result<&'a [Run]> {
        let (mut bytes, mut fitting) = (0, 0);
        for run in runs {
            bytes += run.bytes();
            if bytes > self.buffer.len() as u64 {
                break;
            }
            fitting += 1;
        }
        let (held, left) = runs.split_at(fitting);
        memory.read_into(held, &mut self.buffer)?;
        self.runs = held.to_vec();
        Ok(left)
    }

    /// What is held, bytes.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.bytes()).sum()
    }

    /// The bytes that are held from `offset` on, all pages one after the other; `None` if those are not among them.
    pub fn part(&self, offset: u64, bytes: u64) -> Option<&[u8]> {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.bytes())?;
        // It is in the buffer.
        self.buffer.get(offset as usize..end as usize)
    }

    /// Writes what is held over the pages of `image`.
    ///
    /// # Errors
    ///
    /// If it does not take it.
    pub fn save_over(&self, image: &File) -> io::Result<()> {
        let mut rest = &self.buffer[..];
        for run in &self.runs {
            let (part, after) = rest.split_at(run.bytes() as usize);
            image.write_all_at(part, run.offset())?;
            rest = after;
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all_taken.fetch_sub(self.taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_an_end_to_what_is_held() {
        const LITTLE: u64 = 1 << 20;
        static TAKEN: AtomicU64 = AtomicU64::new(0);
        let reserve = |bytes| Held::reserve_of(bytes, LITTLE, &TAKEN);
        let bounded = reserve(MAX);
        assert_eq!(bounded.buffer.len() as u64, LITTLE);
        // Somebody holds nearly all that there may be.
        let others = MAX - LITTLE - 4096;
        TAKEN.fetch_add(others, Ordering::Relaxed);
        let last = reserve(LITTLE);
        assert_eq!(last.buffer.len(), 4096, "what is left of it");
        assert!(reserve(4096).buffer.is_empty(), "it is written while the VM is paused instead");
        drop(bounded);
        assert_eq!(reserve(4096).buffer.len(), 4096 + 1024);
        drop(last);
        assert_eq!(TAKEN.load(Ordering::Relaxed), others, "each gives back what it took");
    }
}

//! The tiers of hibernation, and what is decided about them: functions of values, and of nothing else.
//!
//! ```text
//!   paused: the process stands still, its memory where it was ──captured──▶ and on disk, too
//!      │ the guest is not quiet, the host is short of memory,                  │ its time is over, or the
//!      ▼ or it is told to: captured before anything else                       ▼ host wants the memory
//!   stored: only disk, memory and devices are left, as files
//! ```
//!
//! From the first tier a VM wakes as fast as it is let go on; nothing but the capture is between it and the second one.
//! Where the machine dies before it is captured, its disk is left, which its guest has written everything back to.

use std::time::{Duration, SystemTime};

use crate::capacity::{Limits, Room};

/// Where the memory of a hibernated VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Where it was: its process stands still.
    Paused,
    /// On disk alone.
    Stored,
}

/// A VM of the first tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paused {
    /// Since when.
    pub since: SystemTime,
    /// What its memory and devices take on disk, bytes; 0 as long as they are not there.
    pub stored_bytes: u64,
    /// Whether its process has ended: it is of the second tier, and the journal does not say so yet.
    pub is_gone: bool,
}

impl Paused {
    /// Whether its memory is on disk, so that its process may be ended.
    pub fn is_captured(&self) -> bool {
        self.stored_bytes > 0
    }
}

/// What a VM that sleeps goes on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Its process; the journal says so.
    Paused(Paused),
    /// What is stored of it.
    Stored,
    /// Its disk alone: whatever else is there is of another disk, or no good.
    Disk,
}

/// Who may be in the first tier, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How long a VM stays there; not at all if that is zero.
    pub paused_for: Duration,
    /// Memory beyond the host's reserve that others, such as the pool, want before VMs are kept there, MiB.
    pub headroom_mb: u64,
    /// Whether VMs of the second tier are put into the object store, too.
    pub uploads: bool,
}

/// What to do with a VM of the first tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Capture it.
    Capture,
    /// End its process.
    End,
}

/// A VM of the first tier among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Since when it is there.
    pub since: SystemTime,
    /// Whether its process may be ended.
    pub is_captured: bool,
}

impl Policy {
    /// The tier of a VM that hibernates now, on a host on which `processes` VMs of sandboxes have one, it included.
    pub fn tier(&self, limits: &Limits, processes: usize, room: Option<Room>) -> Tier {
        let is_wanted = !self.paused_for.is_zero() && processes <= limits.max_sandboxes;
        // A host that cannot be measured is not known to be short of anything.
        match is_wanted && !room.is_some_and(|room| self.is_short(limits, room)) {
            true => Tier::Paused,
            false => Tier::Stored,
        }
    }

    /// What is next for a VM of the first tier, and how long from now.
    pub fn next(&self, paused: Paused, now: SystemTime) -> (Step, Duration) {
        if paused.is_gone {
            return (Step::End, Duration::ZERO);
        }
        if !paused.is_captured() {
            return (Step::Capture, Duration::ZERO);
        }
        // By a clock that was set back it is new.
        let age = now.duration_since(paused.since).unwrap_or_default();
        (Step::End, self.paused_for.saturating_sub(age))
    }

    /// Which VM of the first tier the host wants to be ended next, if any: the oldest of those that may be.
    pub fn surplus(
        &self,
        limits: &Limits,
        awake: usize,
        paused: &[Candidate],
        room: Option<Room>,
    ) -> Option<usize> {
        let is_crowded = awake + paused.len() > limits.max_sandboxes;
        let is_short = room.is_some_and(|room| self.is_short(limits, room));
        if is_crowded || is_short { oldest(paused) } else { None }
    }

    fn is_short(&self, limits: &Limits, room: Room) -> bool {
        room.memory_mb < limits.memory_reserve_mb.saturating_add(self.headroom_mb)
    }
}

/// The oldest VM whose process may be ended.
pub fn oldest(paused: &[Candidate]) -> Option<usize> {
    let captured = paused.iter().enumerate().filter(|(_, candidate)| candidate.is_captured);
    captured.min_by_key(|(_, candidate)| candidate.since).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { max_sandboxes: 3, memory_reserve_mb: 500, disk_reserve_mb: 0 };
    const POLICY: Policy = Policy { paused_for: Duration::from_secs(10), headroom_mb: 100, uploads: false };
    const ROOMY: Option<Room> = Some(Room { memory_mb: 600, disk_mb: 0 });
    const SHORT: Option<Room> = Some(Room { memory_mb: 599, disk_mb: 0 });

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn candidate(second: u64, is_captured: bool) -> Candidate {
        Candidate { since: at(second), is_captured }
    }

    #[test]
    fn the_first_tier_is_skipped_by_policy_and_under_pressure() {
        assert_eq!(POLICY.tier(&LIMITS, 3, ROOMY), Tier::Paused);
        assert_eq!(POLICY.tier(&LIMITS, 3, None), Tier::Paused);
        assert_eq!(POLICY.tier(&LIMITS, 4, ROOMY), Tier::Stored, "there are too many processes");
        assert_eq!(POLICY.tier(&LIMITS, 1, SHORT), Tier::Stored, "memory is short");
        let never = Policy { paused_for: Duration::ZERO, ..POLICY };
        assert_eq!(never.tier(&LIMITS, 1, ROOMY), Tier::Stored);
    }

    #[test]
    fn a_process_ends_when_it_is_captured_and_its_time_is_over() {
        let paused = Paused { since: at(100), stored_bytes: 0, is_gone: false };
        assert_eq!(POLICY.next(paused, at(500)), (Step::Capture, Duration::ZERO));
        let captured = Paused { stored_bytes: 1, ..paused };
        assert_eq!(POLICY.next(captured, at(104)), (Step::End, Duration::from_secs(6)));
        assert_eq!(POLICY.next(captured, at(500)), (Step::End, Duration::ZERO));
        assert_eq!(POLICY.next(captured, at(0)), (Step::End, POLICY.paused_for), "the clock was set back");
        let gone = Paused { is_gone: true, ..paused };
        assert_eq!(POLICY.next(gone, at(100)), (Step::End, Duration::ZERO));
    }

    #[test]
    fn pressure_ends_the_oldest_that_is_captured() {
        let paused = [candidate(3, true), candidate(1, false), candidate(2, true)];
        assert_eq!(POLICY.surplus(&LIMITS, 0, &paused, ROOMY), None);
        assert_eq!(POLICY.surplus(&LIMITS, 0, &paused, SHORT), Some(2));
        assert_eq!(POLICY.surplus(&LIMITS, 1, &paused, ROOMY), Some(2), "one too many");
        assert_eq!(POLICY.surplus(&LIMITS, 9, &paused[1..2], SHORT), None, "it is not captured");
    }

    proptest! {
        #[test]
        fn none_is_ended_that_is_not_captured(
            paused in prop::collection::vec((0..9_u64, any::<bool>()), 0..9),
            awake in 0..9_usize,
            memory_mb in 0..2000_u64,
        ) {
            let paused: Vec<_> = paused.into_iter().map(|(at, captured)| candidate(at, captured)).collect();
            let room = Some(Room { memory_mb, disk_mb: 0 });
            if let Some(index) = POLICY.surplus(&LIMITS, awake, &paused, room) {
                prop_assert!(paused[index].is_captured);
                let older = |other: &Candidate| other.is_captured && other.since < paused[index].since;
                prop_assert!(!paused.iter().any(older));
            }
        }
    }
}

//! What a tenant may use at once.

use thiserror::Error;

use crate::ledger::account::Count;

/// Limits of every tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Sandboxes.
    pub max_sandboxes: i32,
    /// Guest memory of all its sandboxes together, MiB.
    pub max_memory_mb: i64,
}

/// One sandbox more would be too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum QuotaExceeded {
    /// Too many sandboxes.
    #[error("the quota of {max} sandboxes is used up: delete some")]
    Sandboxes {
        /// The limit.
        max: i32,
    },
    /// Too much memory.
    #[error(
        "the quota of {max_mb} MiB of memory leaves {free_mb} MiB: delete some sandboxes, or take a smaller one"
    )]
    Memory {
        /// The limit, MiB.
        max_mb: i64,
        /// What is left of it, MiB.
        free_mb: i64,
    },
}

impl Quota {
    /// Whether a tenant that uses `used` may have `more` besides.
    ///
    /// # Errors
    ///
    /// [`QuotaExceeded`] if not.
    pub fn check(&self, used: Count, more: Count) -> Result<(), QuotaExceeded> {
        if used.sandboxes.saturating_add(more.sandboxes) > self.max_sandboxes {
            return Err(QuotaExceeded::Sandboxes { max: self.max_sandboxes });
        }
        if used.memory_mb.saturating_add(more.memory_mb) > self.max_memory_mb {
            let free_mb = self.max_memory_mb.saturating_sub(used.memory_mb).max(0);
            return Err(QuotaExceeded::Memory { max_mb: self.max_memory_mb, free_mb });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTA: Quota = Quota { max_sandboxes: 2, max_memory_mb: 4096 };
    const ONE: Count = Count { sandboxes: 1, memory_mb: 1024 };

    #[test]
    fn the_last_one_fits_and_the_next_does_not() {
        assert_eq!(QUOTA.check(ONE, ONE), Ok(()));
        let two = Count { sandboxes: 2, memory_mb: 2048 };
        assert_eq!(QUOTA.check(two, ONE), Err(QuotaExceeded::Sandboxes { max: 2 }));
    }

    #[test]
    fn memory_counts_too() {
        let big = Count { sandboxes: 1, memory_mb: 3072 };
        assert_eq!(QUOTA.check(big, ONE), Ok(()));
        assert_eq!(
            QUOTA.check(big, Count { sandboxes: 1, memory_mb: 1025 }),
            Err(QuotaExceeded::Memory { max_mb: 4096, free_mb: 1024 })
        );
        let absurd = Count { sandboxes: 1, memory_mb: i64::MAX };
        assert!(QUOTA.check(absurd, ONE).is_err());
    }
}

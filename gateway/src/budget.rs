//! Memory for what must be held whole: a JSON body, the first message of a gRPC call, an answer that becomes JSON.
//!
//! Each is bounded, but thousands of requests may be under way at once. So whatever is large takes its share of one
//! budget before it is read, and keeps it until its last byte has gone on; when the budget is used up the next one
//! waits, held back by flow control, and is refused if that takes too long. What is small passes freely.

use std::{sync::Arc, time::Duration};

use oc_mesh::error::{Reason, status};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// All that large messages may take together.
const TOTAL_BYTES: usize = 256 << 20;

/// Up to this size a message passes freely.
const FREE_BYTES: usize = 64 << 10;

/// The budget is counted in units of this size.
const UNIT_BYTES: usize = 64 << 10;

/// A message of `n` bytes is held in up to this many times `n`: as it came, decoded, and as text with escapes.
const COPIES: usize = 4;

/// How long a large message waits for its share.
const PATIENCE: Duration = Duration::from_secs(10);

/// The budget of one gateway.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Semaphore>);

/// A share of the budget, given back when it is dropped.
#[derive(Debug, Default)]
pub struct Held(Option<OwnedSemaphorePermit>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TOTAL_BYTES / UNIT_BYTES)))
    }
}

impl Budget {
    /// Takes the share of a message of so many bytes.
    ///
    /// # Errors
    /// `OVERLOADED` if there is none in time.
    pub async fn hold(&self, bytes: usize) -> Result<Held, Status> {
        if bytes <= FREE_BYTES {
            return Ok(Held(None));
        }
        let units = units(bytes.saturating_mul(COPIES));
        let share = Arc::clone(&self.0).acquire_many_owned(units);
        match tokio::time::timeout(PATIENCE, share).await {
            Ok(Ok(permit)) => Ok(Held(Some(permit))),
            // The semaphore is never closed: only time runs out.
            Ok(Err(_)) | Err(_) => {
                metrics::counter!("oc_gateway_budget_exhausted_total").increment(1);
                Err(status(Reason::Overloaded, "the gateway is busy with large messages"))
            }
        }
    }
}

impl Held {
    /// Gives back what is no longer needed once only `bytes` are left of the message.
    pub fn shrink(&mut self, bytes: usize) {
        let Some(permit) = &mut self.0 else { return };
        let needed = units(bytes) as usize;
        let surplus = permit.num_permits().saturating_sub(needed);
        drop(permit.split(surplus));
    }
}

/// Never more than there are in all: what is larger than the budget gets the whole of it.
fn units(bytes: usize) -> u32 {
    const ALL: usize = TOTAL_BYTES / UNIT_BYTES;
    u32::try_from(bytes.div_ceil(UNIT_BYTES).min(ALL)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn large_messages_wait_for_each_other_and_small_ones_do_not() {
        let budget = Budget::default();
        let mut held = budget.hold(TOTAL_BYTES).await.unwrap();
        assert!(budget.hold(FREE_BYTES).await.is_ok());
        assert!(budget.hold(FREE_BYTES + 1).await.is_err());
        held.shrink(1 << 20);
        let other = budget.hold(8 << 20).await.unwrap();
        drop((held, other));
        assert!(budget.hold(TOTAL_BYTES).await.is_ok());
    }
}

//! Randomness for choices that need not be secret: which host, how long to wait.

use std::time::Duration;

/// A number below `bound`, which must not be 0. Zero should the system have no randomness to give: a choice is then
/// less even, and nothing worse.
pub fn below(bound: usize) -> usize {
    let mut bytes = [0u8; size_of::<usize>()];
    let _ = getrandom::fill(&mut bytes);
    usize::from_ne_bytes(bytes) % bound.max(1)
}

/// Waits before attempt number `attempt` is repeated: `base`, doubled each time up to 64 times that, half of it drawn
/// by lot, so that those who collided do not collide again.
pub async fn pause(base: Duration, attempt: u32) {
    let longest = base * (1 << attempt.min(6));
    let drawn = below(usize::try_from(longest.as_micros() / 2).unwrap_or(usize::MAX));
    tokio::time::sleep(longest / 2 + Duration::from_micros(drawn as u64)).await;
}

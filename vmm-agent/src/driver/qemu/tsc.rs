//! How fast the host's time stamp counter counts.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use tokio::time::sleep;

/// Long enough that what the two ends of it are off by ([`CLOSE`]) is less than the kernel tolerates (500 ppm are corrected
/// by it later).
const WINDOW: Duration = Duration::from_millis(20);
/// Clock and counter are read within this time of each other.
const CLOSE: Duration = Duration::from_micros(5);
/// So often that is tried, on a host that keeps interrupting.
const TRIES: usize = 1000;

/// The rate of the time stamp counter, kHz.
///
/// Under software emulation the guest's counter runs at this rate. The kernel is told so on its command line
/// (`tsc_early_khz`), because its machine has no PIT to calibrate it against, and on a busy host that would fail.
pub async fn measure_khz() -> u64 {
    let (began, first) = now();
    sleep(WINDOW).await;
    let (ended, last) = now();
    let ticks = u128::from(last.wrapping_sub(first));
    let khz = ticks * 1_000_000 / ended.duration_since(began).as_nanos().max(1);
    u64::try_from(khz).unwrap_or(u64::MAX)
}

/// Clock and counter at the same moment.
fn now() -> (Instant, u64) {
    let pair = || (Instant::now(), read());
    (1..TRIES).map(|_| pair()).find(|(clock, _)| clock.elapsed() < CLOSE).unwrap_or_else(pair)
}

fn read() -> u64 {
    // SAFETY: RDTSC only reads a register, and every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn counts_at_the_rate_of_a_processor() {
        let khz = super::measure_khz().await;
        assert!((100_000..10_000_000).contains(&khz), "{khz} kHz");
    }
}

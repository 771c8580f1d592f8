//! How fast the host's time stamp counter counts.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use tokio::time::sleep;

/// Long enough that a preempted measurement is off by less than the kernel tolerates (500 ppm are corrected by it later).
const WINDOW: Duration = Duration::from_millis(20);

/// The rate of the time stamp counter, kHz.
///
/// Under software emulation the guest's counter runs at this rate. The kernel is told so on its command line
/// (`tsc_early_khz`), because its machine has no PIT to calibrate it against, and on a busy host that would fail.
pub async fn measure_khz() -> u64 {
    let (began, first) = (Instant::now(), read());
    sleep(WINDOW).await;
    let (ticks, passed) = (read().wrapping_sub(first), began.elapsed());
    let khz = u128::from(ticks) * 1_000_000 / passed.as_nanos().max(1);
    u64::try_from(khz).unwrap_or(u64::MAX)
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

//! Timers that are set for each request and hardly ever go off.
//!
//! A timer of tokio's is put among its thread's others, and taken out again, whenever it is set. These leave theirs where it is
//! for as long as it goes off early enough: then they look whether it was meant.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time,
};

use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};

/// A timer for whoever has it to themselves.
#[derive(Debug, Default)]
pub struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Waits until then. The next wait may be for another time.
    pub fn poll(&mut self, context: &mut Context<'_>, until: Instant) -> Poll<()> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if sleep.deadline() > until {
            sleep.as_mut().reset(until);
        }
        loop {
            ready!(sleep.as_mut().poll(context));
            if sleep.deadline() == until || until <= Instant::now() {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(until);
        }
    }
}

/// The timer of one of hyper's connections, that waits for one thing at a time. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct ConnectionTimer(Arc<Mutex<Timer>>);

impl hyper::rt::Timer for ConnectionTimer {
    fn sleep(&self, time: time::Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep_until(time::Instant::now() + time)
    }

    fn sleep_until(&self, until: time::Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(Wait { timer: self.clone(), until: until.into() })
    }
}

struct Wait {
    timer: ConnectionTimer,
    until: Instant,
}

impl hyper::rt::Sleep for Wait {}

impl Future for Wait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.timer.0.lock().poll(context, self.until)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use hyper::rt::Timer as _;
    use tokio::time::{advance, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_goes_off_when_it_was_set_for_last() {
        let (mut timer, begun) = (Timer::default(), Instant::now());
        // Later, earlier, later again, as the one before goes off, and once more when it is long past.
        for (asked, gives_up) in [(10_000, 3000), (12_000, 8000), (9000, 1000), (15_000, 20_000), (14_000, 1)]
        {
            let until = begun + Duration::from_millis(asked);
            let waited =
                timeout(Duration::from_millis(gives_up), poll_fn(|context| timer.poll(context, until)));
            let is_over = waited.await.is_ok();
            assert_eq!(is_over, Instant::now() >= until, "{asked}");
        }
        assert_eq!(begun.elapsed(), Duration::from_secs(15));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_waits_for_one_thing_after_the_other() {
        let (timer, begun) = (ConnectionTimer::default(), Instant::now());
        drop(timer.sleep(Duration::from_secs(3)));
        let mut first = timer.sleep(Duration::from_secs(5));
        assert!(timeout(Duration::from_secs(1), first.as_mut()).await.is_err());
        drop(first);
        advance(Duration::from_secs(1)).await;
        timer.sleep_until((begun + Duration::from_secs(8)).into_std()).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(8));
    }
}

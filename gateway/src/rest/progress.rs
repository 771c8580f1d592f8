//! Whether a transfer still moves. A file may take as long as it likes while bytes go over; what stands still because
//! the host neither takes nor gives any, though the client would, is ended.

use std::{sync::Arc, time::Duration};

use oc_mesh::error::{Reason, status};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tonic::Status;

/// How long a host may leave a transfer where it is. Writing a large file to a slow disk at its end is the longest.
const STALLED: Duration = Duration::from_secs(120);

/// When an upload last moved, for the body that moves and for whoever waits for the answer.
#[derive(Debug, Clone)]
pub struct Progress(Arc<Mutex<Instant>>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Progress {
    /// It moves.
    pub fn note(&self) {
        *self.0.lock() = Instant::now();
    }

    /// Waits until it has not moved for too long.
    pub async fn stalled(&self) -> Status {
        loop {
            let until = *self.0.lock() + STALLED;
            if until <= Instant::now() {
                return stalled();
            }
            sleep_until(until).await;
        }
    }
}

/// What a host gives, if it does so in time.
///
/// # Errors
/// `DEADLINE_EXCEEDED`; what `given` ends with.
pub async fn in_time<T>(given: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(STALLED, given).await.unwrap_or_else(|_| Err(stalled()))
}

fn stalled() -> Status {
    let text = format!("the sandbox let no byte pass for {} seconds", STALLED.as_secs());
    status(Reason::DeadlineExceeded, text)
}

#[cfg(test)]
mod tests {
    use oc_mesh::error::reason_of;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_moves_now_and_then_may_go_on_and_what_stands_still_may_not() {
        let (started, progress) = (Instant::now(), Progress::default());
        let moves = async {
            for _ in 0..5 {
                tokio::time::sleep(STALLED - Duration::from_secs(1)).await;
                progress.note();
            }
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = progress.stalled() => ended,
            () = moves => unreachable!("it never ends"),
        };
        assert_eq!(reason_of(&ended).as_deref(), Some("DEADLINE_EXCEEDED"));
        assert_eq!(started.elapsed(), (STALLED - Duration::from_secs(1)) * 5 + STALLED);
    }
}

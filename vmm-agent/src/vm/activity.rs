//! When a sandbox was last used, and whether it is in use now.
//!
//! A call holds a [`Call`] from its first byte to its last. Closing and opening exclude each other, so that a
//! sandbox deleted because it was idle has no call that began just before.

use std::{sync::Arc, time::SystemTime};

use parking_lot::Mutex;

/// Counts the live calls of one sandbox.
#[derive(Clone, Debug)]
pub struct Activity(Arc<Mutex<Calls>>);

#[derive(Debug)]
struct Calls {
    live: usize,
    last: SystemTime,
    closed: Option<Closed>,
}

/// Why no further call begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The sandbox is being deleted.
    Deleted,
    /// The sandbox is being stored.
    Hibernated,
}

/// Calls of one sandbox at once, attached streams too. Each may hold a window of bytes on every hop, and all sandboxes share
/// the host's room.
pub const MAX_CALLS: usize = 512;

/// Why no call begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCall {
    /// For that reason.
    Closed(Closed),
    /// There are [`MAX_CALLS`] already.
    Busy,
}

/// A call that lives; dropping it ends it.
#[derive(Debug)]
pub struct Call(Activity);

impl Activity {
    /// No calls yet; `now` counts as a use.
    pub fn new(now: SystemTime) -> Self {
        Self(Arc::new(Mutex::new(Calls { live: 0, last: now, closed: None })))
    }

    /// Begins a call.
    ///
    /// # Errors
    ///
    /// [`NoCall`] says why not.
    pub fn begin(&self) -> Result<Call, NoCall> {
        let mut calls = self.0.lock();
        if let Some(closed) = calls.closed {
            return Err(NoCall::Closed(closed));
        }
        if calls.live >= MAX_CALLS {
            return Err(NoCall::Busy);
        }
        calls.live += 1;
        Ok(Call(self.clone()))
    }

    /// When the sandbox was last used: `now` while a call lives.
    pub fn last_used(&self, now: SystemTime) -> SystemTime {
        let calls = self.0.lock();
        if calls.live > 0 { now } else { calls.last }
    }

    /// Counts as a use at `now`, such as the end of the start.
    pub fn touch(&self, now: SystemTime) {
        let mut calls = self.0.lock();
        calls.last = calls.last.max(now);
    }

    /// Lets no further call begin, for the reason `why`, unless the sandbox was used after `idle_since`. Returns whether
    /// it is closed.
    pub fn close(&self, idle_since: Option<SystemTime>, why: Closed) -> bool {
        let mut calls = self.0.lock();
        let used = idle_since.is_some_and(|since| calls.live > 0 || calls.last > since);
        if !used {
            calls.closed = Some(why);
        }
        calls.closed.is_some()
    }

    /// Lets calls begin again; `now` counts as a use.
    pub fn reopen(&self, now: SystemTime) {
        self.0.lock().closed = None;
        self.touch(now);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = self.0.0.lock();
        calls.live -= 1;
        calls.last = calls.last.max(SystemTime::now());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LONG_AGO: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn a_live_call_counts_as_use_and_its_end_is_remembered() {
        let activity = Activity::new(LONG_AGO);
        let before = SystemTime::now();
        let call = activity.begin().unwrap();
        let now = before + Duration::from_secs(3600);
        assert_eq!(activity.last_used(now), now);
        drop(call);
        assert!(activity.last_used(now) >= before && activity.last_used(now) < now);
    }

    #[test]
    fn there_is_an_end_to_calls() {
        let activity = Activity::new(LONG_AGO);
        let mut calls: Vec<_> = (0..MAX_CALLS).map(|_| activity.begin().unwrap()).collect();
        assert_eq!(activity.begin().err(), Some(NoCall::Busy));
        calls.pop();
        assert!(activity.begin().is_ok());
    }

    #[test]
    fn closing_an_idle_sandbox_spares_one_in_use() {
        let activity = Activity::new(LONG_AGO);
        let call = activity.begin().unwrap();
        assert!(!activity.close(Some(LONG_AGO), Closed::Hibernated));
        drop(call);
        assert!(!activity.close(Some(LONG_AGO), Closed::Hibernated), "it was used since");
        assert!(activity.close(Some(SystemTime::now()), Closed::Hibernated));
        assert_eq!(activity.begin().err(), Some(NoCall::Closed(Closed::Hibernated)));
        activity.reopen(LONG_AGO);
        assert!(activity.begin().is_ok());
    }

    #[test]
    fn closing_without_a_condition_shuts_out_new_calls_only() {
        let activity = Activity::new(LONG_AGO);
        let _call = activity.begin().unwrap();
        assert!(activity.close(None, Closed::Deleted));
        assert_eq!(activity.begin().err(), Some(NoCall::Closed(Closed::Deleted)));
    }
}

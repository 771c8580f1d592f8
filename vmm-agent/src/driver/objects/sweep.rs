//! Removing chunks that no snapshot in the store names any more, while any host may be uploading.
//!
//! A sweep lists the chunks, then reads every inventory, and removes what is older than a grace period and named by none,
//! after a last look at each, which must find it as it was listed. One host sweeps at a time: each sweep has a number, which is put if nobody has put it, and the
//! next one begins long after it must have ended. Uploads wait for nobody. What keeps a sweep from taking a chunk that one
//! relies on:
//!
//! - An upload puts anew what is older than half of the grace period, and publishes within a quarter of it. So a chunk that
//!   it found young enough is named before any sweep could find it old.
//! - A sweep may have found a chunk old just before an upload put it anew. It removes it within [`Pace::settle`] of its
//!   last look or not at all, and the upload looks again after that time, before it publishes.
//!
//! [`Pace::settle`]: super::Pace::settle

use std::{
    collections::HashMap,
    io,
    time::{Duration, SystemTime},
};

use futures_util::TryStreamExt as _;
use object_store::{ObjectStoreExt as _, PutMode, PutOptions, path::Path};
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    ObjectError, Objects,
    chunk::{self, ChunkId},
    inventory, unfinished,
};

/// What the names of sweeps begin with.
const SWEEPS: &str = "sweeps";

/// How a chunk stands that an upload needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is not there.
    Missing,
    /// No sweep removes it before the upload is published.
    Young,
    /// A sweep might.
    Old,
}

impl Standing {
    /// Of a chunk that was put at `found`, if it is there.
    pub fn of(found: Option<SystemTime>, now: SystemTime, grace: Duration) -> Self {
        match found {
            None => Self::Missing,
            Some(put) if age(put, now) < grace / 2 => Self::Young,
            Some(_) => Self::Old,
        }
    }
}

/// Whether a chunk that nothing names may go.
pub fn may_go(put: SystemTime, now: SystemTime, grace: Duration) -> bool {
    age(put, now) > grace
}

/// What is of the future is of now: its host's clock is ahead.
fn age(put: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(put).unwrap_or_default()
}

/// What a sweep has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Chunks that it found.
    pub chunks: usize,
    /// Those that it removed.
    pub removed: usize,
}

impl Objects {
    /// Sweeps, unless a host has done so lately: then `None`.
    ///
    /// # Errors
    ///
    /// As [`Objects::sweep`].
    pub async fn sweep_if_due(&self) -> Result<Option<Swept>, ObjectError> {
        let earlier: Vec<_> = self.store.list(Some(&Path::from(SWEEPS))).try_collect().await?;
        let number = |at: &Path| at.filename().and_then(|name| name.parse::<u64>().ok()).unwrap_or_default();
        let last = earlier.iter().max_by_key(|meta| number(&meta.location));
        if last.is_some_and(|meta| age(meta.last_modified.into(), self.clock.now()) < self.pace.sweep_every) {
            return Ok(None);
        }
        let next = last.map_or(1, |meta| number(&meta.location) + 1);
        let ours = Path::from_iter([SWEEPS, &next.to_string()]);
        match self.store.put_opts(&ours, "".into(), PutOptions::from(PutMode::Create)).await {
            // Another host was quicker.
            Err(object_store::Error::AlreadyExists { .. }) => return Ok(None),
            put => put?,
        };
        for meta in &earlier {
            self.store.delete(&meta.location).await?;
        }
        let within = self.pace.sweep_every / 4;
        timeout(within, self.sweep()).await.unwrap_or(Err(ObjectError::Late(within))).map(Some)
    }

    /// Removes the chunks that may go. Nobody else does so meanwhile.
    ///
    /// # Errors
    ///
    /// [`ObjectError`] if the store does not answer, or an inventory is damaged: what that names nobody knows. Nothing that
    /// is named was removed then.
    pub async fn sweep(&self) -> Result<Swept, ObjectError> {
        let (grace, mut chunks) = (self.pace.grace, 0);
        let mut old = HashMap::new();
        // Before any inventory is read. What is put from here on is young.
        let mut listed = self.store.list(Some(&Path::from(chunk::PREFIX)));
        while let Some(meta) = listed.try_next().await? {
            if let Some(id) = ChunkId::at(&meta.location) {
                chunks += 1;
                if may_go(meta.last_modified.into(), self.clock.now(), grace) {
                    old.insert(id, meta.last_modified.timestamp());
                }
            }
        }
        if !old.is_empty() {
            let mut inventories = self.store.list(Some(&Path::from(inventory::PREFIX)));
            while let Some(meta) = inventories.try_next().await? {
                match self.inventory(meta.location.filename().unwrap_or_default()).await {
                    Ok(inventory) => inventory.chunks().for_each(|id| {
                        old.remove(&id);
                    }),
                    // Its snapshot was deleted a moment ago.
                    Err(ObjectError::NotFound(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if let Some(directory) = self.directory.clone() {
            let now = self.clock.now();
            let swept = spawn_blocking(move || unfinished::sweep(&directory, now, grace));
            swept.await.map_err(io::Error::other)??;
        }
        let mut removed = 0;
        for (id, listed) in old {
            let last_look = async {
                let at = id.path();
                let meta = match self.store.head(&at).await {
                    Err(object_store::Error::NotFound { .. }) => return Ok(false),
                    meta => meta?,
                };
                // Not if it was put anew since it was listed: an inventory that was read before may name it by now. In
                // seconds, because stores tell one more exactly than the other.
                let is_the_same = meta.last_modified.timestamp() == listed;
                if is_the_same {
                    self.store.delete(&at).await?;
                }
                Ok::<_, object_store::Error>(is_the_same)
            };
            let within = self.pace.settle / 2;
            let went = timeout(within, last_look).await.map_err(|_| ObjectError::Late(within))??;
            removed += usize::from(went);
        }
        Ok(Swept { chunks, removed })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRACE: Duration = Duration::from_secs(100);
    const SETTLE: u64 = 4;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + second)
    }

    #[test]
    fn a_chunk_is_put_anew_long_before_it_may_go() {
        assert_eq!(Standing::of(None, at(0), GRACE), Standing::Missing);
        assert_eq!(Standing::of(Some(at(0)), at(49), GRACE), Standing::Young);
        assert_eq!(Standing::of(Some(at(0)), at(50), GRACE), Standing::Old);
        assert!(!may_go(at(0), at(100), GRACE) && may_go(at(0), at(101), GRACE));
        assert_eq!(Standing::of(Some(at(99)), at(0), GRACE), Standing::Young, "of a clock that is ahead");
        assert!(!may_go(at(999), at(0), GRACE));
    }

    /// One chunk, a snapshot that names it and goes, an upload of another that needs it, and a sweep. Each step of either
    /// takes place at the second that it says.
    #[derive(Clone, Debug)]
    struct History {
        put: u64,
        first_goes: Option<u64>,
        looks: u64,
        publishes_after: u64,
        lists: u64,
        reads_after: u64,
        last_look_after: u64,
        removes_after: u64,
    }

    fn histories() -> impl Strategy<Value = History> {
        (
            0..50_u64,
            prop::option::of(0..300_u64),
            0..300_u64,
            // Published within a quarter of the grace period.
            0..=25_u64,
            0..300_u64,
            0..120_u64,
            0..120_u64,
            // Removed within the time to settle.
            0..SETTLE,
        )
            .prop_map(
                |(
                    put,
                    first_goes,
                    looks,
                    publishes_after,
                    lists,
                    reads_after,
                    last_look_after,
                    removes_after,
                )| {
                    let looks = looks.max(put);
                    let lists = lists.max(put);
                    let first_goes = first_goes.map(|goes| goes.max(put));
                    History {
                        put,
                        first_goes,
                        looks,
                        publishes_after,
                        lists,
                        reads_after,
                        last_look_after,
                        removes_after,
                    }
                },
            )
    }

    /// Whether the chunk is there when all is over.
    fn survives(history: &History) -> bool {
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        enum Step {
            Put,
            FirstGoes,
            List,
            Look,
            LookAgain,
            Publish,
            ReadInventories,
            LastLook,
            Remove,
        }
        let h = history;
        let reads = h.lists + h.reads_after;
        let last_look = reads + h.last_look_after;
        let mut steps = vec![
            (h.put, Step::Put),
            (h.lists, Step::List),
            (h.looks, Step::Look),
            (reads, Step::ReadInventories),
            (last_look, Step::LastLook),
            (last_look + h.removes_after, Step::Remove),
        ];
        steps.extend(h.first_goes.map(|second| (second, Step::FirstGoes)));
        steps.sort();
        let (mut chunk, mut is_first_there, mut is_second_there) = (None, true, false);
        let (mut candidate, mut is_condemned) = (None, false);
        let mut next = 0;
        while next < steps.len() {
            let (second, step) = steps[next];
            let now = at(second);
            match step {
                Step::Put => chunk = Some(now),
                Step::FirstGoes => is_first_there = false,
                Step::List => candidate = chunk.filter(|put| may_go(*put, now, GRACE)),
                Step::Look | Step::LookAgain => {
                    let standing = Standing::of(chunk, now, GRACE);
                    if standing != Standing::Young {
                        chunk = Some(now);
                    }
                    let follows = match (step, standing) {
                        (Step::Look, Standing::Old) => (second + SETTLE, Step::LookAgain),
                        _ => (second + h.publishes_after.min(25 - SETTLE), Step::Publish),
                    };
                    steps.push(follows);
                    steps[next + 1..].sort();
                }
                Step::Publish => is_second_there = true,
                Step::ReadInventories => {
                    candidate = candidate.filter(|_| !is_first_there && !is_second_there)
                }
                Step::LastLook => is_condemned = candidate.is_some() && chunk == candidate,
                Step::Remove if is_condemned => chunk = None,
                Step::Remove => {}
            }
            next += 1;
        }
        chunk.is_some()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn no_sweep_takes_what_an_upload_relies_on(history in histories()) {
            prop_assert!(survives(&history));
        }
    }
}

//! How far a stream is in which nothing happens.
//!
//! The store's revision grows with every change of anything, while a watch tells of sandboxes alone: a stream that knew
//! no more than the last of these would soon name a revision that the store has compacted. So now and then all records
//! are listed. If none of them was written between the last one that a stream has seen and the revision of the list, no
//! change is missing up to there: records are removed an hour after the last change that is told of them.

use std::time::Duration;

use oc_mesh::{
    keys,
    store::{KeyValue, Page, Revision, SharedStore, StoreError},
};
use tokio::{sync::Mutex, time::Instant};

/// How long what was found out is good enough.
const FRESH: Duration = Duration::from_secs(10);
/// Records that are listed at once.
const PAGE: usize = 500;

/// What is known, for all streams of this process.
#[derive(Debug)]
pub struct Horizon {
    store: SharedStore,
    known: Mutex<Option<(Instant, Quiet)>>,
}

/// No record was written after `from` up to `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quiet {
    from: Revision,
    to: Revision,
}

impl Horizon {
    /// Nothing is known yet.
    pub fn new(store: SharedStore) -> Self {
        Self { store, known: Mutex::default() }
    }

    /// Up to where nothing is missing for one that has seen all changes up to `seen`.
    pub async fn beyond(&self, seen: Revision) -> Revision {
        // One looks for all who wait.
        let mut known = self.known.lock().await;
        if known.is_none_or(|(found, _)| found.elapsed() > FRESH) {
            match self.look().await {
                Ok(quiet) => *known = quiet.map(|quiet| (Instant::now(), quiet)),
                Err(error) => {
                    tracing::debug!(%error, "how far watches are cannot be told");
                    return seen;
                }
            }
        }
        known.map_or(seen, |(_, quiet)| quiet.beyond(seen))
    }

    async fn look(&self) -> Result<Option<Quiet>, StoreError> {
        let (listed, revision) = list(&self.store, keys::SANDBOXES, |entry| entry.mod_revision).await?;
        Ok(Quiet::of(listed.into_iter(), revision))
    }
}

/// What `shown` makes of all entries under a prefix, and the revision of the first page: a watch from there misses
/// nothing.
///
/// # Errors
///
/// The store cannot be read.
pub async fn list<T>(
    store: &SharedStore,
    prefix: &str,
    shown: impl Fn(KeyValue) -> T,
) -> Result<(Vec<T>, Revision), StoreError> {
    let (mut listed, mut first, mut after) = (Vec::new(), None, None::<String>);
    loop {
        let Page { items, revision, more } = store.range(prefix, after.as_deref(), PAGE).await?;
        let first = *first.get_or_insert(revision);
        after = items.last().map(|entry| entry.key.clone());
        listed.extend(items.into_iter().map(&shown));
        if !more {
            return Ok((listed, first));
        }
    }
}

impl Quiet {
    /// Of when each record was last written, and the revision of that list; `None` if one was written since, which may
    /// hide that it was written before, too.
    fn of(written: impl Iterator<Item = Revision>, to: Revision) -> Option<Self> {
        let from = written.max().unwrap_or_default();
        (from <= to).then_some(Self { from, to })
    }

    fn beyond(self, seen: Revision) -> Revision {
        if seen >= self.from { seen.max(self.to) } else { seen }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_seen_to_be_quiet_is_passed_over() {
        let quiet = |written: &[u64], to| Quiet::of(written.iter().copied().map(Revision), Revision(to));
        let known = quiet(&[3, 7, 5], 20).unwrap();
        for (seen, beyond) in [(6, 6), (7, 20), (12, 20), (25, 25)] {
            assert_eq!(known.beyond(Revision(seen)), Revision(beyond));
        }
        assert_eq!(quiet(&[3, 21], 20), None, "it may have been written at 10, too");
        assert_eq!(quiet(&[], 4).unwrap().beyond(Revision(1)), Revision(4));
    }
}

//! The one thread that writes: what waits for it is run and committed together.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{oneshot, watch};

use super::{apply, follow, read, schema};
use crate::store::{LeaseId, Revision, StoreError, Txn, TxnOutcome};

/// Jobs that may wait; beyond, the store is too busy.
const QUEUE: usize = 4096;
/// Jobs committed together at most.
const BATCH: usize = 256;
/// How often lapsed leases are looked for.
const SWEEP: Duration = Duration::from_millis(250);

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the thread is asked for.
pub(super) enum Job {
    Txn(Txn, Reply<TxnOutcome>),
    Grant(i64, Reply<LeaseId>),
    KeepAlive(LeaseId, Reply<()>),
    Revoke(LeaseId, Reply<()>),
}

impl Job {
    /// Answers without having been run.
    fn fail(self, error: StoreError) {
        // The caller may be gone: then nobody needs the answer.
        let _ = match self {
            Self::Txn(_, reply) => reply.send(Err(error)).is_ok(),
            Self::Grant(_, reply) => reply.send(Err(error)).is_ok(),
            Self::KeepAlive(_, reply) | Self::Revoke(_, reply) => reply.send(Err(error)).is_ok(),
        };
    }
}

/// The thread's mailbox. The thread ends when this is dropped.
pub(super) struct Writer(SyncSender<Job>);

impl Writer {
    pub(super) fn start(
        connection: Connection,
        path: &Path,
        publish: Arc<watch::Sender<Revision>>,
    ) -> Result<Self, StoreError> {
        let (jobs, mailbox) = sync_channel(QUEUE);
        let witnesses = Witnesses { publish, wal: schema::beside(path, "-wal") };
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write(connection, &mailbox, &witnesses))
            .map_err(|error| StoreError::Unavailable(format!("store thread: {error}")))?;
        Ok(Self(jobs))
    }

    pub(super) async fn run<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        match self.0.try_send(job(reply)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(StoreError::Unavailable("too many writes wait".into())),
            Err(TrySendError::Disconnected(_)) => return Err(stopped()),
        }
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }
}

fn stopped() -> StoreError {
    StoreError::Unavailable("the store's writer has stopped".into())
}

/// Who is to learn of a commit.
struct Witnesses {
    publish: Arc<watch::Sender<Revision>>,
    wal: PathBuf,
}

impl Witnesses {
    fn tell(&self, revision: Revision) {
        publish_newer(&self.publish, revision);
        follow::tell(&self.wal);
    }
}

fn write(mut connection: Connection, mailbox: &Receiver<Job>, witnesses: &Witnesses) {
    let mut swept = std::time::Instant::now();
    let mut longest_wal = u64::from(schema::WAL_BYTES);
    loop {
        let mut batch = Vec::new();
        match mailbox.recv_timeout(SWEEP) {
            Ok(job) => batch.push(job),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while batch.len() < BATCH {
            match mailbox.try_recv() {
                Ok(job) => batch.push(job),
                Err(_) => break,
            }
        }
        if swept.elapsed() >= SWEEP {
            swept = std::time::Instant::now();
            match apply::sweep(&mut connection) {
                Ok(Some(revision)) => witnesses.tell(revision),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "lapsed leases were not swept"),
            }
            longest_wal = shorten_wal(&mut connection, &witnesses.wal, longest_wal);
        }
        if !batch.is_empty() {
            commit(&mut connection, batch, witnesses);
        }
    }
}

/// Begins the WAL file again if it is longer than `longest`: how long it may become next.
fn shorten_wal(connection: &mut Connection, wal: &Path, longest: u64) -> u64 {
    let length = std::fs::metadata(wal).map_or(0, |metadata| metadata.len());
    if length <= longest {
        return longest;
    }
    let begun = schema::restart_wal(connection);
    if let Err(error) = &begun {
        tracing::warn!(%error, "the store's log was not begun again");
    }
    let limit = u64::from(schema::WAL_BYTES);
    // Somebody stands still amid reading: trying it all the time would hold up every writer.
    if begun.unwrap_or(false) { limit } else { length + limit }
}

/// An answer that may be sent once the commit is durable.
type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Runs the jobs in one SQLite transaction and answers them after its commit.
fn commit(connection: &mut Connection, batch: Vec<Job>, witnesses: &Witnesses) {
    let mut answers = Vec::with_capacity(batch.len());
    let mut jobs = batch.into_iter();
    match run_all(connection, &mut jobs, &mut answers) {
        Ok(committed) => {
            if let Some(revision) = committed {
                witnesses.tell(revision);
            }
            answers.into_iter().for_each(|answer| answer(Ok(())));
        }
        Err(error) => {
            tracing::error!(%error, "commit failed");
            answers.into_iter().for_each(|answer| answer(Err(again(&error))));
            jobs.for_each(|job| job.fail(again(&error)));
        }
    }
}

/// The same failure, for one more caller.
fn again(error: &StoreError) -> StoreError {
    match error {
        StoreError::Corrupt(text) => StoreError::Corrupt(text.clone()),
        StoreError::Unavailable(text) => StoreError::Unavailable(text.clone()),
        other => StoreError::Unavailable(other.to_string()),
    }
}

/// Runs jobs until one cannot be run at all, and commits what they changed: up to which revision, if anything.
///
/// A job that fails for itself changes nothing: each runs in a savepoint of its own. Where SQLite fails, nothing of
/// the batch is committed: it may have rolled back the transaction by itself, and what ran thereafter would be
/// committed without its revision.
fn run_all(
    connection: &mut Connection,
    jobs: &mut impl Iterator<Item = Job>,
    answers: &mut Vec<Answer>,
) -> Result<Option<Revision>, StoreError> {
    let mut transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let first = read::revision(&transaction)?;
    let (mut revision, mut has_changed) = (first, false);
    for job in jobs {
        let savepoint = transaction.savepoint()?;
        let (effect, answer) = run(&savepoint, job, revision);
        answers.push(answer);
        match effect? {
            Effect::Nothing => savepoint.finish()?,
            Effect::Changed(newest) => {
                savepoint.commit()?;
                (revision, has_changed) = (newest, true);
            }
        }
    }
    if !has_changed {
        return Ok(None);
    }
    if revision > first {
        apply::set_revision(&transaction, revision)?;
    }
    transaction.commit()?;
    Ok(Some(revision))
}

/// What a job did.
enum Effect {
    /// Nothing that must be kept.
    Nothing,
    /// Something; this is the newest revision now.
    Changed(Revision),
}

/// Runs one job: its effect, or why SQLite could not, and its answer.
fn run(connection: &Connection, job: Job, revision: Revision) -> (Result<Effect, StoreError>, Answer) {
    match job {
        Job::Txn(txn, reply) => {
            let result = apply::apply(connection, &txn, revision);
            settle(reply, result, |outcome| match outcome {
                TxnOutcome::Committed(newest) if *newest > revision => Effect::Changed(*newest),
                _ => Effect::Nothing,
            })
        }
        Job::Grant(ttl_ms, reply) => {
            settle(reply, apply::grant(connection, ttl_ms), |_| Effect::Changed(revision))
        }
        Job::KeepAlive(lease, reply) => {
            settle(reply, apply::keep_alive(connection, lease), |()| Effect::Changed(revision))
        }
        Job::Revoke(lease, reply) => match apply::end_lease(connection, lease, revision) {
            Ok(newest) => settle(reply, Ok(()), |()| Effect::Changed(newest)),
            Err(error) => settle(reply, Err(error), |()| Effect::Nothing),
        },
    }
}

fn settle<T: Send + 'static>(
    reply: Reply<T>,
    result: Result<T, StoreError>,
    effect: impl FnOnce(&T) -> Effect,
) -> (Result<Effect, StoreError>, Answer) {
    let effect = match &result {
        Ok(done) => Ok(effect(done)),
        Err(error @ (StoreError::Unavailable(_) | StoreError::Corrupt(_))) => Err(again(error)),
        Err(_) => Ok(Effect::Nothing),
    };
    let answer = Box::new(move |committed: Result<(), StoreError>| {
        // The caller may be gone: then nobody needs the answer.
        let _ = reply.send(committed.and(result));
    });
    (effect, answer)
}

/// Wakes the watchers of this process.
pub(super) fn publish_newer(publish: &watch::Sender<Revision>, revision: Revision) {
    publish.send_if_modified(|known| {
        let newer = revision > *known;
        if newer {
            *known = revision;
        }
        newer
    });
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::store::{Op, embedded::read};

    fn job(key: &str, bytes: usize) -> (Job, oneshot::Receiver<Result<TxnOutcome, StoreError>>) {
        let (reply, answer) = oneshot::channel();
        let put = Op::Put { key: key.into(), value: Bytes::from(vec![1; bytes]), lease: None };
        (Job::Txn(Txn { compare: Vec::new(), then: vec![put] }, reply), answer)
    }

    #[test]
    fn a_full_disk_fails_the_whole_batch_and_leaves_the_store_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        let mut connection = schema::open(&path).unwrap();
        let witnesses = Witnesses { publish: Arc::default(), wal: schema::beside(&path, "-wal") };
        let pages: i64 = connection.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
        let limit = |connection: &Connection, pages: i64| {
            connection.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
        };
        limit(&connection, pages + 4);

        let (jobs, mut answers): (Vec<_>, Vec<_>) =
            [job("before", 1), job("large", 1 << 20), job("after", 1)].into_iter().unzip();
        commit(&mut connection, jobs, &witnesses);
        for answer in &mut answers {
            let answer = answer.try_recv().unwrap();
            assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
        }
        for key in ["before", "large", "after"] {
            assert_eq!(read::get(&connection, key).unwrap(), None, "{key}");
        }
        assert_eq!(read::revision(&connection).unwrap(), Revision(0));

        limit(&connection, 1 << 20);
        let (retried, mut answer) = job("large", 1 << 20);
        commit(&mut connection, vec![retried], &witnesses);
        assert_eq!(answer.try_recv().unwrap().unwrap(), TxnOutcome::Committed(Revision(1)));
    }
}

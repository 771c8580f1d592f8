//! The task that writes. It owns the copies of the counts; nobody else in this process changes them.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use oc_mesh::{
    keys, record,
    store::{Revision, SharedStore, StoreError, Txn, TxnOutcome},
    view::View,
};
use oc_proto::mesh::{HostRecord, SandboxRecord};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Change, LedgerError, Next, Versioned,
    account::{self, Account, Entry},
    draft::{Draft, Limits, MAX_CHANGES, Settled},
};
use crate::{quota::Quota, random, telemetry};

/// How often a transaction is drafted anew after a conflict or a failure of the store.
const ATTEMPTS: u32 = 8;
/// Records in one transaction together, bytes: within etcd's limit for a request, and far from it.
const MAX_BYTES: usize = 512 << 10;
/// How long the store may take for one transaction.
const STORE_DEADLINE: Duration = Duration::from_secs(10);

type Answer = Result<Option<Versioned>, LedgerError>;

/// A change that somebody waits for.
#[derive(Debug)]
pub(super) struct Job {
    change: Change,
    /// What was last tried: if the store holds exactly that, it was done.
    tried: Option<Tried>,
    reply: oneshot::Sender<Answer>,
}

#[derive(Debug)]
struct Tried(Option<SandboxRecord>);

impl Job {
    pub(super) fn new(change: Change, reply: oneshot::Sender<Answer>) -> Self {
        Self { change, tried: None, reply }
    }

    fn answer(self, answer: Answer) {
        // Who gave up needs no answer; what was done is done.
        let _ = self.reply.send(answer);
    }

    fn answer_written(self, revision: Revision) {
        let next = self.tried.as_ref().and_then(|tried| tried.0.clone());
        self.answer(Ok(next.map(|record| Versioned { record, revision })));
    }

    fn bytes(&self) -> usize {
        match &self.change.to {
            Next::Placed { record, .. } | Next::Reserved(record) | Next::Record(record) => {
                record.encoded_len()
            }
            Next::Removed => 0,
        }
    }
}

pub(super) struct Writer {
    store: SharedStore,
    hosts: View<HostRecord>,
    quota: Quota,
    accounts: HashMap<Account, Entry>,
    written: watch::Sender<Revision>,
}

/// What became of an attempt.
enum Attempt {
    Done,
    /// Somebody else changed something: read and draft again.
    Conflict(Vec<Job>, Settled),
    /// The store failed; what was tried may or may not have happened.
    Failed(Vec<Job>, Settled, StoreError),
}

impl Writer {
    pub(super) fn new(
        store: SharedStore,
        hosts: View<HostRecord>,
        quota: Quota,
        accounts: HashMap<Account, Entry>,
        written: watch::Sender<Revision>,
    ) -> Self {
        Self { store, hosts, quota, accounts, written }
    }

    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        let mut waiting = VecDeque::new();
        loop {
            if waiting.is_empty() {
                let mut received = Vec::new();
                if queue.recv_many(&mut received, MAX_CHANGES).await == 0 {
                    return;
                }
                waiting.extend(received);
            }
            let batch = next_batch(&mut waiting);
            self.commit(batch).await;
        }
    }

    /// Makes all of these changes, and answers each.
    async fn commit(&mut self, mut jobs: Vec<Job>) {
        let mut failure = None;
        for attempt in 0..ATTEMPTS {
            match self.attempt(jobs, attempt > 0).await {
                Attempt::Done => return,
                Attempt::Conflict(again, settled) => {
                    telemetry::ledger_conflict();
                    failure = None;
                    random::pause(Duration::from_millis(1), attempt).await;
                    jobs = match self.reread(again, &settled).await {
                        Ok(jobs) => jobs,
                        Err((jobs, error)) => {
                            failure = Some(error);
                            jobs
                        }
                    };
                }
                Attempt::Failed(again, settled, error) => {
                    tracing::warn!(%error, attempt, "changes were not written, trying again");
                    random::pause(Duration::from_millis(20), attempt).await;
                    jobs = match self.reread(again, &settled).await {
                        Ok(jobs) => jobs,
                        Err((jobs, _)) => jobs,
                    };
                    failure = Some(error);
                }
            }
            if jobs.is_empty() {
                return;
            }
        }
        let reason = failure.map(|error| error.to_string());
        for job in jobs {
            job.answer(Err(match &reason {
                Some(reason) => StoreError::Unavailable(reason.clone()).into(),
                None => LedgerError::Busy,
            }));
        }
    }

    async fn attempt(&mut self, jobs: Vec<Job>, mut fresh: bool) -> Attempt {
        let hosts: Vec<Arc<HostRecord>> = self.hosts.all().into_iter().map(|(_, host)| host).collect();
        if let Err(error) = self.load_unknown(&jobs, &hosts).await {
            return Attempt::Failed(jobs, Settled::default(), error);
        }
        loop {
            let limits = Limits { hosts: &hosts, quota: self.quota };
            let mut draft = Draft::new(&self.accounts, limits);
            let results: Vec<_> = jobs.iter().map(|job| draft.add(&job.change, &mut random::below)).collect();
            // Another scheduler may have made room that our copies do not show.
            if !fresh && results.iter().any(Result::is_err) {
                drop(draft);
                fresh = true;
                match account::load_all(self.store.as_ref()).await {
                    Ok(accounts) => self.accounts = accounts,
                    Err(error) => return Attempt::Failed(jobs, Settled::default(), error),
                }
                continue;
            }
            let is_empty = draft.is_empty();
            let (txn, settled) = draft.finish();
            let mut accepted = Vec::with_capacity(jobs.len());
            for (mut job, result) in jobs.into_iter().zip(results) {
                match result {
                    Ok(next) => {
                        job.tried = Some(Tried(next));
                        accepted.push(job);
                    }
                    Err(error) => job.answer(Err(error)),
                }
            }
            return if is_empty { Attempt::Done } else { self.write(accepted, txn, settled).await };
        }
    }

    async fn write(&mut self, jobs: Vec<Job>, txn: Txn, settled: Settled) -> Attempt {
        match within_deadline(self.store.txn(txn)).await {
            Ok(TxnOutcome::Committed(revision)) => {
                settled.apply(&mut self.accounts, revision);
                self.written.send_replace(revision);
                jobs.into_iter().for_each(|job| job.answer_written(revision));
                Attempt::Done
            }
            Ok(TxnOutcome::Conflict) => Attempt::Conflict(jobs, settled),
            Err(error) if error.retryable() => Attempt::Failed(jobs, settled, error),
            Err(error) => {
                tracing::error!(%error, "the store refused a transaction");
                let reason = error.to_string();
                for job in jobs {
                    job.answer(Err(StoreError::Invalid(reason.clone()).into()));
                }
                Attempt::Done
            }
        }
    }

    /// Reads what the changes start from again. Answers those that have been made or cannot be any more, and returns
    /// the others.
    async fn reread(
        &mut self,
        jobs: Vec<Job>,
        settled: &Settled,
    ) -> Result<Vec<Job>, (Vec<Job>, StoreError)> {
        for account in settled.accounts() {
            match within_deadline(account.load(self.store.as_ref())).await {
                Ok(entry) => self.accounts.insert(account.clone(), entry),
                Err(error) => return Err((jobs, error)),
            };
        }
        let mut open = Vec::with_capacity(jobs.len());
        let mut jobs = jobs.into_iter();
        while let Some(job) = jobs.next() {
            let key = keys::sandbox(&job.change.sandbox_id);
            let stored = record::get::<SandboxRecord>(self.store.as_ref(), &key);
            let stored = match within_deadline(stored).await {
                Ok(stored) => stored,
                Err(error) => {
                    open.push(job);
                    open.extend(jobs);
                    return Err((open, error));
                }
            };
            let revision = stored.as_ref().map(|(_, revision)| *revision);
            if revision == job.change.from.as_ref().map(|from| from.revision) {
                open.push(job);
                continue;
            }
            let is_made = job
                .tried
                .as_ref()
                .is_some_and(|tried| tried.0.as_ref() == stored.as_ref().map(|(record, _)| record));
            if is_made {
                let revision = revision.unwrap_or_default();
                self.written.send_if_modified(|written| {
                    let newer = revision > *written;
                    *written = revision.max(*written);
                    newer
                });
                job.answer_written(revision);
            } else {
                job.answer(Err(LedgerError::Conflict));
            }
        }
        Ok(open)
    }

    /// Reads the counts that these changes touch and nobody has asked for yet.
    async fn load_unknown(&mut self, jobs: &[Job], hosts: &[Arc<HostRecord>]) -> Result<(), StoreError> {
        let mut touched: HashSet<Account> =
            hosts.iter().map(|host| Account::Host(host.host_id.clone())).collect();
        for job in jobs {
            let before = job.change.from.as_ref().map(|from| &from.record);
            touched.extend(before.into_iter().flat_map(Account::of).map(|(account, _)| account));
            match &job.change.to {
                Next::Placed { record, .. } => {
                    touched.insert(Account::Tenant(record.tenant.clone()));
                }
                Next::Reserved(record) | Next::Record(record) => {
                    touched.extend(Account::of(record).map(|(account, _)| account));
                }
                Next::Removed => {}
            }
        }
        for account in touched {
            if !self.accounts.contains_key(&account) {
                let entry = within_deadline(account.load(self.store.as_ref())).await?;
                self.accounts.insert(account, entry);
            }
        }
        Ok(())
    }
}

/// What goes into one transaction: a record is in it once, and all of them fit.
fn next_batch(waiting: &mut VecDeque<Job>) -> Vec<Job> {
    let (mut batch, mut sandboxes, mut bytes) = (Vec::new(), HashSet::new(), 0);
    let mut later = VecDeque::new();
    while let Some(job) = waiting.pop_front() {
        bytes += job.bytes();
        let fits = batch.is_empty() || (batch.len() < MAX_CHANGES && bytes <= MAX_BYTES);
        // The second change of one sandbox waits for the first.
        if fits && sandboxes.insert(job.change.sandbox_id.clone()) {
            batch.push(job);
        } else {
            later.push_back(job);
        }
    }
    *waiting = later;
    batch
}

async fn within_deadline<T>(call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    match tokio::time::timeout(STORE_DEADLINE, call).await {
        Ok(result) => result,
        Err(_) => Err(StoreError::Unavailable("no answer in time".into())),
    }
}

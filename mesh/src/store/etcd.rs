//! The store in etcd (v3 API; made with and tested against 3.4 and later), for a mesh of many machines.
//!
//! All keys are under [`NAMESPACE`], so that the mesh can share a cluster. The client finds another member by itself
//! when one goes; a watch that broke is the caller's to resume, from the last revision it saw
//! ([`View`](crate::view::View) does).

use std::time::Duration;

use etcd_client::{
    Client, Compare as EtcdCompare, CompareOp, ConnectOptions, DeleteOptions, Error, EventType, GetOptions,
    KeyValue as EtcdKeyValue, PutOptions, ResponseHeader, SortOrder, SortTarget, Txn as EtcdTxn, TxnOp,
    WatchOptions, WatchResponse,
};
use futures_util::StreamExt as _;
use tonic::Code;

use super::{
    Compare, Event, KeyValue, LeaseId, Op, Page, Revision, Store, StoreError, Txn, TxnOutcome, Watch,
    prefix_end,
};

/// Prefix of all our keys in etcd.
const NAMESPACE: &str = "opencomputer/";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read, bytes: etcd's own limit is for requests alone, and a watch that resumes gets up to
/// 1000 revisions at once.
const MAX_ANSWER: usize = 64 << 20;

/// A client of an etcd cluster.
#[derive(Clone)]
pub struct EtcdStore(Client);

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EtcdStore")
    }
}

impl EtcdStore {
    /// Connects to the members in `endpoints`: `host:port`, separated by commas.
    pub async fn connect(endpoints: &str) -> Result<Self, StoreError> {
        let endpoints: Vec<String> = endpoints.split(',').map(|member| format!("http://{member}")).collect();
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(Duration::from_secs(3), Duration::from_secs(2))
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let store = Self(Client::connect(&endpoints, Some(options)).await.map_err(unavailable)?);
        // The client connects lazily: a wrong address is to be seen here.
        store.get("").await?;
        Ok(store)
    }
}

#[tonic::async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let mut client = self.0.clone();
        let mut found = within(client.get(namespaced(key), None)).await?;
        found.take_kvs().into_iter().next().map(entry).transpose()
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        // The first key after `after` is `after` and a zero byte.
        let start = after.filter(|after| *after >= prefix).map(|after| format!("{after}\0"));
        let start = namespaced(start.as_deref().unwrap_or(prefix));
        let mut client = self.0.kv_client().max_decoding_message_size(MAX_ANSWER);
        // To etcd 0 is no limit.
        let mut asked = limit.max(1);
        let mut found = loop {
            let options = GetOptions::new()
                .with_range(range_end(prefix))
                .with_limit(i64::try_from(asked).unwrap_or(i64::MAX))
                .with_sort(SortTarget::Key, SortOrder::Ascend);
            match within(client.get(start.clone(), Some(options))).await {
                Err(Failure::TooLarge) if asked > 1 => asked /= 2,
                found => break found?,
            }
        };
        let revision = revision_of(found.header());
        let mut more = found.more();
        let mut items = found.take_kvs().into_iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        if items.len() > limit {
            items.truncate(limit);
            more = true;
        }
        Ok(Page { items, revision, more })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        super::check_txn(&txn)?;
        let compare: Vec<EtcdCompare> = txn.compare.into_iter().map(compare).collect();
        let then: Vec<TxnOp> = txn.then.into_iter().map(operation).collect();
        let mut client = self.0.clone();
        let done = within(client.txn(EtcdTxn::new().when(compare).and_then(then))).await?;
        if done.succeeded() {
            Ok(TxnOutcome::Committed(revision_of(done.header())))
        } else {
            Ok(TxnOutcome::Conflict)
        }
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        // etcd counts in seconds: never less than was asked for.
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000).max(1)).unwrap_or(i64::MAX);
        let mut client = self.0.clone();
        Ok(LeaseId(within(client.lease_grant(seconds, None)).await?.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut client = self.0.clone();
        within(client.lease_keep_alive(lease.0)).await?;
        Ok(())
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut client = self.0.clone();
        match within(client.lease_revoke(lease.0)).await {
            Ok(_) | Err(Failure::LeaseNotFound) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let start = i64::try_from(after.0.saturating_add(1)).unwrap_or(i64::MAX);
        let options = WatchOptions::new().with_range(range_end(prefix)).with_start_revision(start);
        let mut client = self.0.watch_client().max_decoding_message_size(MAX_ANSWER);
        let mut responses = within(client.watch(namespaced(prefix), Some(options))).await?;
        let mut seen = after;
        let watch = async_stream::try_stream! {
            while let Some(response) = responses.message().await.map_err(|error| broken(error, seen))? {
                for group in changes(&response)? {
                    seen = group.last().map_or(seen, Event::revision);
                    yield group;
                }
            }
            Err(StoreError::Unavailable("etcd ended the watch".into()))?;
        };
        Ok(watch.boxed())
    }
}

/// Why etcd did not do what it was asked.
enum Failure {
    LeaseNotFound,
    /// The answer is larger than we read.
    TooLarge,
    Invalid(String),
    Unavailable(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match &error {
            // The only thing that our requests name and etcd may not find is a lease. An answer to a keep-alive that
            // has no time left says the same.
            Error::LeaseKeepAliveError(_) => Self::LeaseNotFound,
            Error::GRpcStatus(status) => match status.code() {
                Code::NotFound => Self::LeaseNotFound,
                Code::OutOfRange => Self::TooLarge,
                Code::InvalidArgument => Self::Invalid(status.message().into()),
                _ => Self::Unavailable(error.to_string()),
            },
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::LeaseNotFound => Self::LeaseNotFound,
            Failure::TooLarge => Self::Unavailable("etcd's answer is too large".into()),
            Failure::Invalid(text) => Self::Invalid(text),
            Failure::Unavailable(text) => Self::Unavailable(text),
        }
    }
}

/// Bounds a request in time, and says what its failure means.
async fn within<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Failure::Unavailable(format!("etcd did not answer within {TIMEOUT:?}"))),
    }
}

fn unavailable(error: Error) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

/// Why a watch ended that had shown everything up to `seen`.
fn broken(error: Error, seen: Revision) -> StoreError {
    match error.into() {
        // Resuming would end in the same way: what has changed can only be listed.
        Failure::TooLarge => StoreError::Compacted { oldest: seen },
        failure => failure.into(),
    }
}

fn namespaced(key: &str) -> Vec<u8> {
    format!("{NAMESPACE}{key}").into_bytes()
}

/// The end of the range of all keys that begin with `prefix`.
fn range_end(prefix: &str) -> Vec<u8> {
    // Our namespace ends in a byte below 0xff: there is always a next one.
    prefix_end(&format!("{NAMESPACE}{prefix}")).unwrap_or_else(|| vec![0])
}

fn key_of(entry: &EtcdKeyValue) -> Result<String, StoreError> {
    let key = entry.key_str().map_err(|error| StoreError::Corrupt(format!("key: {error}")))?;
    Ok(key.strip_prefix(NAMESPACE).unwrap_or(key).to_owned())
}

fn revision(number: i64) -> Revision {
    Revision(u64::try_from(number).unwrap_or(0))
}

fn revision_of(header: Option<&ResponseHeader>) -> Revision {
    revision(header.map_or(0, ResponseHeader::revision))
}

fn entry(entry: EtcdKeyValue) -> Result<KeyValue, StoreError> {
    let key = key_of(&entry)?;
    let mod_revision = revision(entry.mod_revision());
    let (_, value) = entry.into_key_value();
    Ok(KeyValue { key, value: value.into(), mod_revision })
}

fn compare(compare: Compare) -> EtcdCompare {
    match compare {
        Compare::Absent(key) => EtcdCompare::create_revision(namespaced(&key), CompareOp::Equal, 0),
        Compare::Unchanged(key, revision) => {
            let number = i64::try_from(revision.0).unwrap_or(i64::MAX);
            EtcdCompare::mod_revision(namespaced(&key), CompareOp::Equal, number)
        }
    }
}

fn operation(op: Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(namespaced(&key), value, options)
        }
        Op::Delete { key } => TxnOp::delete(namespaced(&key), None::<DeleteOptions>),
    }
}

/// The changes in one answer, grouped by revision.
fn changes(response: &WatchResponse) -> Result<Vec<Vec<Event>>, StoreError> {
    if response.canceled() {
        return Err(match response.compact_revision() {
            0 => StoreError::Unavailable(format!("etcd cancelled the watch: {}", response.cancel_reason())),
            // etcd names the oldest revision that it still has.
            oldest => StoreError::Compacted { oldest: revision(oldest - 1) },
        });
    }
    let mut groups: Vec<Vec<Event>> = Vec::new();
    for event in response.events() {
        let Some(changed) = event.kv() else { continue };
        let event = match event.event_type() {
            EventType::Put => Event::Put(entry(changed.clone())?),
            EventType::Delete => {
                Event::Delete { key: key_of(changed)?, revision: revision(changed.mod_revision()) }
            }
        };
        match groups.last_mut() {
            Some(group) if group[0].revision() == event.revision() => group.push(event),
            _ => groups.push(vec![event]),
        }
    }
    Ok(groups)
}

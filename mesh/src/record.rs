//! Typed access to the store: values are protobuf messages.

use prost::Message;

use crate::store::{KeyValue, Op, Page, Revision, Store, StoreError};

/// Keys read at a time.
const PAGE: usize = 500;

/// Decodes a stored value.
pub fn decode<M: Message + Default>(entry: &KeyValue) -> Result<M, StoreError> {
    M::decode(entry.value.as_ref()).map_err(|error| StoreError::Corrupt(format!("{}: {error}", entry.key)))
}

/// The record under `key`, with the revision to compare with when it is written back.
pub async fn get<M: Message + Default>(
    store: &dyn Store,
    key: &str,
) -> Result<Option<(M, Revision)>, StoreError> {
    match store.get(key).await? {
        Some(entry) => Ok(Some((decode(&entry)?, entry.mod_revision))),
        None => Ok(None),
    }
}

/// All records under `prefix`, and a revision from which a watch misses nothing.
///
/// The pages are read one after the other: the revision is that of the first, so that a change in between is seen
/// again by the watch rather than missed.
pub async fn list<M: Message + Default>(
    store: &dyn Store,
    prefix: &str,
) -> Result<(Vec<(String, M, Revision)>, Revision), StoreError> {
    let mut records = Vec::new();
    let mut first: Option<Revision> = None;
    loop {
        let after = records.last().map(|(key, _, _): &(String, M, Revision)| key.clone());
        let Page { items, revision, more } = store.range(prefix, after.as_deref(), PAGE).await?;
        let first = *first.get_or_insert(revision);
        for entry in items {
            let record = decode(&entry)?;
            records.push((entry.key, record, entry.mod_revision));
        }
        if !more {
            return Ok((records, first));
        }
    }
}

/// The operation that writes `record`.
pub fn put<M: Message>(key: impl Into<String>, record: &M) -> Op {
    Op::Put { key: key.into(), value: record.encode_to_vec().into(), lease: None }
}

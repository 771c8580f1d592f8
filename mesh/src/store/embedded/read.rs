//! Reading the file.

use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior, params};

use super::schema::{from_sql, to_sql};
use crate::store::{Event, KeyValue, Page, Revision, StoreError, prefix_end};

/// Revisions read at a time.
const CHANGES: u64 = 1000;
/// Values read at a time, bytes: where this is passed, the rest waits for the next call.
const BYTES: usize = 4 << 20;

/// The newest revision.
pub(super) fn revision(connection: &Connection) -> Result<Revision, StoreError> {
    meta(connection, "revision")
}

/// The newest revision whose changes are no longer kept.
pub(super) fn compacted(connection: &Connection) -> Result<Revision, StoreError> {
    meta(connection, "compacted")
}

fn meta(connection: &Connection, name: &str) -> Result<Revision, StoreError> {
    let mut statement = connection.prepare_cached("SELECT value FROM meta WHERE name = ?1")?;
    Ok(from_sql(statement.query_row([name], |row| row.get(0))?))
}

fn entry(row: &Row<'_>) -> rusqlite::Result<KeyValue> {
    Ok(KeyValue {
        key: row.get(0)?,
        value: row.get::<_, Vec<u8>>(1)?.into(),
        mod_revision: from_sql(row.get(2)?),
    })
}

/// One key.
pub(super) fn get(connection: &Connection, key: &str) -> Result<Option<KeyValue>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT key, value, mod_revision FROM entries WHERE key = ?1")?;
    Ok(statement.query_row([key], entry).optional()?)
}

/// A range of keys, with the revision of the same snapshot.
pub(super) fn range(
    connection: &mut Connection,
    prefix: &str,
    after: Option<&str>,
    limit: usize,
) -> Result<Page, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
    let revision = revision(&transaction)?;
    // `after` is below the prefix where it is absent: no key is the empty string. The end of a prefix need not be valid
    // UTF-8, so that it comes as bytes; SQLite compares texts as bytes, too.
    let mut statement = transaction.prepare_cached(
        "SELECT key, value, mod_revision FROM entries
         WHERE key >= ?1 AND key > ?2 AND (?3 IS NULL OR key < CAST(?3 AS TEXT)) ORDER BY key",
    )?;
    let mut rows = statement.query(params![prefix, after.unwrap_or(""), prefix_end(prefix)])?;
    let (mut items, mut bytes) = (Vec::new(), 0);
    let more = loop {
        match rows.next()? {
            None => break false,
            Some(_) if items.len() >= limit || bytes >= BYTES => break true,
            Some(row) => {
                let item = entry(row)?;
                bytes += item.key.len() + item.value.len();
                items.push(item);
            }
        }
    };
    Ok(Page { items, revision, more })
}

/// The next changes after `after`, grouped by revision, and the revision up to which they reach. Fails with
/// [`StoreError::Compacted`] if some of them are no longer kept.
pub(super) fn changes(
    connection: &mut Connection,
    prefix: &str,
    after: Revision,
) -> Result<(Vec<Vec<Event>>, Revision), StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
    let oldest = compacted(&transaction)?;
    if after < oldest {
        return Err(StoreError::Compacted { oldest });
    }
    let newest = revision(&transaction)?;
    let mut statement = transaction.prepare_cached(
        "SELECT key, value, revision FROM changes
         WHERE revision > ?1 AND revision <= ?2 AND key >= ?3 AND (?4 IS NULL OR key < CAST(?4 AS TEXT))
         ORDER BY revision, step",
    )?;
    let until = Revision(newest.0.min(after.0.saturating_add(CHANGES)));
    let mut rows = statement.query(params![to_sql(after), to_sql(until), prefix, prefix_end(prefix)])?;
    let (mut groups, mut bytes): (Vec<Vec<Event>>, usize) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let event = event(row)?;
        let size = if let Event::Put(entry) = &event { entry.value.len() } else { 0 };
        match groups.last_mut() {
            Some(group) if group[0].revision() == event.revision() => group.push(event),
            // Whole revisions only: a batch ends where one does.
            Some(group) if bytes >= BYTES => {
                let until = group[0].revision();
                return Ok((groups, until));
            }
            _ => groups.push(vec![event]),
        }
        bytes += size;
    }
    Ok((groups, until))
}

fn event(row: &Row<'_>) -> rusqlite::Result<Event> {
    let (key, value): (String, Option<Vec<u8>>) = (row.get(0)?, row.get(1)?);
    let revision = from_sql(row.get(2)?);
    Ok(match value {
        Some(value) => Event::Put(KeyValue { key, value: value.into(), mod_revision: revision }),
        None => Event::Delete { key, revision },
    })
}

//! What transactions, leases and the passing of time do to the tables. All of it runs inside a SQLite transaction of the
//! [writer](super::write)'s.

use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior, params};

use super::{
    read,
    schema::{self, KEPT_REVISIONS, from_sql, to_sql},
};
use crate::store::{Compare, LeaseId, Op, Revision, StoreError, Txn, TxnOutcome};

/// Compaction waits for this many revisions beyond those kept, so that it is rare.
const COMPACT_SLACK: u64 = 1000;

/// Runs a transaction on a store of that revision: at the next one, if it changes anything.
pub(super) fn apply(
    connection: &Connection,
    txn: &Txn,
    revision: Revision,
) -> Result<TxnOutcome, StoreError> {
    for compare in &txn.compare {
        let (key, expected) = match compare {
            Compare::Absent(key) => (key, None),
            Compare::Unchanged(key, revision) => (key, Some(*revision)),
        };
        let mut statement = connection.prepare_cached("SELECT mod_revision FROM entries WHERE key = ?1")?;
        let found = statement.query_row([key], |row| row.get(0)).optional()?.map(from_sql);
        if found != expected {
            return Ok(TxnOutcome::Conflict);
        }
    }
    let next = Revision(revision.0 + 1);
    let mut has_changed = false;
    for (step, op) in txn.then.iter().enumerate() {
        match op {
            Op::Put { key, value, lease } => {
                if let Some(lease) = lease
                    && !lease_lives(connection, *lease)?
                {
                    return Err(StoreError::LeaseNotFound);
                }
                let mut statement =
                    connection.prepare_cached("INSERT OR REPLACE INTO entries VALUES (?1, ?2, ?3, ?4)")?;
                statement.execute(params![key, value.as_ref(), to_sql(next), lease.map(|lease| lease.0)])?;
                change(connection, next, step, key, Some(value))?;
                has_changed = true;
            }
            Op::Delete { key } => has_changed |= remove(connection, next, step, key)?,
        }
    }
    Ok(TxnOutcome::Committed(if has_changed { next } else { revision }))
}

/// Removes a key: whether there was one.
fn remove(connection: &Connection, revision: Revision, step: usize, key: &str) -> Result<bool, StoreError> {
    let existed = connection.prepare_cached("DELETE FROM entries WHERE key = ?1")?.execute([key])? > 0;
    if existed {
        change(connection, revision, step, key, None)?;
    }
    Ok(existed)
}

fn change(
    connection: &Connection,
    revision: Revision,
    step: usize,
    key: &str,
    value: Option<&[u8]>,
) -> Result<(), StoreError> {
    let step = i64::try_from(step).unwrap_or(i64::MAX);
    let mut statement = connection.prepare_cached("INSERT INTO changes VALUES (?1, ?2, ?3, ?4)")?;
    statement.execute(params![to_sql(revision), step, key, value])?;
    Ok(())
}

fn lease_lives(connection: &Connection, lease: LeaseId) -> Result<bool, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT 1 FROM leases WHERE id = ?1 AND lapses_at_ms > ?2")?;
    Ok(statement.exists(params![lease.0, schema::now_ms()?])?)
}

pub(super) fn grant(connection: &Connection, ttl_ms: i64) -> Result<LeaseId, StoreError> {
    let lapses = schema::now_ms()?.saturating_add(ttl_ms);
    let mut statement = connection
        .prepare_cached("INSERT INTO leases (ttl_ms, lapses_at_ms) VALUES (?1, ?2) RETURNING id")?;
    Ok(LeaseId(statement.query_row(params![ttl_ms, lapses], |row| row.get(0))?))
}

pub(super) fn keep_alive(connection: &Connection, lease: LeaseId) -> Result<(), StoreError> {
    let now = schema::now_ms()?;
    let mut statement = connection
        .prepare_cached("UPDATE leases SET lapses_at_ms = ?2 + ttl_ms WHERE id = ?1 AND lapses_at_ms > ?2")?;
    match statement.execute(params![lease.0, now])? {
        0 => Err(StoreError::LeaseNotFound),
        _ => Ok(()),
    }
}

/// Ends a lease and removes the keys under it, at one revision: the newest one then.
pub(super) fn end_lease(
    connection: &Connection,
    lease: LeaseId,
    revision: Revision,
) -> Result<Revision, StoreError> {
    connection.prepare_cached("DELETE FROM leases WHERE id = ?1")?.execute([lease.0])?;
    let keys = {
        let mut statement =
            connection.prepare_cached("SELECT key FROM entries WHERE lease = ?1 ORDER BY key")?;
        let rows = statement.query_map([lease.0], |row| row.get::<_, String>(0))?;
        rows.collect::<Result<Vec<_>, _>>()?
    };
    if keys.is_empty() {
        return Ok(revision);
    }
    let next = Revision(revision.0 + 1);
    for (step, key) in keys.iter().enumerate() {
        remove(connection, next, step, key)?;
    }
    Ok(next)
}

/// Ends the leases that lapsed, and forgets changes older than those kept: the newest revision, if any of that was to
/// be done.
pub(super) fn sweep(connection: &mut Connection) -> Result<Option<Revision>, StoreError> {
    // Looked at before the write lock is taken: nearly always there is nothing to do.
    let now = schema::now_ms()?;
    if lapsed(connection, now)?.is_empty() && !is_long(connection)? {
        return Ok(None);
    }

    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Again, under the lock: another process may have done it meanwhile.
    let leases = lapsed(&transaction, now)?;
    let compacts = is_long(&transaction)?;
    if leases.is_empty() && !compacts {
        return Ok(None);
    }
    let mut revision = read::revision(&transaction)?;
    for lease in leases {
        revision = end_lease(&transaction, lease, revision)?;
    }
    if compacts {
        let oldest = to_sql(Revision(revision.0.saturating_sub(KEPT_REVISIONS)));
        transaction.execute("DELETE FROM changes WHERE revision <= ?1", [oldest])?;
        transaction.execute("UPDATE meta SET value = ?1 WHERE name = 'compacted'", [oldest])?;
    }
    set_revision(&transaction, revision)?;
    transaction.commit()?;
    Ok(Some(revision))
}

fn lapsed(connection: &Connection, now_ms: i64) -> Result<Vec<LeaseId>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT id FROM leases WHERE lapses_at_ms <= ?1")?;
    let rows = statement.query_map([now_ms], |row| row.get(0).map(LeaseId))?;
    Ok(rows.collect::<Result<Vec<_>, _>>()?)
}

/// Whether more history is kept than need be.
fn is_long(connection: &Connection) -> Result<bool, StoreError> {
    let kept = read::revision(connection)?.0.saturating_sub(read::compacted(connection)?.0);
    Ok(kept > KEPT_REVISIONS + COMPACT_SLACK)
}

pub(super) fn set_revision(transaction: &Transaction<'_>, revision: Revision) -> Result<(), StoreError> {
    let mut statement = transaction.prepare_cached("UPDATE meta SET value = ?1 WHERE name = 'revision'")?;
    statement.execute([to_sql(revision)])?;
    Ok(())
}

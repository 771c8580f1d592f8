//! The file's tables, and how connections to it are opened.

use std::{
    fs::{OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollTimeout, poll},
    time::{ClockId, clock_gettime},
};
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior, params};

use crate::store::{Revision, StoreError};

/// Revisions whose changes are kept for watches that resume.
pub(super) const KEPT_REVISIONS: u64 = 10_000;
/// Version of these tables, in SQLite's `user_version`.
const SCHEMA_VERSION: i64 = 1;
/// How long a statement waits for another process's commit.
const BUSY: Duration = Duration::from_secs(5);
/// How long the WAL file's readers are waited for: as long as that nobody writes.
const RESTART: Duration = Duration::from_millis(100);
/// What is kept of the WAL file after a burst, bytes. Longer ones are [begun again](restart_wal).
pub(super) const WAL_BYTES: u32 = 16 << 20;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS entries (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, mod_revision INTEGER NOT NULL, lease INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS entries_by_lease ON entries (lease) WHERE lease IS NOT NULL;
    -- value is NULL where the key was removed
    CREATE TABLE IF NOT EXISTS changes (
        revision INTEGER NOT NULL, step INTEGER NOT NULL, key TEXT NOT NULL, value BLOB, PRIMARY KEY (revision, step)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS leases (
        id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_ms INTEGER NOT NULL, lapses_at_ms INTEGER NOT NULL
    );
    INSERT OR IGNORE INTO meta VALUES ('revision', 0), ('compacted', 0), ('boot_id', '');
";

/// Opens the file for writing, makes its tables, and lapses the leases of an earlier boot.
pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    keep_private(path)?;
    let mut connection = Connection::open(path)?;
    wait_for_others(&mut connection, BUSY)?;
    if enter_wal(&connection)? != "wal" {
        return Err(StoreError::Invalid(format!("{}: its file system has no shared memory", path.display())));
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", WAL_BYTES)?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|error| StoreError::Unavailable(format!("boot ID: {error}")))?;

    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version > SCHEMA_VERSION {
        return Err(StoreError::Invalid(format!("{}: written by a newer version", path.display())));
    }
    transaction.execute_batch(TABLES)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    let of_boot: String =
        transaction.query_row("SELECT value FROM meta WHERE name = 'boot_id'", [], |row| row.get(0))?;
    if of_boot != boot_id {
        transaction.execute("UPDATE leases SET lapses_at_ms = 0", [])?;
        transaction.execute("UPDATE meta SET value = ?1 WHERE name = 'boot_id'", params![boot_id])?;
    }
    transaction.commit()?;
    Ok(connection)
}

/// Makes the file, or what of it is there, readable by its owner alone: it holds the key that signs tokens. SQLite
/// gives the files beside it the same permissions.
fn keep_private(path: &Path) -> Result<(), StoreError> {
    let refused = |error: io::Error| StoreError::Unavailable(format!("{}: {error}", path.display()));
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(refused(error)),
    }
    // By path, never by descriptor: closing any descriptor of the file takes the locks that other connections of this
    // process hold on it (fcntl(2), and SQLite's "How To Corrupt An SQLite Database File").
    for file in [path, &beside(path, "-wal"), &beside(path, "-shm")] {
        let metadata = match std::fs::metadata(file) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(refused(error)),
        };
        if !metadata.is_file() {
            return Err(StoreError::Invalid(format!("{} is not a file", file.display())));
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            std::fs::set_permissions(file, Permissions::from_mode(0o600)).map_err(refused)?;
        }
    }
    Ok(())
}

/// A file beside the store's.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Has the connection wait that long for locks that others hold; SQLite's own handler would soon wait for 100 ms at a
/// time.
fn wait_for_others(connection: &mut Connection, limit: Duration) -> Result<(), StoreError> {
    connection.busy_handler(Some(move |attempts: i32| {
        let waits = u128::try_from(attempts).is_ok_and(|attempts| attempts < limit.as_millis());
        waits && poll(&mut [], PollTimeout::from(1u8)).is_ok()
    }))?;
    Ok(())
}

/// Switches the file to WAL, and returns the mode that it has then.
///
/// Of several processes that open a new file one switches; to the others SQLite says that it is busy without asking the
/// [handler](wait_for_others), because each holds a lock that another may wait for (sqlite3_busy_handler()).
fn enter_wal(connection: &Connection) -> Result<String, rusqlite::Error> {
    let begun = Instant::now();
    loop {
        let entered = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0));
        match &entered {
            Err(error) if is_busy(error) && begun.elapsed() < BUSY => {
                let _ = poll(&mut [], PollTimeout::from(1u8));
            }
            _ => return entered,
        }
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// Has the WAL file begin again from its start, once nobody reads what is in it; whether that was so within a while.
///
/// SQLite does so by itself where there is a moment without readers. Where they overlap there is none: then they are
/// waited for, while new ones find all of it in the main file.
pub(super) fn restart_wal(connection: &mut Connection) -> Result<bool, StoreError> {
    wait_for_others(connection, RESTART)?;
    let is_busy = connection.query_row("PRAGMA wal_checkpoint(RESTART)", [], |row| row.get::<_, bool>(0));
    wait_for_others(connection, BUSY)?;
    Ok(!is_busy?)
}

/// Opens the file for reading.
pub(super) fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    Ok(connection)
}

/// Milliseconds on the clock that leases run on.
pub(super) fn now_ms() -> Result<i64, StoreError> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_err(|error| StoreError::Unavailable(format!("CLOCK_BOOTTIME: {error}")))?;
    Ok(now.tv_sec().saturating_mul(1000).saturating_add(now.tv_nsec() / 1_000_000))
}

/// SQLite has signed integers only; revisions stay far below their end.
pub(super) fn to_sql(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

/// The inverse of [`to_sql`].
pub(super) fn from_sql(revision: i64) -> Revision {
    Revision(u64::try_from(revision).unwrap_or(0))
}

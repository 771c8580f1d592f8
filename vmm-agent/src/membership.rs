//! This host as a member: its record in the store, under a lease, kept true.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use oc_mesh::{
    keys,
    membership::Registration,
    store::{SharedStore, StoreError},
};
use oc_proto::mesh::HostRecord;
use prost::Message as _;
use tokio::{
    sync::watch,
    time::{interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::capacity;

/// The host is gone when its lease has not been renewed for so long.
const LEASE: Duration = Duration::from_secs(10);
/// The record is written at most this often.
const AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// The disk is looked at this often.
const DISK_EVERY: Duration = Duration::from_secs(5);
/// Changes of free disk space below this are not worth a write, MiB.
const DISK_STEP_MB: i64 = 256;

/// What of a host changes by itself.
#[derive(Clone, Debug)]
pub struct Changing {
    /// Clones that wait in the pool.
    pub pool_ready: watch::Receiver<usize>,
    /// What its object store is called, once that has said so.
    pub object_store_id: watch::Receiver<Option<Arc<str>>>,
}

/// Registers the host as `record` says, keeps what is `changing` and `disk_free_mb` in it true until `cancel`, and
/// leaves.
///
/// # Errors
///
/// If the first registration fails; later failures are retried.
pub async fn keep(
    store: SharedStore,
    mut record: HostRecord,
    data_dir: PathBuf,
    mut changing: Changing,
    cancel: CancellationToken,
) -> Result<impl Future<Output = ()>, StoreError> {
    refresh(&mut record, &data_dir, &changing);
    let registration =
        Registration::start(store, keys::host(&record.host_id), encode(&record), LEASE).await?;
    Ok(async move {
        let mut disk = interval(DISK_EVERY);
        while !cancel.is_cancelled() {
            tokio::select! {
                Ok(()) = changing.pool_ready.changed() => {}
                Ok(()) = changing.object_store_id.changed() => {}
                _ = disk.tick() => {}
                () = cancel.cancelled() => break,
            }
            let before = record.clone();
            refresh(&mut record, &data_dir, &changing);
            if record != before
                && let Err(error) = registration.update(encode(&record)).await
            {
                // The next look tries again, because the record in the store is not this one.
                record = before;
                warn!(%error, "cannot update the host's record");
            }
            tokio::select! {
                () = sleep(AT_MOST_EVERY) => {}
                () = cancel.cancelled() => break,
            }
        }
        registration.leave().await;
    })
}

fn refresh(record: &mut HostRecord, data_dir: &std::path::Path, changing: &Changing) {
    record.pool_ready = i32::try_from(*changing.pool_ready.borrow()).unwrap_or(i32::MAX);
    record.object_store_id = changing.object_store_id.borrow().as_deref().unwrap_or_default().to_owned();
    if let Ok(room) = capacity::measure(data_dir) {
        record.disk_free_mb = i64::try_from(room.disk_mb).unwrap_or(i64::MAX) / DISK_STEP_MB * DISK_STEP_MB;
    }
}

fn encode(record: &HostRecord) -> Bytes {
    record.encode_to_vec().into()
}

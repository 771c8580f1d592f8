//! The first key: without one nobody could create another.

use oc_mesh::{
    api_key::key_id,
    keys, record,
    store::{Compare, Store, StoreError, Txn, TxnOutcome},
};
use oc_proto::mesh::KeyRecord;
use std::time::SystemTime;

/// Makes sure that there is an administrator's key with this hash. One that is there stays as it is, and one that was
/// revoked stays revoked.
///
/// # Errors
///
/// The store cannot be written.
pub async fn ensure_key(
    store: &dyn Store,
    hash: &str,
    tenant: &str,
    now: SystemTime,
) -> Result<(), StoreError> {
    let name = keys::api_key(hash);
    let key = KeyRecord {
        tenant: tenant.into(),
        admin: true,
        description: "the first administrator's".into(),
        created_at: Some(now.into()),
        revoked: false,
    };
    let put = record::put(name.clone(), &key);
    let txn = Txn { compare: vec![Compare::Absent(name.clone())], then: vec![put] };
    if let TxnOutcome::Committed(_) = store.txn(txn).await? {
        tracing::info!(key_id = key_id(hash), tenant, "first API key stored");
        return Ok(());
    }
    let found = record::get::<KeyRecord>(store, &name).await?;
    if found.is_some_and(|(key, _)| key.revoked) {
        tracing::warn!(key_id = key_id(hash), "the first API key was revoked and stays so");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::keys::tests::Keys;

    #[tokio::test]
    async fn a_revoked_key_does_not_come_back() {
        let keys = Keys::new().await;
        let hash = "ab".repeat(32);
        let ensure = || ensure_key(keys.store.as_ref(), &hash, "acme", SystemTime::UNIX_EPOCH);
        ensure().await.unwrap();
        assert_eq!(keys.ids().await, [key_id(&hash)]);
        keys.delete(key_id(&hash)).await.unwrap();
        ensure().await.unwrap();
        assert!(keys.ids().await.is_empty());
    }
}

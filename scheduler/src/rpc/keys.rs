//! `oc.v1.KeyService`. Keys are stored by their SHA-256 alone; the answer to their creation is the only place where they
//! stand in clear. A deleted key's record stays, marked: see [`bootstrap`](crate::bootstrap).

use oc_mesh::{
    api_key::{ApiKey, key_id},
    clock::SharedClock,
    keys, record,
    store::{Compare, SharedStore, Txn, TxnOutcome},
};
use oc_proto::{
    mesh::KeyRecord,
    v1::{
        CreateKeyRequest, CreateKeyResponse, DeleteKeyRequest, DeleteKeyResponse, Key, ListKeysRequest,
        ListKeysResponse, key_service_server::KeyService,
    },
};
use tonic::{Request, Response, Status};

use super::admin_caller;
use crate::{refusal::Refusal, validate};

/// Hex digits of a key's ID.
const KEY_ID: usize = 16;

/// The service.
#[derive(Clone, Debug)]
pub struct KeyRpc {
    store: SharedStore,
    clock: SharedClock,
}

impl KeyRpc {
    /// Manages the keys in `store`.
    pub fn new(store: SharedStore, clock: SharedClock) -> Self {
        Self { store, clock }
    }

    async fn create(&self, record: &KeyRecord) -> Result<ApiKey, Refusal> {
        let key = ApiKey::generate().map_err(|error| Refusal::Internal(error.to_string()))?;
        let name = keys::api_key(&key.hash());
        let txn = Txn { compare: vec![Compare::Absent(name.clone())], then: vec![record::put(name, record)] };
        match self.store.txn(txn).await? {
            TxnOutcome::Committed(_) => Ok(key),
            TxnOutcome::Conflict => Err(Refusal::Internal("the new key exists already".into())),
        }
    }

    async fn delete(&self, id: &str) -> Result<(), Refusal> {
        let is_id = id.len() == KEY_ID && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !is_id {
            return Err(Refusal::KeyNotFound);
        }
        let found = self.store.range(&keys::api_key(id), None, 2).await?;
        let [entry] = found.items.as_slice() else { return Err(Refusal::KeyNotFound) };
        let key: KeyRecord = record::decode(entry)?;
        if key.revoked {
            return Err(Refusal::KeyNotFound);
        }
        let revoked = KeyRecord { revoked: true, ..key };
        let txn = Txn {
            compare: vec![Compare::Unchanged(entry.key.clone(), entry.mod_revision)],
            then: vec![record::put(entry.key.clone(), &revoked)],
        };
        match self.store.txn(txn).await? {
            TxnOutcome::Committed(_) => Ok(()),
            // Nothing else ever happens to a key: somebody else was quicker.
            TxnOutcome::Conflict => Err(Refusal::KeyNotFound),
        }
    }
}

#[tonic::async_trait]
impl KeyService for KeyRpc {
    async fn create_key(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        let caller = admin_caller(&request)?;
        let CreateKeyRequest { tenant, admin, description } = request.into_inner();
        let tenant = if tenant.is_empty() { caller.tenant } else { tenant };
        validate::tenant(&tenant).map_err(Refusal::from)?;
        validate::description(&description).map_err(Refusal::from)?;
        let created_at = Some(self.clock.now().into());
        let record = KeyRecord { tenant, admin, description, created_at, revoked: false };
        let key = self.create(&record).await?;
        tracing::info!(key_id = key.key_id(), tenant = record.tenant, admin, "API key created");
        let shown = show(&key.hash(), record);
        Ok(Response::new(CreateKeyResponse { api_key: key.expose().into(), key: Some(shown) }))
    }

    async fn list_keys(
        &self,
        request: Request<ListKeysRequest>,
    ) -> Result<Response<ListKeysResponse>, Status> {
        admin_caller(&request)?;
        let (records, _) =
            record::list::<KeyRecord>(self.store.as_ref(), keys::API_KEYS).await.map_err(Refusal::from)?;
        let mut shown: Vec<_> = records
            .into_iter()
            .filter(|(_, record, _)| !record.revoked)
            .map(|(name, record, _)| show(name.strip_prefix(keys::API_KEYS).unwrap_or(&name), record))
            .collect();
        shown.sort_by_key(|key| {
            let created = key.created_at.unwrap_or_default();
            (created.seconds, created.nanos, key.key_id.clone())
        });
        Ok(Response::new(ListKeysResponse { keys: shown }))
    }

    async fn delete_key(
        &self,
        request: Request<DeleteKeyRequest>,
    ) -> Result<Response<DeleteKeyResponse>, Status> {
        admin_caller(&request)?;
        let id = &request.get_ref().key_id;
        self.delete(id).await?;
        tracing::info!(key_id = id, "API key revoked");
        Ok(Response::new(DeleteKeyResponse {}))
    }
}

fn show(hash: &str, record: KeyRecord) -> Key {
    Key {
        key_id: key_id(hash).into(),
        tenant: record.tenant,
        admin: record.admin,
        description: record.description,
        created_at: record.created_at,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use oc_mesh::{caller::Caller, clock::SystemClock, error::reason_of, store};

    use super::*;

    /// Keys in a store of their own, as an administrator manages them.
    pub(crate) struct Keys {
        pub(crate) store: SharedStore,
        rpc: KeyRpc,
        _directory: tempfile::TempDir,
    }

    impl Keys {
        pub(crate) async fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let url = format!("file://{}", directory.path().join("store.db").display());
            let store = store::open(&url).await.unwrap();
            let rpc = KeyRpc::new(store.clone(), Arc::new(SystemClock));
            Self { store, rpc, _directory: directory }
        }

        /// The IDs of those that are listed.
        pub(crate) async fn ids(&self) -> Vec<String> {
            let listed = self.rpc.list_keys(admin(ListKeysRequest {})).await.unwrap().into_inner();
            listed.keys.into_iter().map(|key| key.key_id).collect()
        }

        pub(crate) async fn delete(&self, key_id: &str) -> Result<(), Status> {
            self.rpc.delete_key(admin(DeleteKeyRequest { key_id: key_id.into() })).await.map(|_| ())
        }
    }

    fn admin<T>(message: T) -> Request<T> {
        let mut request = Request::new(message);
        let caller = Caller {
            tenant: "acme".into(),
            admin: true,
            sandbox: None,
            public_url: "http://localhost".into(),
            preview_domain: "preview.localhost".into(),
            request_id: "r".into(),
        };
        caller.apply(request.metadata_mut().as_mut());
        request
    }

    #[tokio::test]
    async fn a_deleted_key_is_gone_for_whoever_looks_and_its_record_is_marked() {
        let keys = Keys::new().await;
        let request = CreateKeyRequest { tenant: "acme".into(), ..Default::default() };
        let created = keys.rpc.create_key(admin(request)).await.unwrap().into_inner().key.unwrap();
        assert_eq!(keys.ids().await, std::slice::from_ref(&created.key_id));
        keys.delete(&created.key_id).await.unwrap();
        assert!(keys.ids().await.is_empty());
        for unknown in [created.key_id.as_str(), "0123456789abcdef", "x"] {
            let refused = keys.delete(unknown).await.unwrap_err();
            assert_eq!(reason_of(&refused).as_deref(), Some("KEY_NOT_FOUND"), "{unknown}");
        }
        let (stored, _) = record::list::<KeyRecord>(keys.store.as_ref(), keys::API_KEYS).await.unwrap();
        assert!(matches!(stored.as_slice(), [(_, record, _)] if record.revoked));
    }
}

//! Which host a sandbox's calls go to, and whether its caller may send them.
//!
//! Records are read from live copies. A copy may lag behind what another part has just been told, so when it
//! knows no such sandbox or host, or none that is ready yet, the store itself has the last word.

use std::sync::Arc;

use oc_mesh::{
    error::{Reason, status},
    keys, record,
    store::{SharedStore, StoreError},
    view::View,
};
use oc_proto::{
    mesh::{HostRecord, PreviewDomain, SandboxRecord, SandboxTransition},
    v1::SandboxState,
};
use tokio::sync::Semaphore;
use tonic::Status;

/// Where a sandbox is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// On the host that listens here.
    Host(String),
    /// Hibernated, or about to be: it has to be woken first.
    Hibernated,
}

/// What previews have to know of a sandbox.
#[derive(Clone, Debug)]
pub struct Shown(Arc<SandboxRecord>);

impl Shown {
    /// Whom it belongs to.
    #[must_use]
    pub fn tenant(&self) -> &str {
        &self.0.tenant
    }

    /// Its ID.
    #[must_use]
    pub fn sandbox_id(&self) -> &str {
        &self.0.sandbox_id
    }

    /// Hash of the token that its ports ask for; empty if they ask for none.
    #[must_use]
    pub fn token_hash(&self) -> &str {
        &self.0.preview_token_hash
    }

    /// The port that has this host name of its own.
    #[must_use]
    pub fn port_of(&self, domain: &str) -> Option<u16> {
        let entry = self.0.previews.iter().find(|entry| entry.domain == domain)?;
        u16::try_from(entry.port).ok()
    }
}

/// What the gateway knows of sandboxes and hosts.
#[derive(Debug)]
pub struct Sandboxes {
    store: SharedStore,
    records: View<SandboxRecord>,
    hosts: View<HostRecord>,
    lookups: Semaphore,
}

/// IDs that nobody has proved to be theirs, and that our copies do not know, are looked up in the store so many at a time:
/// anybody may make them up.
const LOOKUPS: usize = 16;

impl Sandboxes {
    /// Sandboxes and hosts as `store` has them, by live copies of its records.
    #[must_use]
    pub fn new(store: SharedStore, records: View<SandboxRecord>, hosts: View<HostRecord>) -> Self {
        Self { store, records, hosts, lookups: Semaphore::new(LOOKUPS) }
    }

    /// Where a tenant's sandbox is.
    ///
    /// # Errors
    /// `SANDBOX_NOT_FOUND`, also for another tenant's; `SANDBOX_DELETED`, `SANDBOX_FAILED`, `SANDBOX_NOT_READY`;
    /// `HOST_UNAVAILABLE`.
    pub async fn find(&self, tenant: &str, sandbox_id: &str) -> Result<Whereabouts, Status> {
        let copied = self.records.get(sandbox_id).filter(|record| is_settled(record));
        let record = match copied {
            Some(record) => record,
            None => self.stored(sandbox_id).await?.ok_or_else(not_found)?.into(),
        };
        match usable(&record, tenant)? {
            Some(host_id) => Ok(Whereabouts::Host(self.endpoint(host_id).await?)),
            None => Ok(Whereabouts::Hibernated),
        }
    }

    /// Where the host of a sandbox listens that has just been woken, whatever our copy of its record says yet.
    ///
    /// # Errors
    /// `HOST_UNAVAILABLE`; `SANDBOX_NOT_FOUND` if it is gone again.
    pub async fn host_of_woken(&self, sandbox_id: &str) -> Result<String, Status> {
        let record = self.stored(sandbox_id).await?.ok_or_else(not_found)?;
        self.endpoint(&record.host_id).await
    }

    /// What previews have to know of a sandbox, whatever state it is in.
    ///
    /// # Errors
    /// `SANDBOX_NOT_FOUND`; `HOST_UNAVAILABLE`, `OVERLOADED`.
    pub async fn shown(&self, sandbox_id: &str) -> Result<Shown, Status> {
        let record = match self.records.get(sandbox_id) {
            Some(record) => record,
            None => {
                let busy =
                    |_| status(Reason::Overloaded, "too many unknown sandboxes are looked for, try again");
                let _turn = self.lookups.try_acquire().map_err(busy)?;
                self.stored(sandbox_id).await?.ok_or_else(not_found)?.into()
            }
        };
        Ok(Shown(record))
    }

    /// Whether a sandbox can be used at all, asleep or awake.
    ///
    /// # Errors
    /// As [`Sandboxes::find`] has them.
    pub async fn check(&self, Shown(record): &Shown) -> Result<(), Status> {
        if is_settled(record) && self.hosts.get(&record.host_id).is_some() {
            return usable(record, &record.tenant).map(drop);
        }
        self.find(&record.tenant, &record.sandbox_id).await.map(drop)
    }

    /// Whom a sandbox belongs to, if our copies know it.
    #[must_use]
    pub fn copied_tenant(&self, sandbox_id: &str) -> Option<String> {
        self.records.get(sandbox_id).map(|record| record.tenant.clone())
    }

    /// Whom a sandbox belongs to, as the store has it.
    ///
    /// # Errors
    /// `SANDBOX_NOT_FOUND`; `HOST_UNAVAILABLE`.
    pub async fn stored_tenant(&self, sandbox_id: &str) -> Result<String, Status> {
        Ok(self.stored(sandbox_id).await?.ok_or_else(not_found)?.tenant)
    }

    /// Waits until our copy of a sandbox's record is as it is stored now, and those of the `claims` of its host names are.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn caught_up(&self, sandbox_id: &str, claims: &View<PreviewDomain>) -> Result<(), StoreError> {
        let record = self.records.caught_up(&*self.store, sandbox_id).await?;
        let domains = record.iter().flat_map(|record| &record.previews).map(|entry| &entry.domain);
        for domain in domains.filter(|domain| !domain.is_empty()) {
            claims.caught_up(&*self.store, domain).await?;
        }
        Ok(())
    }

    async fn stored(&self, sandbox_id: &str) -> Result<Option<SandboxRecord>, Status> {
        if !could_be_an_id(sandbox_id) {
            return Ok(None);
        }
        let found = record::get(&*self.store, &keys::sandbox(sandbox_id)).await;
        found.map(|found| found.map(|(record, _)| record)).map_err(|error| store_unavailable(&error))
    }

    async fn endpoint(&self, host_id: &str) -> Result<String, Status> {
        if let Some(host) = self.hosts.get(host_id) {
            return Ok(host.endpoint.clone());
        }
        let found = record::get::<HostRecord>(&*self.store, &keys::host(host_id))
            .await
            .map_err(|error| store_unavailable(&error))?;
        found.map(|(host, _)| host.endpoint).ok_or_else(|| {
            status(Reason::HostUnavailable, "the sandbox's host is not reachable at the moment")
        })
    }
}

fn store_unavailable(error: &StoreError) -> Status {
    tracing::warn!(%error, "a record could not be read");
    status(Reason::HostUnavailable, "the record store cannot be reached")
}

pub(crate) fn not_found() -> Status {
    status(Reason::SandboxNotFound, "there is no such sandbox")
}

/// Keeps what cannot be an ID away from the store, from the log and from other parts: `sb-` and 20 characters (oc/v1/sandbox.proto).
pub(crate) fn could_be_an_id(text: &str) -> bool {
    text.len() <= 64
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// Whether a copy of this record may be believed: nothing that is about to change.
fn is_settled(record: &SandboxRecord) -> bool {
    matches!(record.state(), SandboxState::Running | SandboxState::Deleted | SandboxState::Failed)
        && record.transition() == SandboxTransition::Unspecified
}

/// The host that a sandbox's calls may go to; `None` if it has to be woken first.
fn usable<'a>(record: &'a SandboxRecord, tenant: &str) -> Result<Option<&'a str>, Status> {
    if record.tenant != tenant {
        return Err(not_found());
    }
    if record.deleting || record.state() == SandboxState::Deleted {
        return Err(status(Reason::SandboxDeleted, "the sandbox has been deleted"));
    }
    match (record.state(), record.transition()) {
        (_, SandboxTransition::Restoring) => {
            Err(status(Reason::SandboxNotReady, "the sandbox is being put back to a checkpoint"))
        }
        (SandboxState::Hibernated, _) | (SandboxState::Running, SandboxTransition::Hibernating) => Ok(None),
        (SandboxState::Running, _) => Ok(Some(&record.host_id)),
        (SandboxState::Failed, _) => {
            Err(status(Reason::SandboxFailed, "the sandbox is lost: its microVM failed"))
        }
        _ => Err(status(Reason::SandboxNotReady, "the sandbox is not ready yet")),
    }
}

#[cfg(test)]
mod tests {
    use oc_mesh::error::reason_of;

    use super::*;

    fn verdict(state: SandboxState, deleting: bool, tenant: &str) -> Result<Option<String>, String> {
        let record = SandboxRecord {
            tenant: "ours".into(),
            state: state.into(),
            host_id: "h".into(),
            deleting,
            ..Default::default()
        };
        let host_id = usable(&record, tenant).map_err(|status| reason_of(&status).unwrap())?;
        Ok(host_id.map(str::to_owned))
    }

    #[test]
    fn only_a_running_sandbox_of_the_tenant_is_usable() {
        assert_eq!(verdict(SandboxState::Running, false, "ours"), Ok(Some("h".into())));
        assert_eq!(verdict(SandboxState::Running, true, "ours"), Err("SANDBOX_DELETED".into()));
        assert_eq!(verdict(SandboxState::Deleted, false, "ours"), Err("SANDBOX_DELETED".into()));
        assert_eq!(verdict(SandboxState::Failed, false, "ours"), Err("SANDBOX_FAILED".into()));
        assert_eq!(verdict(SandboxState::Creating, false, "ours"), Err("SANDBOX_NOT_READY".into()));
        assert_eq!(verdict(SandboxState::Hibernated, false, "ours"), Ok(None));
        assert_eq!(verdict(SandboxState::Hibernated, true, "ours"), Err("SANDBOX_DELETED".into()));
        for state in [SandboxState::Running, SandboxState::Hibernated] {
            let restoring = SandboxRecord {
                tenant: "ours".into(),
                state: state.into(),
                transition: SandboxTransition::Restoring.into(),
                ..Default::default()
            };
            let refused = usable(&restoring, "ours").map_err(|status| reason_of(&status).unwrap());
            assert_eq!(refused, Err("SANDBOX_NOT_READY".into()));
        }
        for state in [
            SandboxState::Running,
            SandboxState::Hibernated,
            SandboxState::Deleted,
            SandboxState::Failed,
            SandboxState::Creating,
        ] {
            assert_eq!(verdict(state, false, "theirs"), Err("SANDBOX_NOT_FOUND".into()));
        }
    }

    #[test]
    fn what_cannot_be_an_id_never_reaches_the_store() {
        assert!(could_be_an_id("sb-0123456789abcdefghij"));
        for text in ["../keys/x", "sb-\0", "SB-1", &"a".repeat(65)] {
            assert!(!could_be_an_id(text), "{text}");
        }
    }
}

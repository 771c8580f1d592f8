//! What is counted: the sandboxes and their memory, for each host and for each tenant.

use std::collections::HashMap;

use oc_mesh::{
    keys, record,
    store::{Compare, Op, Revision, Store, StoreError},
};
use oc_proto::{
    mesh::{HostReservation, SandboxRecord, TenantUsage},
    v1::SandboxState,
};

/// A number of sandboxes, and their memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Sandboxes.
    pub sandboxes: i32,
    /// Guest memory, MiB.
    pub memory_mb: i64,
}

impl Count {
    /// What a sandbox of this record takes while it runs, counted or not.
    pub fn of(record: &SandboxRecord) -> Self {
        Self { sandboxes: 1, memory_mb: i64::from(record.size.unwrap_or_default().memory_mb) }
    }

    pub(super) fn add(self, more: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_add(more.sandboxes),
            memory_mb: self.memory_mb.saturating_add(more.memory_mb),
        }
    }

    /// Counts that drifted do not fall below zero; the repair puts them right.
    pub(super) fn subtract(self, less: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_sub(less.sandboxes).max(0),
            memory_mb: self.memory_mb.saturating_sub(less.memory_mb).max(0),
        }
    }
}

/// Whose count.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Account {
    /// What is promised on a host.
    Host(String),
    /// What a tenant uses.
    Tenant(String),
}

impl Account {
    /// The accounts in which a record is counted, and with what. A hibernated sandbox takes nothing of its host's, and is
    /// one of its tenant's all the same: what is stored is bounded, too.
    pub fn of(record: &SandboxRecord) -> impl Iterator<Item = (Self, Count)> {
        let share = Count::of(record);
        let host = record.reserved.then(|| (Self::Host(record.host_id.clone()), share));
        let kept = match (record.reserved, record.state()) {
            (true, _) => Some(share),
            (false, SandboxState::Hibernated) => Some(Count { memory_mb: 0, ..share }),
            (false, _) => None,
        };
        host.into_iter().chain(kept.map(|kept| (Self::Tenant(record.tenant.clone()), kept)))
    }

    fn key(&self) -> String {
        match self {
            Self::Host(id) => keys::reservation(id),
            Self::Tenant(tenant) => keys::usage(tenant),
        }
    }

    /// That nobody has changed it since `revision`.
    pub(super) fn unchanged(&self, revision: Option<Revision>) -> Compare {
        match revision {
            Some(revision) => Compare::Unchanged(self.key(), revision),
            None => Compare::Absent(self.key()),
        }
    }

    /// Writes it. A count of zero is written too, never removed: so its revision tells every change.
    pub(super) fn put(&self, count: Count) -> Op {
        let Count { sandboxes, memory_mb } = count;
        match self {
            Self::Host(_) => record::put(self.key(), &HostReservation { sandboxes, memory_mb }),
            Self::Tenant(_) => record::put(self.key(), &TenantUsage { sandboxes, memory_mb }),
        }
    }

    pub(super) async fn load(&self, store: &dyn Store) -> Result<Entry, StoreError> {
        let key = self.key();
        let found = match self {
            Self::Host(_) => record::get::<HostReservation>(store, &key).await?.map(Entry::from),
            Self::Tenant(_) => record::get::<TenantUsage>(store, &key).await?.map(Entry::from),
        };
        Ok(found.unwrap_or_default())
    }
}

/// An account as it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) count: Count,
    /// Its last change; `None` if it is not stored yet.
    pub(super) revision: Option<Revision>,
}

impl From<(HostReservation, Revision)> for Entry {
    fn from((HostReservation { sandboxes, memory_mb }, revision): (HostReservation, Revision)) -> Self {
        Self { count: Count { sandboxes, memory_mb }, revision: Some(revision) }
    }
}

impl From<(TenantUsage, Revision)> for Entry {
    fn from((TenantUsage { sandboxes, memory_mb }, revision): (TenantUsage, Revision)) -> Self {
        Self { count: Count { sandboxes, memory_mb }, revision: Some(revision) }
    }
}

/// All accounts as they are stored.
pub(super) async fn load_all(store: &dyn Store) -> Result<HashMap<Account, Entry>, StoreError> {
    let (hosts, _) = record::list::<HostReservation>(store, keys::RESERVATIONS).await?;
    let (tenants, _) = record::list::<TenantUsage>(store, keys::USAGE).await?;
    let id = |key: &str, prefix: &str| key.strip_prefix(prefix).unwrap_or(key).to_owned();
    let hosts = hosts.into_iter().map(|(key, record, revision)| {
        (Account::Host(id(&key, keys::RESERVATIONS)), Entry::from((record, revision)))
    });
    let tenants = tenants.into_iter().map(|(key, record, revision)| {
        (Account::Tenant(id(&key, keys::USAGE)), Entry::from((record, revision)))
    });
    Ok(hosts.chain(tenants).collect())
}

/// What the accounts should hold, by the records.
pub(super) fn sum<'a>(records: impl Iterator<Item = &'a SandboxRecord>) -> HashMap<Account, Count> {
    let mut counts: HashMap<Account, Count> = HashMap::new();
    for record in records {
        for (account, share) in Account::of(record) {
            let count = counts.entry(account).or_default();
            *count = count.add(share);
        }
    }
    counts
}

//! Following sandboxes: what each change of a record tells those who watch it. Pure; [`slots`] bounds how many watch,
//! [`horizon`] says how far a stream is in which nothing happens. The streams themselves are in
//! [`rpc::watch`](crate::rpc::watch).
//!
//! A record names where its sandbox was before it was written, so that each change tells by itself what happened: a
//! stream that is resumed needs no past beyond the changes that it has missed. Removing a record is no event, because
//! only those of deleted sandboxes are removed.

use std::collections::HashMap;

use oc_mesh::{
    record,
    store::{Event, KeyValue, Revision, StoreError},
};
use oc_proto::{
    mesh::SandboxRecord,
    v1::{SandboxEventType, SandboxState},
};

use crate::lifecycle;

pub mod horizon;
pub mod slots;

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of a tenant's sandboxes.
    Tenant(String),
    /// One sandbox.
    Sandbox {
        /// Whom it belongs to.
        tenant: String,
        /// Its ID.
        sandbox_id: String,
    },
}

impl Scope {
    fn holds(&self, record: &SandboxRecord) -> bool {
        match self {
            Self::Tenant(tenant) => record.tenant == *tenant,
            Self::Sandbox { tenant, sandbox_id } => {
                record.tenant == *tenant && record.sandbox_id == *sandbox_id
            }
        }
    }
}

/// What one who watches is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// What happened.
    pub kind: SandboxEventType,
    /// The record that says so.
    pub record: SandboxRecord,
    /// When it was written.
    pub revision: Revision,
    /// All changes up to here have been told then; 0 amid what was there at the beginning.
    pub complete: Revision,
}

/// What a record that was just written tells; nothing once its sandbox was deleted before.
pub fn kind_of(record: &SandboxRecord) -> Option<SandboxEventType> {
    match (record.changed_from(), lifecycle::phase(record)) {
        (SandboxState::Deleted, _) => None,
        (_, SandboxState::Deleted) => Some(SandboxEventType::Deleted),
        (SandboxState::Unspecified, _) => Some(SandboxEventType::Created),
        (before, after) if before == after => Some(SandboxEventType::Updated),
        _ => Some(SandboxEventType::StateChanged),
    }
}

/// How far a stream is, and what is next.
#[derive(Clone, Debug)]
pub struct Position {
    scope: Scope,
    seen: Revision,
    /// What was shown at the beginning though it was written after `seen`: a long list is not of one moment.
    ahead: HashMap<String, Revision>,
    is_over: bool,
}

impl Position {
    /// After a revision.
    pub fn after(scope: Scope, seen: Revision) -> Self {
        Self { scope, seen, ahead: HashMap::new(), is_over: false }
    }

    /// After what is there now: what is to be told of it, oldest change first. `seen` is the revision from which a
    /// watch misses nothing of what is listed.
    ///
    /// # Errors
    ///
    /// A record cannot be read.
    pub fn at_present(
        scope: Scope,
        listed: Vec<KeyValue>,
        seen: Revision,
    ) -> Result<(Self, Vec<Told>), StoreError> {
        let mut position = Self::after(scope, seen);
        let mut present = Vec::new();
        for entry in listed {
            let record: SandboxRecord = record::decode(&entry)?;
            if !position.scope.holds(&record) {
                continue;
            }
            let revision = entry.mod_revision;
            if revision > seen {
                position.ahead.insert(record.sandbox_id.clone(), revision);
            }
            position.note_end(&record);
            if position.is_over || !lifecycle::is_deleted(&record) {
                let (kind, complete) = (SandboxEventType::Current, Revision(0));
                present.push(Told { kind, record, revision, complete });
            }
        }
        present.sort_by_key(|told| told.revision);
        Ok((position, present))
    }

    /// All of the changes of one revision, as the store tells them: what of them is to be told.
    ///
    /// # Errors
    ///
    /// A record cannot be read.
    pub fn advance(&mut self, changes: Vec<Event>) -> Result<Vec<Told>, StoreError> {
        let before = self.seen;
        let mut told = Vec::new();
        for change in changes {
            self.seen = self.seen.max(change.revision());
            let Event::Put(entry) = change else { continue };
            let record: SandboxRecord = record::decode(&entry)?;
            if !self.scope.holds(&record) {
                continue;
            }
            self.note_end(&record);
            let revision = entry.mod_revision;
            if self.ahead.get(&record.sandbox_id).is_some_and(|shown| *shown >= revision) {
                continue;
            }
            if let Some(kind) = kind_of(&record) {
                told.push(Told { kind, record, revision, complete: before });
            }
        }
        if let Some(last) = told.last_mut() {
            last.complete = self.seen;
        }
        let seen = self.seen;
        self.ahead.retain(|_, shown| *shown > seen);
        Ok(told)
    }

    /// Nothing can follow.
    pub fn end(&mut self) {
        self.is_over = true;
    }

    /// Nothing up to `revision` is missing.
    pub fn reach(&mut self, revision: Revision) {
        self.seen = self.seen.max(revision);
    }

    /// Up to where all changes have been told.
    pub fn seen(&self) -> Revision {
        self.seen
    }

    /// Whether nothing can follow: the one sandbox that is watched is deleted.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Notes what its record says of the one sandbox that is watched.
    fn note_end(&mut self, record: &SandboxRecord) {
        self.is_over |= matches!(self.scope, Scope::Sandbox { .. }) && lifecycle::is_deleted(record);
    }
}

#[cfg(test)]
mod tests;

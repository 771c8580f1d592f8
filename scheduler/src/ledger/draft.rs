//! One transaction out of many changes: what each means for the counts, and whether it may be. Pure.

use std::{collections::HashMap, sync::Arc};

use oc_mesh::{
    keys, record,
    store::{Compare, Op, Revision, Txn},
};
use oc_proto::{
    mesh::{HostRecord, SandboxRecord},
    v1::SandboxState,
};

use super::{
    Change, LedgerError, Next,
    account::{Account, Count, Entry},
};
use crate::{
    lifecycle,
    placement::{self, Candidate, Like, Need},
    quota::Quota,
};

/// Changes in one transaction: each compares and writes its record and at most three counts (moving from one host to
/// another changes both), out of [`oc_mesh::store::MAX_TXN_OPS`].
pub(super) const MAX_CHANGES: usize = oc_mesh::store::MAX_TXN_OPS / 4;

/// What limits a draft.
#[derive(Debug)]
pub(super) struct Limits<'a> {
    /// The hosts that are members.
    pub(super) hosts: &'a [Arc<HostRecord>],
    /// What a tenant may use.
    pub(super) quota: Quota,
}

/// A transaction in the making.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    known: &'a HashMap<Account, Entry>,
    limits: Limits<'a>,
    /// The counts that change, as they are to be.
    counts: HashMap<Account, Count>,
    compare: Vec<Compare>,
    then: Vec<Op>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(known: &'a HashMap<Account, Entry>, limits: Limits<'a>) -> Self {
        Self { known, limits, counts: HashMap::new(), compare: Vec::new(), then: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.then.is_empty()
    }

    /// Adds a change: what its record becomes. One that is refused leaves the draft as it was.
    pub(super) fn add(
        &mut self,
        change: &Change,
        draw: &mut dyn FnMut(usize) -> usize,
    ) -> Result<Option<SandboxRecord>, LedgerError> {
        let before = change.from.as_ref().map(|from| &from.record);
        let next = match &change.to {
            Next::Placed { record, avoid, like } => {
                Some(self.place(before, record, (avoid, like.as_ref()), draw)?)
            }
            Next::Reserved(record) => {
                self.fits(before, record)?;
                Some(record.clone())
            }
            Next::Record(record) => Some(record.clone()),
            Next::Removed => None,
        };
        let changed_from = before.map_or(SandboxState::Unspecified, lifecycle::phase).into();
        let next = next.map(|next| SandboxRecord { changed_from, ..next });
        for (account, share) in before.into_iter().flat_map(Account::of) {
            let count = self.count(&account).subtract(share);
            self.counts.insert(account, count);
        }
        for (account, share) in next.iter().flat_map(Account::of) {
            let count = self.count(&account).add(share);
            self.counts.insert(account, count);
        }
        let key = keys::sandbox(&change.sandbox_id);
        self.compare.push(match &change.from {
            Some(from) => Compare::Unchanged(key.clone(), from.revision),
            None => Compare::Absent(key.clone()),
        });
        self.then.push(match &next {
            Some(next) => record::put(key, next),
            None => Op::Delete { key },
        });
        Ok(next)
    }

    fn place(
        &self,
        before: Option<&SandboxRecord>,
        record: &SandboxRecord,
        (avoid, like): (&[String], Option<&Like>),
        draw: &mut dyn FnMut(usize) -> usize,
    ) -> Result<SandboxRecord, LedgerError> {
        let share = Count::of(record);
        // What moves to another host is counted already.
        if !before.is_some_and(|before| before.reserved) {
            self.limits.quota.check(self.count(&Account::Tenant(record.tenant.clone())), share)?;
        }
        let promised = |host: &HostRecord| self.count(&Account::Host(host.host_id.clone()));
        let candidates: Vec<_> =
            self.limits.hosts.iter().map(|host| Candidate { host, promised: promised(host) }).collect();
        let need = Need { template_id: &record.template_id, share, avoid, like };
        let host = placement::place(need, &candidates, draw)?;
        Ok(lifecycle::place(record, &host.host_id)?)
    }

    /// Whether the record's own host has room for its share, and its tenant quota. What is counted there already has both.
    fn fits(&self, before: Option<&SandboxRecord>, record: &SandboxRecord) -> Result<(), LedgerError> {
        if before.is_some_and(|before| before.reserved && before.host_id == record.host_id) {
            return Ok(());
        }
        let share = Count::of(record);
        let tenant = Account::Tenant(record.tenant.clone());
        let counted = before.into_iter().flat_map(Account::of).filter(|(account, _)| *account == tenant);
        let used = counted.fold(self.count(&tenant), |used, (_, share)| used.subtract(share));
        self.limits.quota.check(used, share)?;
        let promised = self.count(&Account::Host(record.host_id.clone()));
        let hosts = self.limits.hosts.iter().filter(|host| host.host_id == record.host_id);
        let candidates: Vec<_> = hosts.map(|host| Candidate { host, promised }).collect();
        let need = Need { template_id: &record.template_id, share, avoid: &[], like: None };
        placement::place(need, &candidates, &mut |_| 0)?;
        Ok(())
    }

    fn count(&self, account: &Account) -> Count {
        let known = || self.known.get(account).map(|entry| entry.count).unwrap_or_default();
        self.counts.get(account).copied().unwrap_or_else(known)
    }

    /// The transaction, and the counts as it leaves them.
    pub(super) fn finish(mut self) -> (Txn, Settled) {
        let revision = |account: &Account| self.known.get(account).and_then(|entry| entry.revision);
        let changed: Vec<_> = self
            .counts
            .into_iter()
            .filter(|(account, count)| self.known.get(account).is_none_or(|entry| entry.count != *count))
            .collect();
        for (account, count) in &changed {
            self.compare.push(account.unchanged(revision(account)));
            self.then.push(account.put(*count));
        }
        (Txn { compare: self.compare, then: self.then }, Settled(changed))
    }
}

/// The counts that a transaction writes.
#[derive(Debug, Default)]
pub(super) struct Settled(Vec<(Account, Count)>);

impl Settled {
    /// Whose they are.
    pub(super) fn accounts(&self) -> impl Iterator<Item = &Account> {
        self.0.iter().map(|(account, _)| account)
    }

    /// Notes what was written, at `revision`.
    pub(super) fn apply(self, known: &mut HashMap<Account, Entry>, revision: Revision) {
        for (account, count) in self.0 {
            known.insert(account, Entry { count, revision: Some(revision) });
        }
    }
}

#[cfg(test)]
mod tests;

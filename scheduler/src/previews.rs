//! Previews: which ports of a sandbox others are meant to find, by which host names, and with which token.
//!
//! All that a sandbox has of it stands in its own record, so it goes with the sandbox, and nobody can act on the one
//! without the other. Only that a host name is one preview's alone needs a record beside it:
//!
//! ```text
//!   create:  claim the host name ─► write the sandbox's record
//!   delete:  write the sandbox's record ─► release the host name
//! ```
//!
//! A scheduler that dies in between leaves a claim that no record names. It leads nowhere, can be taken over by others after
//! [`CLAIM_KEPT`], and is [swept](Previews::sweep) then, as are those of sandboxes that are gone.

pub mod token;

use std::time::{Duration, SystemTime};

use oc_mesh::{
    host_name::{LOCALHOST, compared, is_at_or_below, is_host_name},
    keys, record,
    store::{Compare, Op, Revision, SharedStore, StoreError, Txn, TxnOutcome},
    view::View,
};
use oc_proto::mesh::{PreviewDomain, PreviewEntry, SandboxRecord};
use tokio_util::sync::CancellationToken;

use crate::{
    ledger::LedgerError,
    lifecycle::{self, Denied},
    random,
    refusal::Refusal,
    sandbox_id,
    sandboxes::Sandboxes,
    validate::Invalid,
};

/// Previews of one sandbox at most.
pub const MAX_PREVIEWS: usize = 64;
/// A claim that no record names is somebody's who is about to write that record, for this long.
pub const CLAIM_KEPT: Duration = Duration::from_secs(300);
/// What the IDs of previews begin with.
const PREFIX: &str = "pv-";
/// How often a claim is tried again that somebody else was quicker with.
const ATTEMPTS: u32 = 5;

/// The previews of all sandboxes.
#[derive(Clone, Debug)]
pub struct Previews {
    pub(crate) sandboxes: Sandboxes,
    store: SharedStore,
    domains: View<PreviewDomain>,
}

/// What a preview is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The port.
    pub port: u16,
    /// Host name of its own, if it is to have one.
    pub domain: Option<String>,
    /// Hash of the token that all of the sandbox's ports are to ask for, if that is to change.
    pub token_hash: Option<String>,
}

impl Previews {
    /// The previews in `store`, whose claims are followed until `views` is cancelled.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub async fn new(
        sandboxes: Sandboxes,
        store: SharedStore,
        views: CancellationToken,
    ) -> Result<Self, StoreError> {
        let domains = View::start(store.clone(), keys::PREVIEW_DOMAINS, views).await?;
        Ok(Self { sandboxes, store, domains })
    }

    /// A tenant's sandbox, whose previews are asked for.
    ///
    /// # Errors
    ///
    /// [`Refusal::SandboxNotFound`], [`Denied::Deleted`]; failures of the store.
    pub async fn of(&self, tenant: &str, sandbox_id: &str) -> Result<SandboxRecord, Refusal> {
        let record = self.sandboxes.get(tenant, sandbox_id).await?;
        if lifecycle::is_deleted(&record) { Err(Denied::Deleted.into()) } else { Ok(record) }
    }

    /// Creates the preview of a port, or changes the one that is there. Returns the sandbox's record with it, and whether
    /// there was one.
    ///
    /// # Errors
    ///
    /// As [`of`](Self::of); [`Refusal::DomainTaken`], [`Refusal::TooManyPreviews`].
    pub async fn create(
        &self,
        tenant: &str,
        sandbox_id: &str,
        wanted: &Wanted,
    ) -> Result<(SandboxRecord, bool), Refusal> {
        let before = self.of(tenant, sandbox_id).await?;
        with(&before, wanted, "", SystemTime::UNIX_EPOCH)?;
        if let Some(domain) = &wanted.domain {
            let is_anothers =
                |entry: &PreviewEntry| entry.port != u32::from(wanted.port) && entry.domain == *domain;
            if before.previews.iter().any(is_anothers) {
                return Err(Refusal::DomainTaken);
            }
            self.claim(domain, sandbox_id).await?;
        }
        let id = sandbox_id::random(PREFIX).map_err(|error| Refusal::Internal(error.to_string()))?;
        let now = self.sandboxes.clock.now();
        let had = entry(&before, wanted.port).cloned();
        let written = self
            .sandboxes
            .ledger
            .update(sandbox_id, |record| {
                let next = with(record, wanted, &id, now);
                // That there are too many by now is found by who looks at what was written.
                next.or_else(|refusal| match refusal {
                    Refusal::Ledger(LedgerError::Denied(denied)) => Err(denied),
                    _ => Ok(record.clone()),
                })
            })
            .await?
            .record;
        if entry(&written, wanted.port).is_none() {
            return Err(Refusal::TooManyPreviews { max: MAX_PREVIEWS });
        }
        if let Some(old) = had.as_ref().map(|entry| entry.domain.as_str()).filter(|old| !old.is_empty())
            && wanted.domain.as_deref().is_some_and(|new| new != old)
        {
            self.release(old, sandbox_id).await;
        }
        Ok((written, had.is_some()))
    }

    /// Deletes the preview of a port.
    ///
    /// # Errors
    ///
    /// As [`of`](Self::of); [`Refusal::PreviewNotFound`].
    pub async fn delete(&self, tenant: &str, sandbox_id: &str, port: u32) -> Result<(), Refusal> {
        let before = self.of(tenant, sandbox_id).await?;
        let gone = before.previews.iter().find(|entry| entry.port == port).ok_or(Refusal::PreviewNotFound)?;
        let step = |record: &SandboxRecord| {
            unless_deleted(record)?;
            let mut next = record.clone();
            next.previews.retain(|entry| entry.port != port);
            Ok(next)
        };
        self.sandboxes.ledger.update(sandbox_id, step).await?;
        if !gone.domain.is_empty() {
            self.release(&gone.domain, sandbox_id).await;
        }
        Ok(())
    }

    /// Gives all ports of a sandbox another token, or none.
    ///
    /// # Errors
    ///
    /// As [`of`](Self::of).
    pub async fn set_token(&self, tenant: &str, sandbox_id: &str, hash: &str) -> Result<(), Refusal> {
        self.of(tenant, sandbox_id).await?;
        let step = |record: &SandboxRecord| {
            unless_deleted(record)?;
            Ok(SandboxRecord { preview_token_hash: hash.to_owned(), ..record.clone() })
        };
        self.sandboxes.ledger.update(sandbox_id, step).await?;
        Ok(())
    }

    /// Releases the host names that no sandbox's record names any more.
    pub async fn sweep(&self) {
        for (domain, claim) in self.domains.all() {
            let copy = self.sandboxes.records.get(&claim.sandbox_id);
            if self.is_young(&claim) || copy.is_some_and(|record| names(&record, &domain)) {
                continue;
            }
            tracing::info!(domain, sandbox_id = claim.sandbox_id, "host name of a preview released");
            self.release(&domain, &claim.sandbox_id).await;
        }
    }

    /// Makes a host name this sandbox's.
    async fn claim(&self, domain: &str, sandbox_id: &str) -> Result<(), Refusal> {
        for attempt in 0..ATTEMPTS {
            let compare = match self.claimed(domain).await? {
                None => Compare::Absent(keys::preview_domain(domain)),
                Some((claim, revision)) => {
                    if claim.sandbox_id != sandbox_id && self.is_held(&claim, domain).await? {
                        return Err(Refusal::DomainTaken);
                    }
                    Compare::Unchanged(keys::preview_domain(domain), revision)
                }
            };
            let claim = PreviewDomain {
                sandbox_id: sandbox_id.to_owned(),
                claimed_at: Some(self.sandboxes.clock.now().into()),
            };
            let then = vec![record::put(keys::preview_domain(domain), &claim)];
            match self.store.txn(Txn { compare: vec![compare], then }).await? {
                TxnOutcome::Committed(_) => return Ok(()),
                TxnOutcome::Conflict => random::pause(Duration::from_millis(2), attempt).await,
            }
        }
        Err(LedgerError::Conflict.into())
    }

    /// Releases a host name, if it is this sandbox's. What stays because the store fails is swept later.
    async fn release(&self, domain: &str, sandbox_id: &str) {
        let released = async {
            let Some((claim, revision)) = self.claimed(domain).await? else { return Ok(()) };
            if claim.sandbox_id != sandbox_id {
                return Ok(());
            }
            // Not as a copy has it: it may have been taken again meanwhile.
            let record = self.sandboxes.ledger.read(sandbox_id).await?;
            if record.is_some_and(|found| names(&found.record, domain)) {
                return Ok(());
            }
            let key = keys::preview_domain(domain);
            let compare = vec![Compare::Unchanged(key.clone(), revision)];
            self.store.txn(Txn { compare, then: vec![Op::Delete { key }] }).await.map(|_| ())
        };
        let released: Result<(), StoreError> = released.await;
        if let Err(error) = released {
            tracing::warn!(domain, %error, "host name of a preview not released yet");
        }
    }

    async fn claimed(&self, domain: &str) -> Result<Option<(PreviewDomain, Revision)>, StoreError> {
        record::get(self.store.as_ref(), &keys::preview_domain(domain)).await
    }

    async fn is_held(&self, claim: &PreviewDomain, domain: &str) -> Result<bool, StoreError> {
        if self.is_young(claim) {
            return Ok(true);
        }
        let record = self.sandboxes.ledger.read(&claim.sandbox_id).await?;
        Ok(record.is_some_and(|found| names(&found.record, domain)))
    }

    fn is_young(&self, claim: &PreviewDomain) -> bool {
        let since = self.sandboxes.clock.now().duration_since(lifecycle::time(claim.claimed_at));
        since.is_ok_and(|since| since < CLAIM_KEPT)
    }
}

/// The preview of a port.
pub fn entry(record: &SandboxRecord, port: u16) -> Option<&PreviewEntry> {
    record.previews.iter().find(|entry| entry.port == u32::from(port))
}

/// Whether a sandbox that is there says that a host name leads to it.
fn names(record: &SandboxRecord, domain: &str) -> bool {
    !lifecycle::is_deleted(record) && record.previews.iter().any(|entry| entry.domain == domain)
}

fn unless_deleted(record: &SandboxRecord) -> Result<(), Denied> {
    if lifecycle::is_deleted(record) { Err(Denied::Deleted) } else { Ok(()) }
}

/// The record with the preview in it.
fn with(
    record: &SandboxRecord,
    wanted: &Wanted,
    id: &str,
    now: SystemTime,
) -> Result<SandboxRecord, Refusal> {
    unless_deleted(record)?;
    let mut next = record.clone();
    let is_full = next.previews.len() >= MAX_PREVIEWS;
    match next.previews.iter_mut().find(|entry| entry.port == u32::from(wanted.port)) {
        Some(entry) => {
            if let Some(domain) = &wanted.domain {
                entry.domain.clone_from(domain);
            }
        }
        None if is_full => return Err(Refusal::TooManyPreviews { max: MAX_PREVIEWS }),
        None => next.previews.push(PreviewEntry {
            preview_id: id.to_owned(),
            port: wanted.port.into(),
            domain: wanted.domain.clone().unwrap_or_default(),
            created_at: Some(now.into()),
        }),
    }
    if let Some(hash) = &wanted.token_hash {
        next.preview_token_hash.clone_from(hash);
    }
    Ok(next)
}

/// A port as requests name it.
///
/// # Errors
///
/// [`Invalid::Port`].
pub fn port(number: u32) -> Result<u16, Invalid> {
    u16::try_from(number).ok().filter(|port| *port != 0).ok_or(Invalid::Port(number))
}

/// A host name that a preview may have: none of `own_names`, nor of those that are the mesh's own where its gateway is reached by
/// `public_url` and shows ports under `preview_domain`. Each stands for every name below it, too.
///
/// # Errors
///
/// [`Invalid::PreviewDomain`], [`Invalid::OwnName`].
pub fn domain(
    name: &str,
    own_names: &[String],
    public_url: &str,
    preview_domain: &str,
) -> Result<String, Invalid> {
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_address = last.bytes().all(|byte| byte.is_ascii_digit());
    if !is_host_name(name) || !name.contains('.') || is_address {
        return Err(Invalid::PreviewDomain);
    }
    let public_url = public_url.parse::<http::Uri>().ok();
    let public = public_url.as_ref().and_then(http::Uri::host).unwrap_or_default();
    let always = [LOCALHOST.to_owned(), compared(preview_domain), compared(public)];
    if always.iter().chain(own_names).any(|own| is_at_or_below(name, own)) {
        return Err(Invalid::OwnName(name.to_owned()));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests;

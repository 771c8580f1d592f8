//! Makes checkpoints' records and hosts' snapshots agree.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use oc_proto::{
    mesh::{CheckpointRecord, SandboxRecord, Snapshot},
    v1::{CheckpointState, SandboxState},
};

use super::{
    Checkpoints,
    elsewhere::uploaded,
    plan::{Action, judge, judge_without_host},
    shown,
    take::is_processing,
};
use crate::{lifecycle, reconcile::plan::Moment, refusal::Refusal, telemetry};

impl Checkpoints {
    /// The checkpoints that are on a host, by their records.
    pub(crate) fn of_host(&self, host_id: &str) -> BTreeMap<String, Arc<CheckpointRecord>> {
        let all = self.records.all().into_iter();
        all.filter(|(_, record)| shown(record).worker_id == host_id).collect()
    }

    /// Compares the records as they were before a host was asked with what it has listed, once.
    pub(crate) async fn look_at_host(
        &self,
        host_id: &str,
        before: &BTreeMap<String, Arc<CheckpointRecord>>,
        listed: &[Snapshot],
        moment: Moment,
    ) {
        let listed: BTreeMap<&str, &Snapshot> =
            listed.iter().map(|snapshot| (snapshot.snapshot_id.as_str(), snapshot)).collect();
        let ids: BTreeSet<&str> = before.keys().map(String::as_str).chain(listed.keys().copied()).collect();
        for id in ids {
            if let Some(sandbox_id) = hibernated_sandbox(id) {
                let result = self.end_unless_wanted(id, sandbox_id, host_id);
                report(id, &Action::EndStray, result.await);
                continue;
            }
            let (record, snapshot) = (before.get(id).map(AsRef::as_ref), listed.get(id).copied());
            let is_live = self.sandboxes.flows.is_live(id);
            let Some(action) = judge(record, snapshot, is_live, moment) else { continue };
            let result = async {
                let stored = self.book.read(id).await?.map(|(record, _)| record);
                let is_live = self.sandboxes.flows.is_live(id);
                if judge(stored.as_ref(), snapshot, is_live, moment).as_ref() != Some(&action) {
                    return Ok(false);
                }
                self.perform(id, &action, stored, host_id).await
            };
            report(id, &action, result.await);
        }
    }

    /// Removes the snapshot of a hibernated sandbox that its host does not count as one any more, unless the sandbox is to be
    /// made of it. Its record says so before anybody is asked for that, so what is not wanted now never will be.
    async fn end_unless_wanted(&self, id: &str, sandbox_id: &str, host_id: &str) -> Result<bool, Refusal> {
        let found = self.sandboxes.ledger.read(sandbox_id).await?;
        let is_wanted = |record: &SandboxRecord| {
            record.state() == SandboxState::Hibernated
                && !lifecycle::is_deleted(record)
                && record.stored_snapshot_id == id
        };
        if found.is_some_and(|found| is_wanted(&found.record)) {
            return Ok(false);
        }
        self.sandboxes.agents.delete_snapshot(host_id, id).await?;
        Ok(true)
    }

    /// Looks at the checkpoints of hosts that are no members, once.
    pub(crate) async fn look_at_records(&self, moment: Moment) {
        for (id, record) in self.records.all() {
            let host_id = shown(&record).worker_id;
            if self.sandboxes.agents.hosts().get(&host_id).is_some() {
                continue;
            }
            let is_live = self.sandboxes.flows.is_live(&id);
            let Some(action) = judge_without_host(&record, is_live, moment) else { continue };
            let result = async {
                let stored = self.book.read(&id).await?.map(|(record, _)| record);
                let is_live = self.sandboxes.flows.is_live(&id);
                let judged = stored.as_ref().and_then(|stored| judge_without_host(stored, is_live, moment));
                if judged.as_ref() != Some(&action) {
                    return Ok(false);
                }
                self.perform(&id, &action, stored, &host_id).await
            };
            report(&id, &action, result.await);
        }
    }

    /// Whether anything was done.
    async fn perform(
        &self,
        id: &str,
        action: &Action,
        stored: Option<CheckpointRecord>,
        host_id: &str,
    ) -> Result<bool, Refusal> {
        match (action, stored) {
            (Action::EndStray, _) => {
                self.sandboxes.agents.delete_snapshot(host_id, id).await?;
            }
            (_, None) => return Ok(false),
            (Action::Finish(snapshot), Some(_)) => {
                self.finish(id, snapshot).await?;
            }
            (Action::Abandon, Some(_)) => self.book.remove_if(id, is_processing).await?,
            (Action::Fail, Some(_)) => {
                self.book.update(id, failed).await?;
            }
            (Action::NoteUploaded(store), Some(_)) => {
                self.book.update(id, |record| uploaded(record, store)).await?;
            }
            (Action::FinishDelete, Some(record)) => self.finish_delete(&record).await?,
            (Action::Retire, Some(record)) => self.retire(&record).await?,
        }
        Ok(true)
    }
}

/// The sandbox that a snapshot is of, if it is one of a hibernated sandbox: `hibernated-SANDBOX-DIGEST`.
fn hibernated_sandbox(snapshot_id: &str) -> Option<&str> {
    let (sandbox_id, _) = snapshot_id.strip_prefix("hibernated-")?.rsplit_once('-')?;
    Some(sandbox_id)
}

/// The record of a checkpoint that its host does not have any more.
fn failed(record: &CheckpointRecord) -> CheckpointRecord {
    let mut checkpoint = shown(record);
    if checkpoint.state() != CheckpointState::Ready {
        return record.clone();
    }
    checkpoint.state = CheckpointState::Failed.into();
    checkpoint.failure = "its host does not have it any more".into();
    CheckpointRecord { checkpoint: Some(checkpoint), ..record.clone() }
}

fn report(id: &str, action: &Action, result: Result<bool, Refusal>) {
    match result {
        Ok(false) => tracing::debug!(checkpoint_id = id, action = action.kind(), "already settled"),
        Ok(true) => {
            telemetry::reconciled(action.kind(), true);
            tracing::info!(checkpoint_id = id, action = action.kind(), "reconciled");
        }
        Err(error) => {
            telemetry::reconciled(action.kind(), false);
            tracing::warn!(checkpoint_id = id, action = action.kind(), %error, "not reconciled yet, trying again");
        }
    }
}

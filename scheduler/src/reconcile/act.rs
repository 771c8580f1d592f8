//! Carries out what a plan says, after a second look.

use std::time::Duration;

use oc_mesh::error::Reason;
use oc_proto::mesh::{HibernateVmResponse, SandboxRecord, SnapshotSource, Vm};

use super::plan::{Action, Around, Moment, judge, judge_record};
use crate::{
    agents::AgentError,
    ledger::{LedgerError, Versioned},
    lifecycle::{self, Denied},
    refusal::Refusal,
    sandboxes::Sandboxes,
    telemetry,
};

/// How long a host may take to say how it has put a sandbox back that runs.
const RESTORED_WITHIN: Duration = Duration::from_secs(10);

/// A host's answer about one sandbox.
#[derive(Debug)]
pub(super) struct Seen<'a> {
    pub(super) host_id: &'a str,
    pub(super) vm: Option<&'a Vm>,
    /// The record before it was asked.
    pub(super) before: Option<&'a SandboxRecord>,
}

impl Sandboxes {
    /// Carries out an action that follows from what a host said, if the record as it is stored now agrees.
    pub(super) async fn reconcile_vm(
        &self,
        sandbox_id: &str,
        action: Action,
        seen: Seen<'_>,
        moment: Moment,
    ) {
        if self.flows.is_live(sandbox_id) {
            return;
        }
        let result = async {
            let stored = self.ledger.read(sandbox_id).await?;
            let record = stored.as_ref().map(|stored| &stored.record);
            if judge(seen.host_id, record, seen.vm, moment).as_ref() != Some(&action) {
                return Ok(false);
            }
            // It may have been woken, and hibernated again, since its host has said what it has stored.
            if matches!(action, Action::NoteStored(_)) && record != seen.before {
                return Ok(false);
            }
            self.perform(sandbox_id, &action, stored, seen.host_id, moment).await
        };
        report(sandbox_id, &action, result.await);
    }

    /// Carries out an action that follows from the record alone, if it still does.
    pub(super) async fn reconcile_record(&self, sandbox_id: &str, action: Action, moment: Moment) {
        let result = async {
            let Some(stored) = self.ledger.read(sandbox_id).await? else { return Ok(false) };
            let around = self.around(sandbox_id, &stored.record);
            if judge_record(&stored.record, around, moment).as_ref() != Some(&action) {
                return Ok(false);
            }
            let host_id = stored.record.host_id.clone();
            self.perform(sandbox_id, &action, Some(stored), &host_id, moment).await
        };
        report(sandbox_id, &action, result.await);
    }

    /// What is known of a record without asking its host.
    pub(super) fn around(&self, sandbox_id: &str, record: &SandboxRecord) -> Around {
        Around {
            is_live: self.flows.is_live(sandbox_id),
            has_host: self.agents.hosts().get(&record.host_id).is_some(),
        }
    }

    /// Whether anything was done.
    async fn perform(
        &self,
        sandbox_id: &str,
        action: &Action,
        stored: Option<Versioned>,
        host_id: &str,
        moment: Moment,
    ) -> Result<bool, Refusal> {
        if let Action::EndStray { epoch } = action {
            self.agents.delete_vm(host_id, sandbox_id, *epoch, None).await?;
            return Ok(true);
        }
        let Some(stored) = stored else { return Ok(false) };
        let now = moment.now;
        match action {
            Action::Undo => {
                // Best effort: what stays is a stray, and ended as such.
                let epoch = stored.record.epoch;
                let _ = self.agents.delete_vm(host_id, sandbox_id, epoch, None).await;
                self.ledger.step(stored, |record| lifecycle::undo(record, now)).await?;
            }
            Action::Fail { failure } => {
                let failed = self.ledger.step(stored, |record| lifecycle::fail(record, failure, now)).await?;
                tracing::warn!(sandbox_id, host_id, failure, "sandbox failed");
                // What is left of it on the host; if that fails it is a stray from now on.
                let _ = self.agents.delete_vm(host_id, sandbox_id, failed.record.epoch, None).await;
            }
            Action::FinishDelete => self.finish_delete(stored).await?,
            Action::HibernateIdle { idle_since } => match self.store(sandbox_id, Some(*idle_since)).await {
                Ok(_) => {}
                // It was used since, and spared.
                Err(Refusal::Agent(AgentError::Refused { reason: Reason::SandboxActive, .. })) => {}
                Err(error) => return Err(error),
            },
            Action::Spare => {
                self.ledger.step(stored, |record| lifecycle::spare(record, now)).await?;
            }
            Action::FinishHibernate { stored_bytes } => {
                let host = HibernateVmResponse { stored_bytes: *stored_bytes, ..Default::default() };
                self.ledger.step(stored, |record| lifecycle::hibernate(record, &host)).await?;
            }
            Action::NoteStored(what) => {
                self.ledger.step(stored, |record| lifecycle::note_stored(record, what)).await?;
            }
            Action::LeaveToStore => {
                self.ledger.step(stored, lifecycle::leave_to_store).await?;
                tracing::warn!(
                    sandbox_id,
                    host_id,
                    "its host has lost a hibernated sandbox: it is in the object store"
                );
            }
            Action::Doze => {
                self.ledger.step(stored, lifecycle::doze).await?;
            }
            Action::FinishWake => {
                self.finish_wake(stored).await?;
            }
            Action::FinishRestore { epoch } => {
                // The call that made what runs there already: its host answers as it did, or would have.
                let asked = SandboxRecord { epoch: *epoch, ..stored.record.clone() };
                let source = SnapshotSource {
                    snapshot_id: asked.restoring_id.clone(),
                    disk_only: false,
                    wakes: false,
                };
                let made = self.agents.create_vm(&asked, Some(source), RESTORED_WITHIN).await?;
                self.ledger.step(stored, |record| lifecycle::restore(record, *epoch, &made, now)).await?;
            }
            Action::Stay => {
                self.ledger.step(stored, lifecycle::stay).await?;
            }
            Action::Bury => {
                self.ledger.step(stored, |record| lifecycle::bury(record, now)).await?;
            }
            Action::Collect => self.ledger.remove(stored).await?,
            Action::EndStray { .. } => {}
        }
        Ok(true)
    }
}

fn report(sandbox_id: &str, action: &Action, result: Result<bool, Refusal>) {
    match result {
        Ok(false) | Err(Refusal::Ledger(LedgerError::Conflict | LedgerError::Denied(Denied::Deleted))) => {
            tracing::debug!(sandbox_id, action = action.kind(), "already settled");
        }
        Ok(true) => {
            telemetry::reconciled(action.kind(), true);
            tracing::info!(sandbox_id, action = action.kind(), "reconciled");
        }
        Err(error) => {
            telemetry::reconciled(action.kind(), false);
            tracing::warn!(sandbox_id, action = action.kind(), %error, "not reconciled yet, trying again");
        }
    }
}

//! Putting a sandbox back to a checkpoint.
//!
//! ```text
//!   mark restoring, by a new epoch ─► host makes its microVM of the snapshot, then ends the old one ─► write RUNNING
//!                                        └─ refuses: the old one goes on ─► unmark ─► refuse
//! ```
//!
//! A host that does not answer leaves the mark, and which epoch it has tells [reconciliation](crate::reconcile) what
//! became of it.

use std::time::Duration;

use oc_proto::mesh::{SandboxRecord, SnapshotSource};

use super::{SETTLE, Sandboxes};
use crate::{
    agents::{AgentError, CREATE_DEADLINE},
    fail,
    ledger::{Change, LedgerError, Next},
    lifecycle::{self, Denied},
    random,
    refusal::Refusal,
};

impl Sandboxes {
    /// Puts a sandbox back to the checkpoint that is called as the snapshot `source`, and returns its record, running.
    pub(crate) async fn restore(
        &self,
        sandbox_id: &str,
        source: SnapshotSource,
    ) -> Result<SandboxRecord, Refusal> {
        // Before the mark, so that reconciliation does not take it for one that nobody works on.
        let _live = self.flows.enter(sandbox_id);
        let marked = tokio::time::timeout(SETTLE, self.mark_restoring(sandbox_id, &source.snapshot_id)).await;
        let marked = marked.unwrap_or_else(|_| Err(Denied::NotReady.into()))?;
        fail::reached(fail::RESTORE_MARKED);
        let asked = SandboxRecord { epoch: marked.tried_epoch, ..marked };
        match self.agents.create_vm(&asked, Some(source), CREATE_DEADLINE).await {
            Ok(made) => {
                fail::reached(fail::RESTORE_MADE);
                let now = self.clock.now();
                let step = |record: &SandboxRecord| lifecycle::restore(record, asked.epoch, &made, now);
                let record = self.ledger.update(sandbox_id, step).await?.record;
                fail::reached(fail::RESTORE_WRITTEN);
                tracing::info!(sandbox_id, checkpoint_id = record.checkpoint_id, "sandbox restored");
                Ok(record)
            }
            // Nobody knows what became of it. Reconciliation asks.
            Err(error @ AgentError::Unreachable { .. }) => Err(error.into()),
            Err(error) => match self.ledger.update(sandbox_id, lifecycle::stay).await {
                Ok(_) | Err(LedgerError::Denied(_)) => Err(error.into()),
                Err(failed) => Err(failed.into()),
            },
        }
    }

    /// Marks a sandbox, as soon as whoever else changes it has done so.
    async fn mark_restoring(
        &self,
        sandbox_id: &str,
        checkpoint_id: &str,
    ) -> Result<SandboxRecord, LedgerError> {
        for attempt in 0.. {
            let found = self.ledger.read(sandbox_id).await?.ok_or(LedgerError::NotFound)?;
            match lifecycle::mark_restoring(&found.record, checkpoint_id) {
                Ok(marked) => {
                    let to = Next::Reserved(marked);
                    let change = Change { sandbox_id: sandbox_id.into(), from: Some(found), to };
                    match self.ledger.write(change).await {
                        Err(LedgerError::Conflict) => {}
                        written => return Ok(written?.record),
                    }
                }
                // It is being stored, woken or put back: its host says which came first.
                Err(Denied::NotReady) if lifecycle::is_settling(&found.record) => {}
                Err(denied) => return Err(denied.into()),
            }
            random::pause(Duration::from_millis(5), attempt).await;
        }
        Err(LedgerError::Conflict)
    }
}

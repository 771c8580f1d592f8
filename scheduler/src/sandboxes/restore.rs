//! Putting a sandbox back to a checkpoint.
//!
//! ```text
//!   mark restoring, by a new epoch ─► host makes its microVM of the snapshot, then ends the old one ─► write RUNNING
//!                                        └─ refuses: the old one goes on ─► unmark ─► refuse
//! ```
//!
//! A host that does not answer leaves the mark, and which epoch it has tells [reconciliation](crate::reconcile) what
//! became of it.

use oc_proto::mesh::{SandboxRecord, SnapshotSource};

use super::Sandboxes;
use crate::{
    agents::{AgentError, CREATE_DEADLINE},
    ledger::{Change, LedgerError, Next},
    lifecycle,
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
        let found = self.ledger.read(sandbox_id).await?.ok_or(Refusal::SandboxNotFound)?;
        let marked = lifecycle::mark_restoring(&found.record, &source.snapshot_id)?;
        let asked = SandboxRecord { epoch: marked.tried_epoch, ..marked.clone() };
        let change = Change { sandbox_id: sandbox_id.into(), from: Some(found), to: Next::Reserved(marked) };
        self.ledger.write(change).await?;
        match self.agents.create_vm(&asked, Some(source), CREATE_DEADLINE).await {
            Ok(made) => {
                let now = self.clock.now();
                let step = |record: &SandboxRecord| lifecycle::restore(record, asked.epoch, &made, now);
                let record = self.ledger.update(sandbox_id, step).await?.record;
                tracing::info!(sandbox_id, checkpoint_id = record.checkpoint_id, "sandbox restored");
                Ok(record)
            }
            // Nobody knows what became of it. Reconciliation asks.
            Err(error @ (AgentError::Unreachable { .. } | AgentError::NotMember(_))) => Err(error.into()),
            Err(error) => match self.ledger.update(sandbox_id, lifecycle::stay).await {
                Ok(_) | Err(LedgerError::Denied(_)) => Err(error.into()),
                Err(failed) => Err(failed.into()),
            },
        }
    }
}

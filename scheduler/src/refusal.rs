//! Why a call is refused, and the one place where that becomes a gRPC status with its stable reason.

use oc_mesh::{
    error::{Reason, status},
    store::StoreError,
    token::TokenError,
};
use thiserror::Error;
use tonic::Status;

use crate::{
    agents::AgentError, checkpoints::index::Inadmissible, ledger::LedgerError, lifecycle::Denied,
    placement::Unplaceable, validate::Invalid,
};

/// Why a call is refused.
#[derive(Debug, Error)]
pub enum Refusal {
    /// The request is wrong by itself.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// There is no such sandbox, or it is another tenant's.
    #[error("there is no such sandbox")]
    SandboxNotFound,
    /// There is no such checkpoint, or it is another tenant's.
    #[error("there is no such checkpoint")]
    CheckpointNotFound,
    /// A checkpoint may not be taken.
    #[error(transparent)]
    Inadmissible(#[from] Inadmissible),
    /// A checkpoint is being taken, or failed.
    #[error("the checkpoint is not ready")]
    CheckpointNotReady,
    /// Something is to go on from a checkpoint of a disk alone.
    #[error("the checkpoint holds a disk alone: what is made of it boots")]
    CheckpointHasNoMemory,
    /// Its host does not have it any more.
    #[error("the checkpoint is lost: its host does not have it any more")]
    CheckpointLost,
    /// What changed since a revision is not known any more.
    #[error("the changes after that revision are no longer kept: watch anew, without one")]
    WatchCompacted,
    /// As many streams of changes are open as may be.
    #[error("too many watches at once, end some or try again")]
    TooManyWatches,
    /// There is no preview of that port.
    #[error("the sandbox has no preview of that port")]
    PreviewNotFound,
    /// A host name is another preview's.
    #[error("the host name is another preview's")]
    DomainTaken,
    /// A sandbox has as many previews as it may have.
    #[error("the sandbox has {max} previews, as many as it may have; delete one first")]
    TooManyPreviews {
        /// That is how many.
        max: usize,
    },
    /// There is no such key.
    #[error("there is no such key")]
    KeyNotFound,
    /// A sandbox's token was shown for something that it does not open.
    #[error("a sandbox's token is good for that sandbox alone, and not for this call")]
    WrongSandbox,
    /// An administrator's key is needed.
    #[error("this call needs an administrator's key")]
    NotAdmin,
    /// The call names no caller: it did not come through a gateway.
    #[error("{0}")]
    NoCaller(String),
    /// A record does not allow it, or cannot be written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The host did not do it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A token could not be signed.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// This scheduler gives up what it was doing, because it is being stopped.
    #[error("the scheduler is stopping, try again")]
    Stopping,
    /// Something broke on our side.
    #[error("{0}")]
    Internal(String),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Ledger(error.into())
    }
}

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        Self::Ledger(denied.into())
    }
}

impl Refusal {
    /// Its stable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Invalid(Invalid::Size(_)) => Reason::InvalidSize,
            Self::Invalid(Invalid::Path) => Reason::InvalidPath,
            Self::Invalid(_) => Reason::InvalidArgument,
            Self::SandboxNotFound => Reason::SandboxNotFound,
            Self::CheckpointNotFound => Reason::CheckpointNotFound,
            Self::Inadmissible(Inadmissible::Exists(_)) => Reason::CheckpointExists,
            Self::Inadmissible(Inadmissible::TooMany { .. }) => Reason::TooManyCheckpoints,
            Self::CheckpointNotReady => Reason::CheckpointNotReady,
            Self::CheckpointHasNoMemory => Reason::CheckpointHasNoMemory,
            Self::CheckpointLost => Reason::CheckpointDamaged,
            Self::WatchCompacted => Reason::WatchCompacted,
            Self::TooManyWatches => Reason::Overloaded,
            Self::PreviewNotFound => Reason::PreviewNotFound,
            Self::DomainTaken => Reason::DomainTaken,
            Self::TooManyPreviews { .. } => Reason::TooManyPreviews,
            Self::KeyNotFound => Reason::KeyNotFound,
            Self::WrongSandbox => Reason::WrongSandbox,
            Self::NotAdmin => Reason::NotAdmin,
            Self::NoCaller(_) => Reason::Unauthenticated,
            Self::Ledger(error) => ledger_reason(error),
            Self::Agent(error) => error.reason(),
            Self::Stopping => Reason::HostUnavailable,
            Self::Token(_) | Self::Internal(_) => Reason::Internal,
        }
    }
}

fn ledger_reason(error: &LedgerError) -> Reason {
    match error {
        LedgerError::Quota(_) => Reason::QuotaExceeded,
        LedgerError::Unplaceable(Unplaceable::NoTemplate) => Reason::TemplateNotFound,
        LedgerError::Unplaceable(Unplaceable::DiskFull) => Reason::HostDiskFull,
        LedgerError::Unplaceable(Unplaceable::NoHost | Unplaceable::Full) => Reason::NoCapacity,
        LedgerError::Denied(Denied::Deleted) => Reason::SandboxDeleted,
        LedgerError::Denied(Denied::Failed) => Reason::SandboxFailed,
        LedgerError::Denied(Denied::NotReady | Denied::Passed) => Reason::SandboxNotReady,
        LedgerError::NotFound => Reason::SandboxNotFound,
        LedgerError::Conflict | LedgerError::Busy => Reason::Overloaded,
        // The store is behind every host: without it none can be used.
        LedgerError::Store(StoreError::Unavailable(_)) => Reason::HostUnavailable,
        LedgerError::Store(_) => Reason::Internal,
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let reason = refusal.reason();
        let message = match &refusal {
            // What the store says is for the log.
            Refusal::Ledger(LedgerError::Store(StoreError::Unavailable(_))) => {
                "the record store cannot be reached".to_owned()
            }
            Refusal::Ledger(LedgerError::Store(_)) | Refusal::Token(_) => {
                "something broke on our side".to_owned()
            }
            refusal => refusal.to_string(),
        };
        if matches!(reason, Reason::Internal | Reason::HostUnavailable | Reason::Overloaded) {
            tracing::warn!(error = %refusal, "a call failed");
        }
        status(reason, message)
    }
}

#[cfg(test)]
mod tests {
    use oc_mesh::error::reason_of;

    use super::*;
    use crate::size::SizeError;

    #[test]
    fn refusals_keep_their_reason() {
        let cases: [(Refusal, &str); 7] = [
            (Invalid::Size(SizeError::Cpus(3)).into(), "INVALID_SIZE"),
            (Invalid::Template.into(), "INVALID_ARGUMENT"),
            (LedgerError::from(Unplaceable::NoTemplate).into(), "TEMPLATE_NOT_FOUND"),
            (Denied::Deleted.into(), "SANDBOX_DELETED"),
            (Refusal::Stopping, "HOST_UNAVAILABLE"),
            (AgentError::NotMember("h".into()).into(), "HOST_UNAVAILABLE"),
            (
                AgentError::Refused { reason: Reason::StartFailed, message: "no boot".into() }.into(),
                "START_FAILED",
            ),
        ];
        for (refusal, reason) in cases {
            assert_eq!(reason_of(&refusal.into()).as_deref(), Some(reason));
        }
    }

    #[test]
    fn what_the_store_says_stays_inside() {
        let refusal = Refusal::from(StoreError::Corrupt("/secret/path".into()));
        assert!(!Status::from(refusal).message().contains("secret"));
    }
}

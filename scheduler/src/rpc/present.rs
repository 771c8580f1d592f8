//! A sandbox as its users see it.

use std::time::{Duration, SystemTime};

use oc_mesh::{caller::Caller, token::TokenSigner, view::View};
use oc_proto::{
    mesh::{HostRecord, SandboxRecord, StartPath},
    v1::{EgressPolicy, Sandbox, SandboxState},
};

use crate::{activity::Activity, lifecycle, refusal::Refusal};

/// What sandboxes are shown with.
#[derive(Debug)]
pub struct Presenter {
    /// Signs their tokens.
    pub signer: TokenSigner,
    /// Knows their hosts' regions.
    pub hosts: View<HostRecord>,
    /// Knows when they were last used.
    pub activity: Activity,
}

impl Presenter {
    /// The sandbox of this record, with a fresh token, for this caller.
    ///
    /// # Errors
    ///
    /// The token cannot be signed.
    pub fn show(&self, record: &SandboxRecord, caller: &Caller, now: SystemTime) -> Result<Sandbox, Refusal> {
        let token = match lifecycle::is_deleted(record) {
            true => String::new(),
            false => self.signer.sign(&record.tenant, &record.sandbox_id, now)?.0,
        };
        Ok(Sandbox { token, ..self.describe(record, caller) })
    }

    /// The sandbox of this record, without a token, for this caller.
    pub fn describe(&self, record: &SandboxRecord, caller: &Caller) -> Sandbox {
        let size = record.size.unwrap_or_default();
        let state = match record.state() {
            _ if lifecycle::is_deleted(record) => SandboxState::Deleted,
            _ if lifecycle::is_restoring(record) => SandboxState::Restoring,
            state => state,
        };
        let region = self.hosts.get(&record.host_id).map(|host| host.region.clone());
        Sandbox {
            sandbox_id: record.sandbox_id.clone(),
            template_id: record.template_id.clone(),
            state: state.into(),
            connect_url: caller.public_url.clone(),
            sandbox_domain: caller.preview_domain.clone(),
            preview_auth_token: String::new(),
            token: String::new(),
            cpu_count: size.cpu_count,
            memory_mb: size.memory_mb,
            disk_mb: size.disk_mb,
            metadata: record.metadata.clone(),
            started_at: record.created_at,
            end_at: ends_at(state, record, self.activity.of(record)).map(Into::into),
            timeout: record.timeout,
            worker_id: record.host_id.clone(),
            region: region.unwrap_or_default(),
            accelerator: record.accelerator.clone(),
            failure: record.failure.clone(),
            start_path: start_path(record.start_path()).into(),
            from_checkpoint_id: record.from_checkpoint_id.clone(),
            forked_from: record.forked_from.clone(),
            renewed: record.renewed.clone(),
            stored_bytes: record.stored_bytes,
            egress: match record.egress() {
                // Of a record from before there was a network.
                EgressPolicy::Unspecified => EgressPolicy::Open,
                egress => egress,
            }
            .into(),
            is_uploaded: state == SandboxState::Hibernated && !record.stored_snapshot_id.is_empty(),
        }
    }

    /// A fresh token for the sandbox of this record, and when it expires.
    ///
    /// # Errors
    ///
    /// The token cannot be signed.
    pub fn token(&self, record: &SandboxRecord, now: SystemTime) -> Result<(String, SystemTime), Refusal> {
        Ok(self.signer.sign(&record.tenant, &record.sandbox_id, now)?)
    }
}

/// When it ends if it is not used until then; when it ended.
fn ends_at(state: SandboxState, record: &SandboxRecord, active_at: SystemTime) -> Option<SystemTime> {
    match state {
        SandboxState::Running => {
            let timeout = u64::try_from(record.timeout).ok().filter(|seconds| *seconds > 0)?;
            active_at.checked_add(Duration::from_secs(timeout))
        }
        SandboxState::Deleted => record.deleted_at.and_then(|time| time.try_into().ok()),
        _ => None,
    }
}

fn start_path(path: StartPath) -> &'static str {
    match path {
        StartPath::Unspecified => "",
        StartPath::Warm => "warm",
        StartPath::Clone => "clone",
        StartPath::Cold => "cold",
        StartPath::Paused => "paused",
        StartPath::Memory => "memory",
        StartPath::Disk => "disk",
        StartPath::Restored => "restored",
        StartPath::RestoredDisk => "restored-disk",
    }
}

//! The hosts' agents, as the scheduler asks them. Each call has a deadline and is idempotent.

use std::time::{Duration, SystemTime};

use oc_mesh::{
    channel::{Channels, ClientChannel, MAX_MESSAGE},
    error::{Reason, reason_of},
    view::View,
};
use oc_proto::mesh::{
    CaptureVmRequest, CreateVmRequest, CreateVmResponse, DeleteSnapshotRequest, DeleteVmRequest,
    HibernateVmRequest, HibernateVmResponse, HostRecord, ListVmsRequest, SandboxRecord, Snapshot,
    SnapshotSource, VerifySnapshotRequest, Vm, WakeVmRequest, WakeVmResponse,
    agent_service_client::AgentServiceClient,
};
use thiserror::Error;
use tonic::{Code, Request, Response, Status};

use crate::flows;

/// How long a host may take to make a microVM.
pub const CREATE_DEADLINE: Duration = Duration::from_secs(60);
/// How long a host may take to end one.
const DELETE_DEADLINE: Duration = Duration::from_secs(20);
/// How long a host may take to store one: memory is written at the disk's pace.
const HIBERNATE_DEADLINE: Duration = Duration::from_secs(150);
/// How long a host may take to wake one: memory is read at the disk's pace, and if it is no good the disk is booted.
const WAKE_DEADLINE: Duration = Duration::from_secs(110);
/// How long a host may take to take one down: what it has changed is written at the disk's pace.
const CAPTURE_DEADLINE: Duration = Duration::from_secs(320);
/// How long a host may take to read a snapshot.
const VERIFY_DEADLINE: Duration = Duration::from_secs(115);
/// How long a host may take to say what it has.
const LIST_DEADLINE: Duration = Duration::from_secs(5);
/// Pause before a call that never reached its host is repeated once: a connection to an agent that has just been
/// restarted breaks at its first use.
const RECONNECT: Duration = Duration::from_millis(50);

/// Why a host did not do it.
#[derive(Clone, Debug, Error)]
pub enum AgentError {
    /// It is no member.
    #[error("host {0} is not a member at the moment")]
    NotMember(String),
    /// It does not answer. Whether it did what was asked, nobody knows.
    #[error("host {host} does not answer: {message}")]
    Unreachable {
        /// The host.
        host: String,
        /// What went wrong.
        message: String,
    },
    /// It refused.
    #[error("{message}")]
    Refused {
        /// Why.
        reason: Reason,
        /// In words.
        message: String,
    },
}

impl AgentError {
    fn new(host: &str, status: &Status) -> Self {
        let message = status.message().to_owned();
        match reason_of(status).and_then(|reason| reason.parse::<Reason>().ok()) {
            Some(Reason::DeadlineExceeded | Reason::HostUnavailable) => {
                Self::Unreachable { host: host.into(), message }
            }
            Some(reason) => Self::Refused { reason, message },
            None => match status.code() {
                Code::InvalidArgument => Self::Refused { reason: Reason::InvalidArgument, message },
                Code::Internal | Code::Unknown if !is_transport(status) => {
                    Self::Refused { reason: Reason::Internal, message }
                }
                _ => Self::Unreachable { host: host.into(), message },
            },
        }
    }

    /// The stable reason to tell a user.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotMember(_) | Self::Unreachable { .. } => Reason::HostUnavailable,
            Self::Refused { reason, .. } => *reason,
        }
    }

    /// Whether another host might do what this one did not: all but a request that is wrong by itself.
    pub fn is_of_this_host(&self) -> bool {
        !matches!(self.reason(), Reason::InvalidArgument | Reason::InvalidSize)
    }
}

/// Broken connections come as `UNKNOWN` or `INTERNAL` from the HTTP/2 layer, with the cause attached.
fn is_transport(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// All hosts that are members.
#[derive(Debug)]
pub struct Agents {
    hosts: View<HostRecord>,
    channels: Channels,
}

impl Agents {
    /// The hosts that `hosts` shows.
    pub fn new(hosts: View<HostRecord>) -> Self {
        Self { hosts, channels: Channels::new() }
    }

    /// The members.
    pub fn hosts(&self) -> &View<HostRecord> {
        &self.hosts
    }

    /// A member that is such.
    pub fn any_host(&self, is_wanted: impl Fn(&HostRecord) -> bool) -> Option<String> {
        self.hosts.all().into_iter().find(|(_, host)| is_wanted(host)).map(|(host_id, _)| host_id)
    }

    /// Drops the connections to hosts that have gone.
    pub fn forget_gone(&self) {
        let members = self.hosts.all();
        self.channels.retain(|endpoint| members.iter().any(|(_, host)| host.endpoint == endpoint));
    }

    /// Makes the record's microVM on the record's host, of a snapshot if there is one, within `deadline`.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; after [`AgentError::Unreachable`] there may be one all the same.
    pub async fn create_vm(
        &self,
        record: &SandboxRecord,
        snapshot: Option<SnapshotSource>,
        deadline: Duration,
    ) -> Result<CreateVmResponse, AgentError> {
        let request = CreateVmRequest {
            sandbox_id: record.sandbox_id.clone(),
            epoch: record.epoch,
            snapshot,
            template_id: record.template_id.clone(),
            size: record.size,
            envs: record.envs.clone(),
            egress: record.egress,
        };
        let agent = self.agent(&record.host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(deadline, request.clone()));
            async move { agent.create_vm(request).await }
        };
        repeated(&record.host_id, call).await
    }

    /// Ends a sandbox's microVM on a host; with `if_idle_since` only if it was not used since.
    ///
    /// # Errors
    ///
    /// [`AgentError`], with `SANDBOX_ACTIVE` if it was used, and `STALE_EPOCH` if the host holds a newer one.
    pub async fn delete_vm(
        &self,
        host_id: &str,
        sandbox_id: &str,
        epoch: u64,
        if_idle_since: Option<SystemTime>,
    ) -> Result<(), AgentError> {
        let request = DeleteVmRequest {
            sandbox_id: sandbox_id.into(),
            epoch,
            if_idle_since: if_idle_since.map(Into::into),
        };
        let agent = self.agent(host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(DELETE_DEADLINE, request.clone()));
            async move { agent.delete_vm(request).await }
        };
        repeated(host_id, call).await.map(|_| ())
    }

    /// Hibernates the record's microVM; with `if_idle_since` only if it was not used since.
    ///
    /// # Errors
    ///
    /// [`AgentError`], with `SANDBOX_ACTIVE` if it was used. After [`AgentError::Unreachable`] it may be hibernated.
    pub async fn hibernate_vm(
        &self,
        record: &SandboxRecord,
        if_idle_since: Option<SystemTime>,
    ) -> Result<HibernateVmResponse, AgentError> {
        let request = HibernateVmRequest {
            sandbox_id: record.sandbox_id.clone(),
            epoch: record.epoch,
            if_idle_since: if_idle_since.map(Into::into),
        };
        let agent = self.agent(&record.host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(HIBERNATE_DEADLINE, request.clone()));
            async move { agent.hibernate_vm(request).await }
        };
        repeated(&record.host_id, call).await
    }

    /// Wakes the record's microVM.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; after [`AgentError::Unreachable`] it may run.
    pub async fn wake_vm(&self, record: &SandboxRecord) -> Result<WakeVmResponse, AgentError> {
        let request = WakeVmRequest {
            sandbox_id: record.sandbox_id.clone(),
            epoch: record.epoch,
            template_id: record.template_id.clone(),
            size: record.size,
            envs: record.envs.clone(),
        };
        let agent = self.agent(&record.host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(WAKE_DEADLINE, request.clone()));
            async move { agent.wake_vm(request).await }
        };
        repeated(&record.host_id, call).await
    }

    /// Takes the state of the record's microVM down as a snapshot.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; after [`AgentError::Unreachable`] there may be one all the same.
    pub async fn capture_vm(
        &self,
        record: &SandboxRecord,
        snapshot: SnapshotSource,
        is_ephemeral: bool,
    ) -> Result<Snapshot, AgentError> {
        let request = CaptureVmRequest {
            sandbox_id: record.sandbox_id.clone(),
            epoch: record.epoch,
            snapshot_id: snapshot.snapshot_id,
            disk_only: snapshot.disk_only,
            is_ephemeral,
        };
        let agent = self.agent(&record.host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(CAPTURE_DEADLINE, request.clone()));
            async move { agent.capture_vm(request).await }
        };
        let captured = repeated(&record.host_id, call).await?;
        Ok(captured.snapshot.unwrap_or_default())
    }

    /// Removes a snapshot from a host.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn delete_snapshot(&self, host_id: &str, snapshot_id: &str) -> Result<(), AgentError> {
        let request = DeleteSnapshotRequest { snapshot_id: snapshot_id.into() };
        let agent = self.agent(host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(DELETE_DEADLINE, request.clone()));
            async move { agent.delete_snapshot(request).await }
        };
        repeated(host_id, call).await.map(|_| ())
    }

    /// Has a host read all of a snapshot. Returns how much that was there, and in its object store, bytes.
    ///
    /// # Errors
    ///
    /// [`AgentError`], with `CHECKPOINT_DAMAGED` if it is.
    pub async fn verify_snapshot(&self, host_id: &str, snapshot_id: &str) -> Result<(i64, i64), AgentError> {
        let request = VerifySnapshotRequest { snapshot_id: snapshot_id.into() };
        let agent = self.agent(host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(VERIFY_DEADLINE, request.clone()));
            async move { agent.verify_snapshot(request).await }
        };
        let verified = repeated(host_id, call).await?;
        Ok((verified.verified_bytes, verified.uploaded_bytes))
    }

    /// What a host has: microVMs and snapshots.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn list_vms(&self, host_id: &str) -> Result<(Vec<Vm>, Vec<Snapshot>), AgentError> {
        let agent = self.agent(host_id)?;
        let call = || {
            let (mut agent, request) = (agent.clone(), within(LIST_DEADLINE, ListVmsRequest {}));
            async move { agent.list_vms(request).await }
        };
        let listed = repeated(host_id, call).await?;
        Ok((listed.vms, listed.snapshots))
    }

    fn agent(&self, host_id: &str) -> Result<AgentServiceClient<ClientChannel>, AgentError> {
        let host = self.hosts.get(host_id).ok_or_else(|| AgentError::NotMember(host_id.into()))?;
        let channel = self
            .channels
            .get(&host.endpoint)
            .map_err(|error| AgentError::Unreachable { host: host_id.into(), message: error.to_string() })?;
        Ok(AgentServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
    }
}

fn within<Q>(deadline: Duration, message: Q) -> Request<Q> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    if let Some(trace) = flows::trace() {
        trace.apply(request.metadata_mut().as_mut());
    }
    request
}

/// Makes the call, and once more if its connection was broken.
async fn repeated<A, F>(host_id: &str, call: impl Fn() -> F) -> Result<A, AgentError>
where
    F: Future<Output = Result<Response<A>, Status>>,
{
    let mut answer = call().await;
    if answer.as_ref().is_err_and(is_transport) {
        tokio::time::sleep(RECONNECT).await;
        answer = call().await;
    }
    answer.map(Response::into_inner).map_err(|status| AgentError::new(host_id, &status))
}

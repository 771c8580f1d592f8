//! `oc.mesh.v1.AgentService`: what the scheduler asks of this host. Parses, asks the [`Host`], and answers.

use std::time::SystemTime;

use oc_mesh::error::{Reason, status};
use oc_proto::mesh::{
    self, CreateVmRequest, CreateVmResponse, DeleteVmRequest, DeleteVmResponse, ListVmsRequest,
    ListVmsResponse, VmState, agent_service_server::AgentService,
};
use tonic::{Request, Response, Status};

use crate::{
    capacity::Full,
    host::{Host, Listed},
    identity::{Epoch, SandboxId},
    journal::{Owner, StartPath},
    microvm::Kind,
    vm::{
        decide::{Denied, Phase},
        start::{Order, StartError},
        task::VmError,
    },
};

/// Virtual CPUs and memory beyond which nothing is even tried.
const MAX_CPUS: u32 = 64;
const MAX_MEMORY_MB: u32 = 1 << 20;

/// The service.
#[derive(Clone, Debug)]
pub struct AgentRpc {
    host: Host,
    accelerator: String,
}

impl AgentRpc {
    /// Serves `host`, whose guests run by `accelerator`.
    pub fn new(host: Host, accelerator: String) -> Self {
        Self { host, accelerator }
    }
}

#[tonic::async_trait]
impl AgentService for AgentRpc {
    async fn create_vm(
        &self,
        request: Request<CreateVmRequest>,
    ) -> Result<Response<CreateVmResponse>, Status> {
        let request = request.into_inner();
        let sandbox = parse_sandbox(&request.sandbox_id)?;
        let owner = Owner { sandbox, epoch: Epoch(request.epoch) };
        let order = parse_order(request)?;
        let path = self.host.create(owner, order).await.map_err(|error| vm_status(&error))?;
        let start_path = match path {
            StartPath::Warm => mesh::StartPath::Warm,
            StartPath::Clone => mesh::StartPath::Clone,
            StartPath::Cold => mesh::StartPath::Cold,
        };
        Ok(Response::new(CreateVmResponse {
            accelerator: self.accelerator.clone(),
            start_path: start_path.into(),
        }))
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let request = request.into_inner();
        let sandbox = parse_sandbox(&request.sandbox_id)?;
        let idle_since = request
            .if_idle_since
            .map(SystemTime::try_from)
            .transpose()
            .map_err(|_| status(Reason::InvalidArgument, "if_idle_since is no time"))?;
        self.host
            .delete(&sandbox, Epoch(request.epoch), idle_since)
            .await
            .map_err(|error| vm_status(&error))?;
        Ok(Response::new(DeleteVmResponse {}))
    }

    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        let vms = self.host.list(SystemTime::now()).into_iter().filter_map(listed).collect();
        Ok(Response::new(ListVmsResponse { vms }))
    }
}

/// A VM as the scheduler sees it. One that is being deleted is as good as gone.
fn listed(vm: Listed) -> Option<mesh::Vm> {
    let state = match vm.phase {
        Phase::Starting => VmState::Starting,
        Phase::Running => VmState::Running,
        Phase::Failed => VmState::Failed,
        Phase::Deleting | Phase::Gone => return None,
    };
    Some(mesh::Vm {
        sandbox_id: vm.owner.sandbox.to_string(),
        epoch: vm.owner.epoch.0,
        state: state.into(),
        failure: vm.failure.map(|reason| reason.to_string()).unwrap_or_default(),
        active_at: Some(vm.active_at.into()),
    })
}

/// Parses a sandbox ID.
///
/// # Errors
///
/// `INVALID_ARGUMENT`.
pub(crate) fn parse_sandbox(text: &str) -> Result<SandboxId, Status> {
    SandboxId::parse(text).map_err(|error| status(Reason::InvalidArgument, error.to_string()))
}

fn parse_order(request: CreateVmRequest) -> Result<Order, Status> {
    let size = request.size.unwrap_or_default();
    let positive = |value: i32, max: u32, what: &str| {
        u32::try_from(value).ok().filter(|value| (1..=max).contains(value)).ok_or_else(|| {
            status(Reason::InvalidSize, format!("{what} must be from 1 to {max}, not {value}"))
        })
    };
    if request.template_id.is_empty() {
        return Err(status(Reason::InvalidArgument, "template_id is empty"));
    }
    Ok(Order {
        kind: Kind {
            template: request.template_id,
            cpu_count: positive(size.cpu_count, MAX_CPUS, "cpu_count")?,
            memory_mb: positive(size.memory_mb, MAX_MEMORY_MB, "memory_mb")?,
        },
        disk_mb: u32::try_from(size.disk_mb)
            .map_err(|_| status(Reason::InvalidSize, "disk_mb must not be negative"))?,
        envs: request.envs,
    })
}

/// What a caller is told about a request that was not fulfilled.
pub(crate) fn vm_status(error: &VmError) -> Status {
    let reason = match error {
        VmError::Denied(denied) => return denied_status(*denied),
        VmError::Start(StartError::Full(Full::Disk { .. })) => Reason::HostDiskFull,
        VmError::Start(StartError::Full(Full::Sandboxes { .. } | Full::Memory { .. })) => Reason::NoCapacity,
        VmError::Start(StartError::NoTemplate(_)) => Reason::TemplateNotFound,
        VmError::Start(StartError::Failed(_)) => Reason::StartFailed,
        VmError::Start(StartError::Leaving) | VmError::Leaving => Reason::HostUnavailable,
        VmError::Start(StartError::Lost(_)) | VmError::Lost(_) => Reason::SandboxFailed,
        VmError::NotReady => Reason::SandboxNotReady,
        VmError::Stalled => Reason::HostDiskFull,
        VmError::Busy => Reason::Overloaded,
    };
    match error {
        // Of the host's inside: it is in the log.
        VmError::Start(StartError::Failed(_)) => status(reason, "the microVM could not be started"),
        error => status(reason, error.to_string()),
    }
}

fn denied_status(denied: Denied) -> Status {
    let reason = match denied {
        Denied::StaleEpoch { .. } | Denied::Overtaken { .. } | Denied::Deleted => Reason::StaleEpoch,
        Denied::Active => Reason::SandboxActive,
        Denied::Failed => Reason::SandboxFailed,
    };
    status(reason, denied.to_string())
}

#[cfg(test)]
mod tests {
    use oc_proto::mesh::VmSize;

    use super::*;

    fn request(size: VmSize) -> CreateVmRequest {
        CreateVmRequest { template_id: "base".into(), size: Some(size), ..Default::default() }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let good = VmSize { cpu_count: 1, memory_mb: 1024, disk_mb: 20480 };
        assert_eq!(parse_order(request(good)).unwrap().kind.memory_mb, 1024);
        for bad in [
            VmSize { cpu_count: 0, ..good },
            VmSize { memory_mb: -1, ..good },
            VmSize { memory_mb: i32::MAX, ..good },
            VmSize { disk_mb: -5, ..good },
        ] {
            let status = parse_order(request(bad)).unwrap_err();
            assert_eq!(oc_mesh::error::reason_of(&status).as_deref(), Some("INVALID_SIZE"), "{bad:?}");
        }
    }

    #[test]
    fn each_shortage_has_its_reason() {
        let reason =
            |full| oc_mesh::error::reason_of(&vm_status(&VmError::Start(StartError::Full(full)))).unwrap();
        assert_eq!(reason(Full::Disk { free_mb: 1, reserve_mb: 2 }), "HOST_DISK_FULL");
        assert_eq!(reason(Full::Memory { available_mb: 1, reserve_mb: 2 }), "NO_CAPACITY");
        assert_eq!(reason(Full::Sandboxes { max: 2 }), "NO_CAPACITY");
    }
}

//! `oc.mesh.v1.AgentService`: what the scheduler asks of this host. Parses, asks the [`Host`], and answers.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use oc_mesh::error::{Reason, status};
use oc_proto::{
    mesh::{
        self, CaptureVmRequest, CaptureVmResponse, CreateVmRequest, CreateVmResponse, DeleteSnapshotRequest,
        DeleteSnapshotResponse, DeleteVmRequest, DeleteVmResponse, HibernateVmRequest, HibernateVmResponse,
        ListVmsRequest, ListVmsResponse, Snapshot, SnapshotSource, VerifySnapshotRequest,
        VerifySnapshotResponse, VmSize, VmState, WakeVmRequest, WakeVmResponse,
        agent_service_server::AgentService,
    },
    v1::{EgressPolicy, HibernationTier},
};
use tonic::{Request, Response, Status};

use crate::{
    backend::{Captured, Wanted},
    capacity::Full,
    driver::shelf,
    host::{Host, Listed},
    identity::{Epoch, SandboxId},
    journal::{Owner, StartPath},
    microvm::{Kind, MakeError},
    network::Egress,
    vm::{
        decide::{Denied, Phase},
        handle::VmError,
        start::{Order, Source, StartError},
        tier::Tier,
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
        let mut order = parse_order(request.template_id, request.size, request.envs)?;
        order.egress = match EgressPolicy::try_from(request.egress) {
            Ok(EgressPolicy::Unspecified | EgressPolicy::Open) => Egress::Open,
            Ok(EgressPolicy::None) => Egress::Nothing,
            // Of a later contract: it may only be stricter.
            Err(_) => return Err(status(Reason::InvalidArgument, "egress is none of those this host knows")),
        };
        order.source = request.snapshot.map(parse_source).transpose()?;
        let sandbox = owner.sandbox.clone();
        let path = self.host.create(owner, order).await.map_err(|error| vm_status(&error))?;
        let renewed = self.host.find(&sandbox).map(|vm| vm.status().renewed).unwrap_or_default();
        Ok(Response::new(CreateVmResponse {
            accelerator: self.accelerator.clone(),
            start_path: start_path(path).into(),
            renewed: renewed.to_vec(),
        }))
    }

    async fn hibernate_vm(
        &self,
        request: Request<HibernateVmRequest>,
    ) -> Result<Response<HibernateVmResponse>, Status> {
        let request = request.into_inner();
        let sandbox = parse_sandbox(&request.sandbox_id)?;
        let idle_since = parse_idle_since(request.if_idle_since)?;
        let stored = self.host.hibernate(&sandbox, Epoch(request.epoch), idle_since).await;
        let stored = stored.map_err(|error| vm_status(&error))?.ok_or_else(|| unknown(&sandbox))?;
        let tier = match stored.tier {
            Tier::Paused => HibernationTier::Paused,
            Tier::Stored => HibernationTier::Stored,
        };
        Ok(Response::new(HibernateVmResponse {
            stored_bytes: signed(stored.stored_bytes),
            tier: tier.into(),
        }))
    }

    async fn wake_vm(&self, request: Request<WakeVmRequest>) -> Result<Response<WakeVmResponse>, Status> {
        let request = request.into_inner();
        let sandbox = parse_sandbox(&request.sandbox_id)?;
        let order = parse_order(request.template_id, request.size, request.envs)?;
        let path = self.host.wake(&sandbox, Epoch(request.epoch), &order).await;
        let path = path.map_err(|error| vm_status(&error))?.ok_or_else(|| unknown(&sandbox))?;
        Ok(Response::new(WakeVmResponse {
            accelerator: self.accelerator.clone(),
            start_path: start_path(path).into(),
        }))
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let request = request.into_inner();
        let sandbox = parse_sandbox(&request.sandbox_id)?;
        let idle_since = parse_idle_since(request.if_idle_since)?;
        self.host
            .delete(&sandbox, Epoch(request.epoch), idle_since)
            .await
            .map_err(|error| vm_status(&error))?;
        Ok(Response::new(DeleteVmResponse {}))
    }

    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        // Before the VMs: a snapshot that is taken meanwhile is missing at worst.
        let mut snapshots = self.host.snapshots();
        let listed = self.host.list(SystemTime::now()).into_iter().filter_map(|vm| {
            let is_of_it =
                |captured: &mut Captured| vm.shelved.as_deref() == Some(captured.snapshot_id.as_str());
            let shelved = snapshots.extract_if(.., is_of_it).next();
            listed(vm, shelved)
        });
        let vms = listed.collect();
        let snapshots = snapshots.iter().map(snapshot).collect();
        Ok(Response::new(ListVmsResponse { vms, snapshots }))
    }

    async fn capture_vm(
        &self,
        request: Request<CaptureVmRequest>,
    ) -> Result<Response<CaptureVmResponse>, Status> {
        let request = request.into_inner();
        let sandbox = parse_sandbox(&request.sandbox_id)?;
        let snapshot_id = parse_snapshot(request.snapshot_id)?;
        let wanted = Wanted { snapshot_id, disk_only: request.disk_only, is_ephemeral: request.is_ephemeral };
        let captured = self.host.capture(&sandbox, Epoch(request.epoch), wanted).await;
        let captured = captured.map_err(|error| vm_status(&error))?.ok_or_else(|| unknown(&sandbox))?;
        Ok(Response::new(CaptureVmResponse { snapshot: Some(snapshot(&captured)) }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let snapshot_id = parse_snapshot(request.into_inner().snapshot_id)?;
        self.host.delete_snapshot(&snapshot_id).await.map_err(|error| snapshot_status(&error))?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn verify_snapshot(
        &self,
        request: Request<VerifySnapshotRequest>,
    ) -> Result<Response<VerifySnapshotResponse>, Status> {
        let snapshot_id = parse_snapshot(request.into_inner().snapshot_id)?;
        let whole = self.host.verify_snapshot(&snapshot_id).await.map_err(|error| snapshot_status(&error))?;
        Ok(Response::new(VerifySnapshotResponse {
            verified_bytes: signed(whole.here),
            uploaded_bytes: signed(whole.uploaded),
        }))
    }
}

/// A snapshot as the scheduler sees it.
fn snapshot(captured: &Captured) -> Snapshot {
    let circumstances = captured.circumstances;
    let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    Snapshot {
        snapshot_id: captured.snapshot_id.clone(),
        has_memory: captured.has_memory,
        is_quiesced: circumstances.is_quiet,
        size_bytes: signed(captured.bytes),
        memory_changed_bytes: signed(captured.memory_changed_bytes),
        disk_changed_bytes: signed(captured.disk_bytes),
        pause_us: micros(circumstances.pause),
        freeze_us: micros(circumstances.freeze),
        manifest_digest: captured.manifest_digest.clone(),
        snapshot_key: captured.snapshot_key.clone(),
        base_digest: captured.base_digest.clone(),
        created_at: Some(circumstances.taken_at.into()),
        object_store_id: captured.object_store_id.as_deref().unwrap_or_default().to_owned(),
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A VM as the scheduler sees it, and the snapshot of it while it sleeps. One that is being deleted is as good as gone.
fn listed(vm: Listed, shelved: Option<Captured>) -> Option<mesh::Vm> {
    let state = match vm.phase {
        Phase::Starting => VmState::Starting,
        // Until it is stored it may go on.
        Phase::Running | Phase::Hibernating => VmState::Running,
        Phase::Hibernated | Phase::Waking => VmState::Hibernated,
        Phase::Failed => VmState::Failed,
        Phase::Deleting | Phase::Gone => return None,
    };
    // It is of use as soon as it is in a store.
    let stored = shelved.filter(|captured| captured.object_store_id.is_some());
    let stored = stored.as_ref().map(snapshot).unwrap_or_default();
    Some(mesh::Vm {
        sandbox_id: vm.owner.sandbox.to_string(),
        epoch: vm.owner.epoch.0,
        state: state.into(),
        failure: vm.failure.map(|reason| reason.to_string()).unwrap_or_default(),
        active_at: Some(vm.active_at.into()),
        stored_bytes: signed(vm.stored_bytes),
        snapshot_id: stored.snapshot_id,
        object_store_id: stored.object_store_id,
        snapshot_key: stored.snapshot_key,
        base_digest: stored.base_digest,
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

fn parse_snapshot(id: String) -> Result<String, Status> {
    match shelf::is_id(&id) {
        true => Ok(id),
        false => Err(status(Reason::InvalidArgument, "snapshot_id is no name of a snapshot")),
    }
}

fn parse_source(source: SnapshotSource) -> Result<Source, Status> {
    let SnapshotSource { snapshot_id, disk_only, wakes } = source;
    Ok(Source { snapshot_id: parse_snapshot(snapshot_id)?, disk_only, wakes })
}

fn snapshot_status(error: &MakeError) -> Status {
    let reason = match error {
        MakeError::NoSnapshot(_) => Reason::SnapshotNotFound,
        MakeError::Unusable(_) => Reason::CheckpointDamaged,
        _ => Reason::Internal,
    };
    status(reason, error.to_string())
}

fn parse_idle_since(time: Option<prost_types::Timestamp>) -> Result<Option<SystemTime>, Status> {
    time.map(SystemTime::try_from)
        .transpose()
        .map_err(|_| status(Reason::InvalidArgument, "if_idle_since is no time"))
}

/// What a caller is told of a sandbox that is not on this host.
pub(crate) fn unknown(sandbox: &SandboxId) -> Status {
    status(Reason::SandboxNotFound, format!("there is no sandbox {sandbox} on this host"))
}

fn start_path(path: StartPath) -> mesh::StartPath {
    match path {
        StartPath::Warm => mesh::StartPath::Warm,
        StartPath::Clone => mesh::StartPath::Clone,
        StartPath::Cold => mesh::StartPath::Cold,
        StartPath::Paused => mesh::StartPath::Paused,
        StartPath::Memory => mesh::StartPath::Memory,
        StartPath::Disk => mesh::StartPath::Disk,
        StartPath::Restored => mesh::StartPath::Restored,
        StartPath::RestoredDisk => mesh::StartPath::RestoredDisk,
    }
}

fn parse_order(
    template: String,
    size: Option<VmSize>,
    envs: HashMap<String, String>,
) -> Result<Order, Status> {
    let size = size.unwrap_or_default();
    let positive = |value: i32, max: u32, what: &str| {
        u32::try_from(value).ok().filter(|value| (1..=max).contains(value)).ok_or_else(|| {
            status(Reason::InvalidSize, format!("{what} must be from 1 to {max}, not {value}"))
        })
    };
    if template.is_empty() {
        return Err(status(Reason::InvalidArgument, "template_id is empty"));
    }
    Ok(Order {
        kind: Kind {
            template,
            cpu_count: positive(size.cpu_count, MAX_CPUS, "cpu_count")?,
            memory_mb: positive(size.memory_mb, MAX_MEMORY_MB, "memory_mb")?,
        },
        disk_mb: u32::try_from(size.disk_mb)
            .map_err(|_| status(Reason::InvalidSize, "disk_mb must not be negative"))?,
        envs,
        egress: Egress::Open,
        source: None,
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
        VmError::Hibernated => Reason::SandboxHibernated,
        VmError::NotStored(_) => Reason::HibernationFailed,
        VmError::NotCaptured(_) => Reason::CheckpointFailed,
        VmError::Start(StartError::NoSnapshot(_)) => Reason::SnapshotNotFound,
        VmError::Start(StartError::NoMemory(_)) => Reason::CheckpointHasNoMemory,
        VmError::Start(StartError::Unusable(_)) => Reason::CheckpointDamaged,
        VmError::Stalled => Reason::HostDiskFull,
        VmError::Busy => Reason::Overloaded,
    };
    match error {
        // Of the host's inside: it is in the log.
        VmError::Start(StartError::Failed(_)) => status(reason, "the microVM could not be started"),
        VmError::NotCaptured(_) => status(reason, "the checkpoint could not be taken; the sandbox runs on"),
        VmError::NotStored(_) => status(reason, "the sandbox could not be hibernated and runs on"),
        error => status(reason, error.to_string()),
    }
}

fn denied_status(denied: Denied) -> Status {
    let reason = match denied {
        Denied::StaleEpoch { .. } | Denied::Overtaken { .. } | Denied::Deleted => Reason::StaleEpoch,
        Denied::Active => Reason::SandboxActive,
        Denied::NotReady => Reason::SandboxNotReady,
        Denied::Failed => Reason::SandboxFailed,
    };
    status(reason, denied.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(size: VmSize) -> Result<Order, Status> {
        parse_order("base".into(), Some(size), HashMap::new())
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let good = VmSize { cpu_count: 1, memory_mb: 1024, disk_mb: 20480 };
        assert_eq!(parsed(good).unwrap().kind.memory_mb, 1024);
        for bad in [
            VmSize { cpu_count: 0, ..good },
            VmSize { memory_mb: -1, ..good },
            VmSize { memory_mb: i32::MAX, ..good },
            VmSize { disk_mb: -5, ..good },
        ] {
            let status = parsed(bad).unwrap_err();
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

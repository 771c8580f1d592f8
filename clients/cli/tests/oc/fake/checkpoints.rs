//! Checkpoints over a list, and sandboxes made of them.

use std::sync::{Arc, Mutex};

use oc_proto::v1::{
    Checkpoint, CheckpointKind, CheckpointState, CreateCheckpointRequest, CreateCheckpointResponse,
    DeleteCheckpointRequest, DeleteCheckpointResponse, ForkCheckpointRequest, ForkCheckpointResponse,
    ForkMode, ForkSandboxRequest, ForkSandboxResponse, GetCheckpointRequest, GetCheckpointResponse,
    ListCheckpointsRequest, ListCheckpointsResponse, RestoreCheckpointRequest, RestoreCheckpointResponse,
    Sandbox, SandboxState, VerifyCheckpointRequest, VerifyCheckpointResponse,
    checkpoint_service_server::CheckpointService,
};
use prost_types::Timestamp;
use tonic::{Code, Request, Response, Status};

use super::{State, refused};

pub struct Checkpoints(pub Arc<Mutex<State>>);

impl State {
    fn checkpoint(&self, id: &str) -> Result<Checkpoint, Status> {
        self.checkpoints.iter().find(|checkpoint| checkpoint.checkpoint_id == id).cloned().ok_or_else(|| {
            refused(Code::NotFound, "CHECKPOINT_NOT_FOUND", &format!("there is no checkpoint {id}"))
        })
    }

    fn sandbox(&self, id: &str) -> Result<Sandbox, Status> {
        self.sandboxes
            .get(id)
            .cloned()
            .ok_or_else(|| refused(Code::NotFound, "SANDBOX_NOT_FOUND", &format!("there is no sandbox {id}")))
    }

    fn fork(&mut self, of: &Sandbox, count: Option<i32>) -> Vec<Sandbox> {
        let first = self.sandboxes.len();
        let forks = (0..count.unwrap_or(1)).map(|number| Sandbox {
            sandbox_id: format!("sb-{first:010}{number:010}"),
            template_id: "base".into(),
            state: SandboxState::Running.into(),
            cpu_count: 1,
            memory_mb: 1024,
            ..of.clone()
        });
        let forks: Vec<_> = forks.collect();
        self.sandboxes.extend(forks.iter().map(|fork| (fork.sandbox_id.clone(), fork.clone())));
        forks
    }
}

#[tonic::async_trait]
impl CheckpointService for Checkpoints {
    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<CreateCheckpointResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let sandbox = state.sandbox(&request.sandbox_id)?;
        let mut before =
            state.checkpoints.iter().filter(|checkpoint| checkpoint.sandbox_id == request.sandbox_id);
        if before.clone().any(|checkpoint| checkpoint.name == request.name) {
            return Err(refused(Code::AlreadyExists, "CHECKPOINT_EXISTS", "there is one of that name"));
        }
        let checkpoint = Checkpoint {
            checkpoint_id: format!("cp-{:020}", state.taken.len()),
            sandbox_id: request.sandbox_id.clone(),
            name: request.name.clone(),
            kind: match request.kind() {
                CheckpointKind::DiskOnly => CheckpointKind::DiskOnly.into(),
                _ => CheckpointKind::Full.into(),
            },
            state: CheckpointState::Ready.into(),
            size_bytes: 7 << 20,
            created_at: Some(Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            parent_id: before.next_back().map(|last| last.checkpoint_id.clone()).unwrap_or_default(),
            memory_changed_bytes: 4 << 20,
            disk_changed_bytes: 1 << 19,
            is_quiesced: true,
            pause_us: 12_300,
            memory_mb: sandbox.memory_mb,
            ..Checkpoint::default()
        };
        state.taken.push(request);
        state.checkpoints.push(checkpoint.clone());
        Ok(Response::new(CreateCheckpointResponse { checkpoint: Some(checkpoint) }))
    }

    async fn get_checkpoint(
        &self,
        request: Request<GetCheckpointRequest>,
    ) -> Result<Response<GetCheckpointResponse>, Status> {
        let checkpoint = self.0.lock().unwrap().checkpoint(&request.into_inner().checkpoint_id)?;
        Ok(Response::new(GetCheckpointResponse { checkpoint: Some(checkpoint) }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let of = request.into_inner().sandbox_id;
        let mut checkpoints = self.0.lock().unwrap().checkpoints.clone();
        checkpoints.retain(|checkpoint| of.is_empty() || checkpoint.sandbox_id == of);
        Ok(Response::new(ListCheckpointsResponse { checkpoints }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointResponse>, Status> {
        let id = request.into_inner().checkpoint_id;
        let mut state = self.0.lock().unwrap();
        state.checkpoint(&id)?;
        state.checkpoints.retain(|checkpoint| checkpoint.checkpoint_id != id);
        Ok(Response::new(DeleteCheckpointResponse {}))
    }

    async fn restore_checkpoint(
        &self,
        request: Request<RestoreCheckpointRequest>,
    ) -> Result<Response<RestoreCheckpointResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        state.checkpoint(&request.checkpoint_id)?;
        let sandbox = Sandbox { start_path: "restored".into(), ..state.sandbox(&request.sandbox_id)? };
        Ok(Response::new(RestoreCheckpointResponse { sandbox: Some(sandbox) }))
    }

    /// Those whose name is `damaged` are, and those that failed cannot be read.
    async fn verify_checkpoint(
        &self,
        request: Request<VerifyCheckpointRequest>,
    ) -> Result<Response<VerifyCheckpointResponse>, Status> {
        let checkpoint = self.0.lock().unwrap().checkpoint(&request.into_inner().checkpoint_id)?;
        match (checkpoint.state(), checkpoint.name.as_str()) {
            (CheckpointState::Ready, "damaged") => {
                Err(refused(Code::DataLoss, "CHECKPOINT_DAMAGED", "disk.img: chunk 3 has another digest"))
            }
            (CheckpointState::Ready, _) => Ok(Response::new(VerifyCheckpointResponse {
                verified_bytes: checkpoint.size_bytes,
                uploaded_bytes: 2 << 20,
            })),
            _ => Err(refused(Code::FailedPrecondition, "CHECKPOINT_NOT_READY", "it is not on disk")),
        }
    }

    async fn fork_checkpoint(
        &self,
        request: Request<ForkCheckpointRequest>,
    ) -> Result<Response<ForkCheckpointResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let checkpoint = state.checkpoint(&request.checkpoint_id)?;
        if checkpoint.kind() == CheckpointKind::DiskOnly && request.mode() == ForkMode::Live {
            return Err(refused(Code::FailedPrecondition, "CHECKPOINT_HAS_NO_MEMORY", "it only boots"));
        }
        let of = Sandbox { from_checkpoint_id: request.checkpoint_id.clone(), ..Sandbox::default() };
        let sandboxes = state.fork(&of, request.count);
        state.forked_checkpoints.push(request);
        let sandbox = sandboxes.first().cloned();
        Ok(Response::new(ForkCheckpointResponse { sandboxes, sandbox }))
    }

    async fn fork_sandbox(
        &self,
        request: Request<ForkSandboxRequest>,
    ) -> Result<Response<ForkSandboxResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let forked_from = request.sandbox_id.clone();
        let of = Sandbox { forked_from, ..state.sandbox(&request.sandbox_id)? };
        let sandboxes = state.fork(&of, request.count);
        state.forked_sandboxes.push(request);
        Ok(Response::new(ForkSandboxResponse { sandboxes, pause_us: 12_345, freeze_us: 6_780 }))
    }
}

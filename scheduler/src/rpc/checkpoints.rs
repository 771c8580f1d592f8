//! `oc.v1.CheckpointService`.

use std::sync::Arc;

use oc_mesh::caller::Caller;
use oc_proto::{
    mesh::SandboxRecord,
    v1::{
        CreateCheckpointRequest, CreateCheckpointResponse, DeleteCheckpointRequest, DeleteCheckpointResponse,
        ForkCheckpointRequest, ForkCheckpointResponse, ForkSandboxRequest, ForkSandboxResponse,
        GetCheckpointRequest, GetCheckpointResponse, ListCheckpointsRequest, ListCheckpointsResponse,
        RestoreCheckpointRequest, RestoreCheckpointResponse, Sandbox, VerifyCheckpointRequest,
        VerifyCheckpointResponse, checkpoint_service_server::CheckpointService,
    },
};
use tonic::{Request, Response, Status};

use super::{key_caller, present::Presenter};
use crate::{
    checkpoints::{Checkpoints, fork::Wanted, take::Order},
    refusal::Refusal,
};

/// The service.
#[derive(Clone, Debug)]
pub struct CheckpointRpc {
    checkpoints: Checkpoints,
    presenter: Arc<Presenter>,
}

impl CheckpointRpc {
    /// Serves these checkpoints.
    pub fn new(checkpoints: Checkpoints, presenter: Arc<Presenter>) -> Self {
        Self { checkpoints, presenter }
    }

    fn show(&self, record: &SandboxRecord, caller: &Caller) -> Result<Sandbox, Refusal> {
        self.presenter.show(record, caller, self.checkpoints.sandboxes.clock.now())
    }

    fn show_all(&self, records: &[SandboxRecord], caller: &Caller) -> Result<Vec<Sandbox>, Refusal> {
        records.iter().map(|record| self.show(record, caller)).collect()
    }
}

#[tonic::async_trait]
impl CheckpointService for CheckpointRpc {
    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<CreateCheckpointResponse>, Status> {
        let caller = key_caller(&request)?;
        let request = request.into_inner();
        let order = Order::parse(request.name, request.kind, request.retention_policy);
        let order = order.map_err(Refusal::from)?;
        let taken = self.checkpoints.take(&caller.tenant, &request.sandbox_id, order).await?;
        let checkpoint = Some(self.checkpoints.present(&taken).await?);
        Ok(Response::new(CreateCheckpointResponse { checkpoint }))
    }

    async fn get_checkpoint(
        &self,
        request: Request<GetCheckpointRequest>,
    ) -> Result<Response<GetCheckpointResponse>, Status> {
        let caller = key_caller(&request)?;
        let GetCheckpointRequest { checkpoint_id, sandbox_id } = request.into_inner();
        let found = self.checkpoints.get(&caller.tenant, &checkpoint_id, &sandbox_id).await?;
        let checkpoint = Some(self.checkpoints.present(&found).await?);
        Ok(Response::new(GetCheckpointResponse { checkpoint }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let caller = key_caller(&request)?;
        let sandbox_id = request.into_inner().sandbox_id;
        let found = self.checkpoints.list(&caller.tenant, &sandbox_id).await;
        let mut checkpoints = Vec::with_capacity(found.len());
        for record in found {
            checkpoints.push(self.checkpoints.present(&record).await?);
        }
        if checkpoints.is_empty() && !sandbox_id.is_empty() {
            // None, or none that is the caller's.
            self.checkpoints.sandboxes.get(&caller.tenant, &sandbox_id).await?;
        }
        Ok(Response::new(ListCheckpointsResponse { checkpoints }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointResponse>, Status> {
        let caller = key_caller(&request)?;
        let DeleteCheckpointRequest { checkpoint_id, sandbox_id } = request.into_inner();
        self.checkpoints.delete(&caller.tenant, &checkpoint_id, &sandbox_id).await?;
        Ok(Response::new(DeleteCheckpointResponse {}))
    }

    async fn restore_checkpoint(
        &self,
        request: Request<RestoreCheckpointRequest>,
    ) -> Result<Response<RestoreCheckpointResponse>, Status> {
        let caller = key_caller(&request)?;
        let RestoreCheckpointRequest { sandbox_id, checkpoint_id } = request.into_inner();
        let record = self.checkpoints.restore(&caller.tenant, &sandbox_id, &checkpoint_id).await?;
        Ok(Response::new(RestoreCheckpointResponse { sandbox: Some(self.show(&record, &caller)?) }))
    }

    async fn verify_checkpoint(
        &self,
        request: Request<VerifyCheckpointRequest>,
    ) -> Result<Response<VerifyCheckpointResponse>, Status> {
        let caller = key_caller(&request)?;
        let (verified_bytes, uploaded_bytes) =
            self.checkpoints.verify(&caller.tenant, &request.get_ref().checkpoint_id).await?;
        Ok(Response::new(VerifyCheckpointResponse { verified_bytes, uploaded_bytes }))
    }

    async fn fork_checkpoint(
        &self,
        request: Request<ForkCheckpointRequest>,
    ) -> Result<Response<ForkCheckpointResponse>, Status> {
        let caller = key_caller(&request)?;
        let ForkCheckpointRequest { checkpoint_id, count, mode, timeout, envs, metadata } =
            request.into_inner();
        let wanted = Wanted::parse(count, mode, timeout, envs, metadata).map_err(Refusal::from)?;
        let made = self.checkpoints.fork(&caller.tenant, &checkpoint_id, wanted).await?;
        let sandboxes = self.show_all(&made, &caller)?;
        Ok(Response::new(ForkCheckpointResponse { sandbox: sandboxes.first().cloned(), sandboxes }))
    }

    async fn fork_sandbox(
        &self,
        request: Request<ForkSandboxRequest>,
    ) -> Result<Response<ForkSandboxResponse>, Status> {
        let caller = key_caller(&request)?;
        let ForkSandboxRequest { sandbox_id, count, mode, timeout, envs, metadata } = request.into_inner();
        let wanted = Wanted::parse(count, mode, timeout, envs, metadata).map_err(Refusal::from)?;
        let (made, taken) = self.checkpoints.fork_sandbox(&caller.tenant, &sandbox_id, wanted).await?;
        let sandboxes = self.show_all(&made, &caller)?;
        Ok(Response::new(ForkSandboxResponse {
            sandboxes,
            pause_us: taken.pause_us,
            freeze_us: taken.freeze_us,
        }))
    }
}
